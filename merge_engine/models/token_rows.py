"""Which row of each model every token of the output takes, where models have other tokens or other indices.

A token is identified by its string. In each tensor with one row for each token, every model's rows are put in the
output's order. A model that lacks a token gets the row of the base there, if that has the token; else that of the only
model that has it, or the mean of those that have it; so that it does not change what the others say of the token. A
recipe may say from where a token's row comes instead, and that all models are to take it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merge_engine.errors import ModelError
from merge_engine.formats.checkpoint import Checkpoint
from merge_engine.models.vocabulary import TOKENIZER_FILE, Tokenizer, plain_entry, read_tokenizer

_ROWS = 1 << 12  # rows that are copied at a time


class Origin(NamedTuple):
    """Where a token's row comes from: a row of an input, or zeros (input None)."""

    input: int | None
    row: int = 0
    forced: bool = False  # every input takes it, also where it has the token


@dataclass(frozen=True, eq=False)
class TokenRows:
    """The tokens of the output, and each input's row of each of them."""

    tokens: dict[str, int]  # {token: index}
    added: dict[str, dict[str, Any]]  # those that the donor's tokenizer lacks, as entries of a tokenizer.json
    donor: Checkpoint  # whose tokenizer files the output gets
    rows: int  # of the output; those after the last token are padding: the mean of all others
    places: tuple[Tensor, ...] = field(repr=False)  # for each input int64 [tokens]: its row, -1 where it has none
    origins: Mapping[int, Origin] = field(default_factory=dict)  # {index of a token: what the recipe says}

    @property
    def count(self) -> int:
        """Rows of tokens."""
        return 1 + max(self.tokens.values(), default=-1)

    @property
    def digest(self) -> str:
        """SHA-256 of everything that decides where a row comes from."""
        said = [self.tokens, self.added, self.rows, {key: list(each) for key, each in self.origins.items()}]
        digest = hashlib.sha256(json.dumps(said).encode())
        for places in self.places:
            digest.update(places.numpy().tobytes())
        return digest.hexdigest()

    def align(self, inputs: Sequence[int], base: int | None, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of some inputs with the output's rows [rows, ...]; base: the number of the base among inputs."""
        places = torch.stack([self.places[number] for number in inputs])
        shared, mean = self._shared(inputs, base, places)
        missing = (places < 0).any(0)
        missing[[index for index, origin in self.origins.items() if origin.forced]] = True
        dtype = tensors[0].dtype
        for tensor in tensors[1:]:
            dtype = torch.promote_types(dtype, tensor.dtype)
        if bool((mean & missing).any()) or self.rows > self.count:
            dtype = torch.float32 if dtype.itemsize < 4 else dtype
        wanted = missing.nonzero().flatten()
        rows = self._rows_of(wanted, shared, mean, places, tensors, dtype)
        forced = torch.zeros(self.count, dtype=torch.bool)
        forced[[index for index, origin in self.origins.items() if origin.forced]] = True
        aligned = []
        for place, tensor in zip(places, tensors, strict=True):
            out = torch.zeros((self.rows, *tensor.shape[1:]), dtype=dtype)
            own = ((place >= 0) & ~forced).nonzero().flatten()
            for part in own.split(_ROWS):
                out[part] = tensor[place[part]].to(dtype)
            other = (place[wanted] < 0) | forced[wanted]
            out[wanted[other]] = rows[other]
            if self.rows > self.count:
                out[self.count :] = out[: self.count].mean(0)
            aligned.append(out)
        return aligned

    def _shared(self, inputs: Sequence[int], base: int | None, places: Tensor) -> tuple[Tensor, Tensor]:
        """([2, tokens]: which of the tensors (-1: zeros) and which row of it; where it is the mean of all instead)."""
        has = places >= 0
        count = has.sum(0)
        which = torch.where(count == 1, has.int().argmax(0), torch.full((self.count,), -1))
        if base is not None and base in inputs:
            number = inputs.index(base)
            which = torch.where((count > 1) & has[number], number, which)
        mean = (count > 1) & (which < 0)
        row = places.gather(0, which.clamp(min=0)[None])[0]
        for index, origin in self.origins.items():
            mean[index] = False
            if origin.input is None:
                which[index] = -1
            elif origin.input in inputs:
                which[index], row[index] = inputs.index(origin.input), origin.row
            else:
                raise ModelError(f"tokens: the row of {self._name(index)} is asked of a model that is not merged here")
        return torch.stack([which, row]), mean

    def _rows_of(
        self,
        wanted: Tensor,
        shared: Tensor,
        mean: Tensor,
        places: Tensor,
        tensors: Sequence[Tensor],
        dtype: torch.dtype,
    ) -> Tensor:
        """The rows [wanted, ...] that inputs take where they lack a token."""
        rows = torch.zeros((len(wanted), *tensors[0].shape[1:]), dtype=dtype)
        which, row = shared[:, wanted]
        for number, tensor in enumerate(tensors):
            here = (which == number) & ~mean[wanted]
            rows[here] = tensor[row[here]].to(dtype)
        averaged = mean[wanted].nonzero().flatten()
        if len(averaged):
            total = torch.zeros((len(averaged), *tensors[0].shape[1:]), dtype=dtype)
            count = torch.zeros(len(averaged))
            for place, tensor in zip(places[:, wanted[averaged]], tensors, strict=True):
                here = place >= 0
                total[here] += tensor[place[here]].to(dtype)
                count += here
            rows[averaged] = total / count.reshape(-1, *[1] * (total.ndim - 1)).to(dtype)
        return rows

    def _name(self, index: int) -> str:
        return next(token for token, other in self.tokens.items() if other == index)


class Asked(NamedTuple):
    """What a recipe says of a token: zeros, an input's row of the token, of another token, or of an index."""

    input: int | None
    token: str | None = None
    row: int | None = None
    forced: bool = False
    zero: bool = False


def token_rows(
    models: Sequence[Checkpoint],
    source: int | None,
    base: int,
    asked: Mapping[str, Asked],
    multiple: int | None = None,
) -> TokenRows:
    """The tokens of the output, and where their rows come from.

    source: the model whose tokens they are; None: the union, of the base's tokens at their indices, then those that
    models have in order, first of their vocabularies and then added ones. base: the model whose files are extended.
    asked: what the recipe says of tokens; new ones are added. multiple: rows are padded to a multiple of it.

    Raises ModelError where a tokenizer.json is missing or damaged, or a token asked for is not there.
    """
    donor = base if source is None else source
    of_donor = read_tokenizer(models[donor])
    own: dict[int, Tokenizer] = {
        number: read_tokenizer(model) if has_tokenizer(model) else of_donor for number, model in enumerate(models)
    }
    tokens = dict(_within(own[donor], models[donor] if source is None else None))
    added: dict[str, dict[str, Any]] = {}

    def add(token: str, entry: Mapping[str, Any] | None = None) -> None:
        if token not in tokens:
            tokens[token] = 1 + max(tokens.values(), default=-1)
            added[token] = {"id": tokens[token], "content": token, **plain_entry(entry or {})}

    if source is None:
        for special in (False, True):
            for number in [base, *range(len(models))]:
                entries = own[number]
                for token in _within(entries, models[number]):
                    if (token in entries.added) == special:
                        add(token, entries.added.get(token))
    for token in asked:
        add(token)
    rows = 1 + max(tokens.values(), default=-1)
    count = rows
    if multiple and rows % multiple:
        rows += multiple - rows % multiple
    places = []
    for number, model in enumerate(models):
        place = torch.full((count,), -1)
        for token, index in _within(own[number], model).items():
            if token in tokens:
                place[tokens[token]] = index
        places.append(place)
    origins = {tokens[token]: _origin(token, each, models, own) for token, each in asked.items()}
    return TokenRows(tokens, added, models[donor], rows, tuple(places), origins)


def has_tokenizer(model: Checkpoint) -> bool:
    return (model.path / TOKENIZER_FILE).is_file()


def _within(tokenizer: Tokenizer, model: Checkpoint | None) -> dict[str, int]:
    """The tokens that have a row in the model; model None: all."""
    size = None if model is None else row_count(model)
    return {token: index for token, index in tokenizer.tokens.items() if size is None or index < size}


def row_count(model: Checkpoint) -> int | None:
    """The rows that config.json says."""
    said = [model.config, model.config.get("text_config")]
    return next((each["vocab_size"] for each in said if isinstance(each, dict) and "vocab_size" in each), None)


def _origin(token: str, asked: Asked, models: Sequence[Checkpoint], own: Mapping[int, Tokenizer]) -> Origin:
    if asked.zero:
        return Origin(None, 0, asked.forced)
    assert asked.input is not None
    index = asked.row
    if index is None:
        name = token if asked.token is None else asked.token
        index = own[asked.input].tokens.get(name)
        if index is None:
            raise ModelError(f"{models[asked.input].name}: wanted the token {name} for the row of {token}, got none")
    rows = row_count(models[asked.input])
    if rows is not None and not 0 <= index < rows:
        raise ModelError(f"{models[asked.input].name}: wanted a row below {rows} for {token}, got {index}")
    return Origin(asked.input, index, asked.forced)
