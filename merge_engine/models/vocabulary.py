"""Which tokens models have, how those differ from the base's, and the union of all.

A token is identified by its string, never by its index. A union has the base's tokens at their indices, then those that
models added, in order of first appearance. Every row of a model goes to the place of its token in the union.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_engine.errors import ModelError, shown, some
from merge_engine.formats.checkpoint import FLOATS, Checkpoint

TOKENIZER_FILE = "tokenizer.json"
_SHOWN = 8  # tokens that a message names
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
_LARGEST = 1 << 24  # of an index, and so of the rows that are made of tokens
_LISTS = {"tokenizer_config.json": "additional_special_tokens", "special_tokens_map.json": "additional_special_tokens"}
# How an added token is found in text, where a file has only its string: as transformers adds a plain token.
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


@dataclass(frozen=True)
class Tokenizer:
    """What a model's tokenizer files say of its tokens."""

    tokens: dict[str, int]  # {token: index}, sorted by index
    added: dict[str, dict[str, Any]]  # the added tokens, which are found in text as a whole: {token: how}
    rules: dict[str, str]  # how the rest of a text is split into tokens: {field: digest}, independent of indices


@dataclass(frozen=True, eq=False)
class Union:
    """The tokens of a base and of models tuned from it, and their rows in the output."""

    tokens: dict[str, int]  # {token: index}
    added: dict[str, dict[str, Any]]  # the tokens that the base lacks, as entries of a tokenizer.json
    first: int  # the index of the first added token; the others follow
    base_rows: int
    keys: frozenset[str]  # the tensors with one row for each token
    places: Mapping[Checkpoint, Tensor] = field(repr=False)  # int64 [rows]: where each row goes, -1 for nowhere

    @property
    def rows(self) -> int:
        """Rows of the output: the base's with its padding, or more where the added tokens do not fit in it."""
        return max(self.base_rows, self.first + len(self.added))

    @property
    def digest(self) -> str:
        """SHA-256 of everything that decides where a row goes and what is written into the tokenizer's files."""
        digest = hashlib.sha256(json.dumps([self.tokens, self.added, sorted(self.keys)]).encode())
        for places in self.places.values():
            digest.update(places.numpy().tobytes())
        return digest.hexdigest()


def unite(base: Checkpoint, models: Sequence[Checkpoint]) -> Union:
    """The union of the vocabularies of a base and of models.

    A row without a token is padding: it keeps its index, if the base has padding there that no added token uses.

    Raises ModelError: a tokenizer.json is missing or damaged, gives one index to two tokens or two indices to one, or
    has more tokens than its model has rows; or a model's tokenizer splits text by other rules than the base's, so that
    equal strings are not the same token.
    """
    keys = token_keys(base)
    own, base_rows = read_tokenizer(base), base.tensors[keys[0]].shape[0]
    _check_rows(base, own, keys)
    tokens = dict(own.tokens)
    added: dict[str, dict[str, Any]] = {}
    places: dict[Checkpoint, Tensor] = {}
    first = 1 + max(own.tokens.values(), default=-1)
    for model in models:
        tokenizer = read_tokenizer(model)
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
            f"{base.name}: its tokenizer has {some(len(own.tokens), 'token')} and the highest index {first - 1}, "
            f"wanted no index free below the tokens to be added ({_named(list(added))})"
        )
    padding = torch.ones(base_rows, dtype=torch.bool)
    padding[[index for index in tokens.values() if index < base_rows]] = False
    for place in places.values():
        idle = torch.nonzero(padding[: len(place)] & (place[:base_rows] < 0)).flatten()
        place[idle] = idle
    return Union(tokens, added, first, base_rows, frozenset(keys), places)


def check_vocabulary(base: Checkpoint, models: Sequence[Checkpoint]) -> None:
    """Raise ModelError where an embedding or a head has a different number of rows than in the base.

    The message names every such model, both sizes, and the tokens that its tokenizer has beyond the base's.
    """
    known, told = tokens(base.path), []
    for model in models:
        for key in vocabulary_keys(base):
            have, want = model.tensors[key].shape if key in model.tensors else (), base.tensors[key].shape
            if have and have[0] != want[0] and have[1:] == want[1:]:
                added = [token for token in tokens(model.path) if token not in known]
                names = f" (added: {_named(added)})" if added else ""
                told.append(f"{model.name} has {some(have[0], 'row')} in {key}{names}")
                break
    if told:
        rows = base.tensors[vocabulary_keys(base)[0]].shape[0]
        raise ModelError(f"vocabularies differ: {base.name} has {some(rows, 'token')}; {'; '.join(told)}")


def vocabulary_keys(base: Checkpoint) -> list[str]:
    """The matrices with one row for each token: outside of layers, and with ``vocab_size`` rows as in config.json."""
    size = _size(base)
    return [
        key
        for key, stored in base.tensors.items()
        if len(stored.shape) == 2 and stored.shape[0] == size and not in_layer(key)
    ]


def token_keys(base: Checkpoint) -> list[str]:
    """Every tensor with one row for each token: `vocabulary_keys`, and vectors of that length, such as their biases."""
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
    """Whether a module or tensor is part of a numbered layer: its name has a number in it."""
    return any(part.isdigit() for part in name.split("."))


def tokens(folder: Path) -> dict[str, int]:
    """{token: id} of a model's tokenizer files, sorted by id; empty where they are missing or cannot be read."""
    try:
        found = {token: index for token, index, _ in _entries(folder, _json(folder / TOKENIZER_FILE))}
        return dict(sorted(found.items(), key=lambda item: item[1]))
    except _UNREADABLE:
        return {}


def _size(base: Checkpoint) -> int | None:
    sizes = [base.config, base.config.get("text_config")]
    return next((each["vocab_size"] for each in sizes if isinstance(each, dict) and "vocab_size" in each), None)


def read_tokenizer(model: Checkpoint) -> Tokenizer:
    """A model's tokenizer; ModelError where two tokens share an index or one token has two."""
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
            if type(token) is not str or type(index) is not int or not 0 <= index < _LARGEST:
                raise ValueError(f"{shown(token)} has the index {shown(index)}, wanted one below {_LARGEST}")
            if found.setdefault(token, index) != index:
                raise ModelError(f"{model.name}: its tokenizer has {token} at {found[token]} and at {index}")
            if at.setdefault(index, token) != token:
                raise ModelError(f"{model.name}: its tokenizer has both {at[index]} and {token} at {index}")
            if entry is not None:
                added.setdefault(token, {key: entry[key] for key in _PLAIN if key in entry})
        rules = _rules(whole.get("model") or {})
        for name, key in _LISTS.items():  # which are extended, where vocabularies are united
            if not isinstance(_json(model.path / name).get(key) or [], list):
                raise ValueError(f"{key} of {name} is no list")
    except ModelError:
        raise
    except _UNREADABLE as error:
        why = " ".join(str(error).split())
        raise ModelError(f"{model.name}: its tokenizer files cannot be read: {type(error).__name__}: {why}") from error
    if not found:
        raise ModelError(f"{model.name}: {TOKENIZER_FILE} has no tokens")
    return Tokenizer(dict(sorted(found.items(), key=lambda item: item[1])), added, rules)


def plain_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """How a token is found in text: as the entry says, else as transformers adds a plain token."""
    return _PLAIN | {key: entry[key] for key in _PLAIN if key in entry}


def _entries(folder: Path, whole: Mapping[str, Any]) -> Iterator[tuple[str, int, Mapping[str, Any] | None]]:
    """(token, index, entry) of all tokenizer files; a token may come twice.

    entry: how an added token is found in text; None for others. whole: the content of tokenizer.json.
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
    """The content of a JSON file, empty if there is no such file. Raises ValueError where it is no object."""
    if not file.is_file():
        return {}
    value = json.loads(file.read_text(encoding="utf-8-sig"))
    if not isinstance(value, dict):
        raise ValueError(f"{file.name} holds a {type(value).__name__}, wanted an object")
    return value


def _rules(section: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the fields of a tokenizer's model, without the indices, and without dropout, which is for training.

    Older files leave out fields that are off, and write a merge as one string.
    """
    rules = {key: value for key, value in section.items() if key not in ("vocab", "dropout")}
    pieces = section.get("vocab")
    if isinstance(pieces, list):  # Unigram: [piece, score] by index
        rules["vocab"] = sorted(pieces)
        rules["unk_id"] = None if rules.get("unk_id") is None else pieces[rules["unk_id"]][0]
    rules["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in rules.get("merges") or []]
    return {key: hashlib.sha256(json.dumps(value).encode()).hexdigest() for key, value in rules.items() if value}


def _check_rows(model: Checkpoint, tokenizer: Tokenizer, keys: Sequence[str]) -> None:
    """Raise ModelError unless all tensors with one row for each token have a row for every token."""
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
            f"{model.name}: its tokenizer's model has tokens that {base.name} does not have ({_named(strange)}), "
            "wanted them among its added tokens"
        )


def _named(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
