"""A merge of whole tensors: for each tensor of the output, which tensors of which inputs, by which method."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from merge_engine.errors import ModelError, RecipeError
from merge_engine.files.shards import Layout, lay_out
from merge_engine.files.weights import StoredTensor
from merge_engine.formats.checkpoint import FLOATS
from merge_engine.into.full_inputs import FullInput, common_dtype, is_float
from merge_engine.into.resume import VERSIONS, files_in
from merge_engine.models.token_rows import TokenRows
from merge_engine.models.vocabulary import token_keys
from merge_engine.rules.whole_methods import WHOLE_METHODS, models_wanted

Part = tuple[int, str]  # an input's number, and the key of a tensor in it
_COSTS = {"element": 1, "tensor": 2, "selection": 4, "rows": 8}  # of an element, by how a method looks at it


@dataclass(frozen=True)
class TensorWork:
    """One tensor of the output. keys: its names; tied tensors are merged once and written under each of their names.

    parts: what is merged, in order, without the base where the method knows one. options: of the method.
    """

    keys: tuple[str, ...]
    parts: tuple[Part, ...]
    base: Part | None
    method: str
    options: Mapping[str, Any]

    @property
    def all(self) -> tuple[Part, ...]:
        """The parts, and the base first."""
        return self.parts if self.base is None else (self.base, *self.parts)

    @property
    def is_copy(self) -> bool:
        """Whether it is one tensor, as it is."""
        return self.method == "passthrough" and self.options["scale"] == (None,)


@dataclass(frozen=True)
class WholeJob:
    """What is merged, checked before anything is written; see `make_whole_job`.

    companions: {name: content, or the file to copy} of the files beside the weights; report: of merge_report.json.
    """

    sources: tuple[FullInput, ...]
    works: tuple[TensorWork, ...]
    layout: Layout
    shard_size: int
    rows: TokenRows | None
    aligned: frozenset[str]  # keys whose rows are put in the order of the output's tokens
    published: bool
    seed: int
    companions: Mapping[str, str | Path] = field(default_factory=dict)

    @property
    def inputs(self) -> list[Path]:
        """The folders that it reads."""
        found = [source.model.path for source in self.sources]
        return found + [source.adapter.path for source in self.sources if source.adapter is not None]

    def identity(self) -> dict[str, Any]:
        """Everything that decides the bytes of the output; inputs by size, time of change and hash of their header."""
        said = [[work.keys, work.all, work.method, sorted(work.options.items())] for work in self.works]
        return {
            "recipe": {"works": hashlib.sha256(json.dumps(said).encode()).hexdigest(), "seed": self.seed},
            "convention": "published" if self.published else "mergekit",
            "shard_size": self.shard_size,
            "dtypes": hashlib.sha256(repr(self.layout.slots).encode()).hexdigest(),
            "vocab": None if self.rows is None else self.rows.digest,
            "inputs": [_files_of(source) for source in self.sources],
            "versions": VERSIONS,
        }

    def with_companions(self, files: Mapping[str, str | Path]) -> "WholeJob":
        """The same with the files beside the weights."""
        return replace(self, companions=files)

    def elements(self, work: TensorWork) -> int:
        """How many elements of all sources a tensor is made of."""
        return prod(self.layout.slots[work.keys[0]].shape) * len(work.all)

    def cost(self, work: TensorWork) -> int:
        """The work of a tensor, in elements that are looked at once."""
        return 1 + self.elements(work) * (1 if work.is_copy else _COSTS[WHOLE_METHODS[work.method].looks])


def _files_of(source: FullInput) -> list[dict[str, Any]]:
    found = [files_in(source.model.path, source.model.files)]
    if source.adapter is not None:
        folder = source.adapter.path
        files = [folder] if folder.is_file() else sorted(folder.glob("adapter_*"))
        found.append(files_in(folder, files))
    return found


def make_whole_job(
    sources: Sequence[FullInput],
    works: Sequence[TensorWork],
    *,
    shard_size: int,
    dtype: torch.dtype | None,
    rows: TokenRows | None = None,
    published: bool = True,
    seed: int = 0,
) -> WholeJob:
    """Check that the tensors of each work fit each other and its method, and lay out the output.

    dtype: of the output; None: what the tensors of a work promote to. Raises MergeError.
    """
    aligned = _aligned(sources, works) if rows is not None else frozenset()
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for work in works:
        check_count(work.method, len(work.parts), work.base is not None, work.keys[0])
        stored = [sources[number].stored(key) for number, key in work.all]
        shape = _shape(sources, work, stored, work.keys[0] in aligned)
        if rows is not None and work.keys[0] in aligned:
            shape = (rows.rows, *shape[1:])
        common = common_dtype(stored) if all(map(is_float, stored)) else stored[0].dtype
        for key in work.keys:
            if key in shapes:
                raise RecipeError(f"{key} would be made twice")
            shapes[key] = (dtype if dtype is not None and common in FLOATS else common, shape)
    layout = lay_out(shapes, shard_size)
    return WholeJob(tuple(sources), tuple(works), layout, shard_size, rows, aligned, published, seed)


def check_count(method: str, count: int, based: bool, subject: str) -> None:
    """Raise RecipeError unless a method takes so many models besides the base, with or without one."""
    row, others = WHOLE_METHODS[method], count
    total = count + based
    if row.base == "needed" and not based:
        raise RecipeError(f"base_model: {method} needs one, got none for {subject}")
    for low, high, got in ((row.least, row.most, total), (*row.others, others)):
        if got < low or (high is not None and got > high):
            raise RecipeError(f"models: {method} takes {models_wanted(method)}, got {got} for {subject}")


def _aligned(sources: Sequence[FullInput], works: Sequence[TensorWork]) -> frozenset[str]:
    """The keys of the output that have one row for each token, as they have in the inputs."""
    known = [set(token_keys(source.model)) for source in sources]
    heads = {
        key for work in works for key in work.keys if any(stored_is_token(sources, known, part) for part in work.all)
    }
    return frozenset(heads)


def stored_is_token(sources: Sequence[FullInput], known: Sequence[set[str]], part: Part) -> bool:
    """Whether a part has one row for each token."""
    number, key = part
    return sources[number].stored(key).key in known[number]


def _shape(
    sources: Sequence[FullInput], work: TensorWork, stored: Sequence[StoredTensor], aligned: bool
) -> tuple[int, ...]:
    first, owner = stored[0], sources[work.all[0][0]].name
    same = 1 if aligned else 0
    for (number, key), other in zip(work.all, stored, strict=True):
        name = sources[number].name
        if other.shape[same:] != first.shape[same:]:
            rows = len(first.shape) > 0 and other.shape[1:] == first.shape[1:]
            hint = "; a tokenizer in the recipe (source: base or union) puts rows in order" if rows else ""
            raise ModelError(
                f"{name}: {key} is {list(other.shape)}, wanted {list(first.shape)} as {first.key} in {owner}{hint}"
            )
        if is_float(other) != is_float(first):
            raise ModelError(f"{name}: {key} is {other.dtype}, wanted {first.dtype} as in {owner}")
        if not is_float(first) and not other.same_as(first):
            raise ModelError(f"{name}: {key} is {other.dtype} and differs from {owner}: it cannot be merged")
    return first.shape
