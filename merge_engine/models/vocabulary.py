"""Which tokens models have, how those differ from the base's, and the union of them all.

A token is known by its string, never by its index: the tokens of a union are the base's at their indices, then the ones
that models added, in order of first appearance. Every model's rows are sent to the places of their tokens in it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_engine.errors import ModelError
from merge_engine.formats.checkpoint import FLOATS, Checkpoint

TOKENIZER_FILE = "tokenizer.json"
_SHOWN = 8  # tokens that a message names
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
# How an added token is found in text, where only its string is on record: as transformers adds a plain one.
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


@dataclass(frozen=True)
class Tokenizer:
    """What a model's tokenizer files say of its tokens."""

    tokens: dict[str, int]  # by index
    added: dict[str, dict[str, Any]]  # of these, those that are found in text as a whole: how, by token
    rules: dict[str, str]  # what splits the rest of a text into tokens: digests by field, free of indices


@dataclass(frozen=True, eq=False)
class Union:
    """The tokens of a base and of models tuned from it, and the rows of the output that they have."""

    tokens: dict[str, int]  # by index
    added: dict[str, dict[str, Any]]  # those that the base lacks, as entries of a tokenizer.json
    first: int  # the index of the first added one; they have one each from there
    base_rows: int
    keys: frozenset[str]  # the tensors with one row a token
    places: Mapping[Checkpoint, Tensor] = field(repr=False)  # int64 [rows]: where a model's rows go, -1 for nowhere

    @property
    def rows(self) -> int:
        """Rows of the output: the base's, padding included, and what the added tokens need beyond its padding."""
        return max(self.base_rows, self.first + len(self.added))

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides where a row goes and what the tokenizer's files say."""
        digest = hashlib.sha256(json.dumps([self.tokens, self.added, sorted(self.keys)]).encode())
        for places in self.places.values():
            digest.update(places.numpy().tobytes())
        return digest.hexdigest()


def unite(base: Checkpoint, models: Sequence[Checkpoint]) -> Union:
    """The union of the vocabularies of a base and of models.

    A row without a token is padding: it goes to the row of its index, if that is padding of the base and is left over.

    Raises ModelError: a tokenizer.json is missing or damaged, gives two tokens one index or one token two, or has more
    tokens than its model has rows; or a model's tokenizer splits text by other rules than the base's, so that its
    tokens are other ones even where their strings are the same.
    """
    keys = token_keys(base)
    own, base_rows = _read(base), base.tensors[keys[0]].shape[0]
    _check_rows(base, own, keys)
    tokens = dict(own.tokens)
    added: dict[str, dict[str, Any]] = {}
    places: dict[Checkpoint, Tensor] = {}
    first = 1 + max(own.tokens.values(), default=-1)
    for model in models:
        tokenizer = _read(model)
        _check_rows(model, tokenizer, keys)
        _check_rules(base, own, model, tokenizer)
        for token in tokenizer.tokens:
            if token not in tokens:
                tokens[token] = first + len(added)
                added[token] = {"id": tokens[token], "content": token, **_PLAIN, **tokenizer.added[token]}
        rows = next(model.tensors[key].shape[0] for key in keys if key in model.tensors)
        place = torch.full((rows,), -1)
        place[list(tokenizer.tokens.values())] = torch.tensor([tokens[token] for token in tokenizer.tokens])
        places[model] = place
    if added and len(own.tokens) != first:
        raise ModelError(
            f"{base.name}: its tokenizer has {len(own.tokens)} tokens and the highest index {first - 1}, "
            f"wanted no index free below the tokens to be added ({_named(list(added))})"
        )
    padding = torch.ones(base_rows, dtype=torch.bool)
    padding[[index for index in tokens.values() if index < base_rows]] = False
    for place in places.values():
        idle = torch.nonzero(padding[: len(place)] & (place[:base_rows] < 0)).flatten()
        place[idle] = idle
    return Union(tokens, added, first, base_rows, frozenset(keys), places)


def check_vocabulary(base: Checkpoint, models: Sequence[Checkpoint]) -> None:
    """Raise ModelError where an embedding or a head has another number of rows than in the base.

    The message names every such model, both sizes, and the tokens that its tokenizer has beyond the base's.
    """
    known, told = tokens(base.path), []
    for model in models:
        for key in vocabulary_keys(base):
            have, want = model.tensors[key].shape if key in model.tensors else (), base.tensors[key].shape
            if have and have[0] != want[0] and have[1:] == want[1:]:
                added = [token for token in tokens(model.path) if token not in known]
                names = f" (added: {_named(added)})" if added else ""
                told.append(f"{model.name} has {have[0]} rows in {key}{names}")
                break
    if told:
        rows = base.tensors[vocabulary_keys(base)[0]].shape[0]
        raise ModelError(f"vocabularies differ: {base.name} has {rows} tokens; {'; '.join(told)}")


def vocabulary_keys(base: Checkpoint) -> list[str]:
    """The matrices with one row a token: those outside of layers with as many rows as config.json has tokens."""
    size = _size(base)
    return [
        key
        for key, stored in base.tensors.items()
        if len(stored.shape) == 2 and stored.shape[0] == size and not in_layer(key)
    ]


def token_keys(base: Checkpoint) -> list[str]:
    """Every tensor with one row a token: `vocabulary_keys`, and vectors that are their biases or are just as long."""
    keys, size = [key for key in vocabulary_keys(base) if base.tensors[key].dtype in FLOATS], _size(base)
    if not keys:
        raise ModelError(f"{base.name}: wanted an embedding of vocab_size rows as config.json says, got none")
    biases = {key.removesuffix("weight") + "bias" for key in keys}
    as_wide = any(base.tensors[key].shape[1] == size for key in keys)
    return keys + [
        key
        for key, stored in base.tensors.items()
        if stored.shape == (size,) and stored.dtype in FLOATS and (key in biases or not (as_wide or in_layer(key)))
    ]


def in_layer(name: str) -> bool:
    """Whether a module or tensor is part of a layer, one of a numbered row of them."""
    return any(part.isdigit() for part in name.split("."))


def tokens(folder: Path) -> dict[str, int]:
    """{token: id} of a model's tokenizer files, by id; empty where they are missing or cannot be understood."""
    try:
        found = {token: index for token, index, _ in _entries(folder, _json(folder / TOKENIZER_FILE))}
        return dict(sorted(found.items(), key=lambda item: item[1]))
    except _UNREADABLE:
        return {}


def _size(base: Checkpoint) -> int | None:
    sizes = [base.config, base.config.get("text_config")]
    return next((each["vocab_size"] for each in sizes if isinstance(each, dict) and "vocab_size" in each), None)


def _read(model: Checkpoint) -> Tokenizer:
    """A model's tokenizer, checked: strings and indices are in one-to-one relation."""
    file = model.path / TOKENIZER_FILE
    if not file.is_file():
        raise ModelError(
            f"{model.name}: {model.path} has no {TOKENIZER_FILE}, wanted one to align its tokens with those of others"
        )
    found: dict[str, int] = {}
    added: dict[str, dict[str, Any]] = {}
    at: dict[int, str] = {}
    try:
        whole = _json(file)
        for token, index, entry in _entries(model.path, whole):
            if type(token) is not str or type(index) is not int or index < 0:
                raise ValueError(f"{token!r} has the index {index!r}")
            if found.setdefault(token, index) != index:
                raise ModelError(f"{model.name}: its tokenizer has {token} at {found[token]} and at {index}")
            if at.setdefault(index, token) != token:
                raise ModelError(f"{model.name}: its tokenizer has both {at[index]} and {token} at {index}")
            if entry is not None:
                added.setdefault(token, {key: entry[key] for key in _PLAIN if key in entry})
        rules = _rules(whole.get("model") or {})
    except ModelError:
        raise
    except _UNREADABLE as error:
        why = " ".join(str(error).split())
        raise ModelError(f"{model.name}: its tokenizer files cannot be read: {type(error).__name__}: {why}") from error
    if not found:
        raise ModelError(f"{model.name}: {TOKENIZER_FILE} has no tokens")
    return Tokenizer(dict(sorted(found.items(), key=lambda item: item[1])), added, rules)


def _entries(folder: Path, whole: Mapping[str, Any]) -> Iterator[tuple[str, int, Mapping[str, Any] | None]]:
    """(token, index, how it is found in text if it is an added one) of all tokenizer files; a token may come twice.

    whole: what tokenizer.json holds.
    """
    pieces = (whole.get("model") or {}).get("vocab") or {}
    named = pieces.items() if isinstance(pieces, dict) else ((piece[0], i) for i, piece in enumerate(pieces))
    yield from ((token, index, None) for token, index in named)
    yield from ((entry["content"], entry["id"], entry) for entry in whole.get("added_tokens") or [])
    config = _json(folder / "tokenizer_config.json")
    for number, entry in (config.get("added_tokens_decoder") or {}).items():
        yield entry["content"], int(number), entry
    yield from ((token, index, {}) for token, index in _json(folder / "added_tokens.json").items())


def _json(file: Path) -> dict[str, Any]:
    """What a file holds, nothing if there is none. Raises ValueError where it is no JSON object."""
    if not file.is_file():
        return {}
    value = json.loads(file.read_bytes())
    if not isinstance(value, dict):
        raise ValueError(f"{file.name} holds a {type(value).__name__}, wanted an object")
    return value


def _rules(section: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the fields of a tokenizer's model but its indices, and dropout, which is of training.

    Older files leave out what is off, and write a merge as one string.
    """
    rules = {key: value for key, value in section.items() if key not in ("vocab", "dropout")}
    pieces = section.get("vocab")
    if isinstance(pieces, list):  # Unigram: [piece, score] by index
        rules["vocab"] = sorted(pieces)
        rules["unk_id"] = None if rules.get("unk_id") is None else pieces[rules["unk_id"]][0]
    rules["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in rules.get("merges") or []]
    return {key: hashlib.sha256(json.dumps(value).encode()).hexdigest() for key, value in rules.items() if value}


def _check_rows(model: Checkpoint, tokenizer: Tokenizer, keys: Sequence[str]) -> None:
    """Raise ModelError unless all tensors with a row a token have one for each."""
    have = {key: model.tensors[key].shape[:1] for key in keys if key in model.tensors}
    if not have:
        raise ModelError(f"{model.name}: wanted tensor {keys[0]}, got none")
    (first, rows), (token, last) = next(iter(have.items())), list(tokenizer.tokens.items())[-1]
    for key, shape in have.items():
        if shape != rows or not shape:
            raise ModelError(f"{model.name}: {key} has {list(shape)} rows, wanted {list(rows)} as {first}")
    if last >= rows[0]:
        raise ModelError(
            f"{model.name}: its tokenizer has {token} at {last}, wanted an index below {rows[0]}, the rows of {first}"
        )


def _check_rules(base: Checkpoint, own: Tokenizer, model: Checkpoint, tokenizer: Tokenizer) -> None:
    """Raise ModelError where a model's tokenizer does not split text as the base's does."""
    for key in sorted(own.rules.keys() | tokenizer.rules.keys()):
        if own.rules.get(key) != tokenizer.rules.get(key):
            raise ModelError(
                f"{model.name}: the {key} of its tokenizer's model are not those of {base.name}: "
                "wanted the same rules, by which a token is the same text in both"
            )
    strange = [token for token in tokenizer.tokens if token not in own.tokens and token not in tokenizer.added]
    if strange:
        raise ModelError(
            f"{model.name}: its tokenizer's model has tokens that {base.name} has not ({_named(strange)}), "
            "wanted them among its added tokens"
        )


def _named(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
