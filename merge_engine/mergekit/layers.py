"""What a recipe makes of the layers of its models: a work for each tensor of the output.

The layer of a tensor is the first whole number in its name. What comes before the layers (embeddings) is made from the
models of the first slice, what comes after them from those of the last. Gradients go over the layers of a slice.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_engine.errors import ModelError, RecipeError
from merge_engine.formats.checkpoint import Checkpoint, is_head
from merge_engine.into.full_inputs import FullInput, is_float
from merge_engine.into.whole_job import Part, TensorWork
from merge_engine.mergekit.file import Entry, MergekitRecipe, Slice
from merge_engine.mergekit.reader import INERT, Reference, first_value, missing
from merge_engine.rules.whole_methods import WHOLE_METHODS

_LAYER = re.compile(r"\.(\d+)\.")
_EARLY = ("wte", "wpe")  # names of embeddings that do not say so


@dataclass(frozen=True)
class Layers:
    """The works of a recipe; layers: (model, number in it) of each layer of the output, None: those of the base."""

    works: tuple[TensorWork, ...]
    layers: tuple[tuple[Checkpoint, int], ...] | None
    untied: bool  # a head is written although the donor's configuration ties it


def layers_of(recipe: MergekitRecipe, inputs: Mapping[Reference, FullInput]) -> Layers:
    """The works of a recipe. Raises MergeError where models do not fit each other or the recipe."""
    return _Builder(recipe, inputs).build()


class _Builder:
    def __init__(self, recipe: MergekitRecipe, inputs: Mapping[Reference, FullInput]) -> None:
        self.recipe, self.inputs = recipe, inputs
        self.numbers = {reference: number for number, reference in enumerate(inputs)}
        self.row = WHOLE_METHODS[recipe.method]
        self.stacks: dict[Reference, tuple[dict[str, int], dict[str, dict[str, str]]]] = {}

    def build(self) -> Layers:
        first, last = self.recipe.slices[0], self.recipe.slices[-1]
        for part in self.recipe.slices:
            self.check_keys(part)
        sliced = self.recipe.sliced and not self.spans_all(first)
        depth_of = {} if sliced else depths(self.lead(first).keys)
        works, layers = [], []
        tied = self.tied(first, last)
        for key, part in self.loose(first, last, all_keys=not sliced):
            twins = [
                twin for twin, other in self.lead(part).model.twins.items() if other == key and self.joins(twin, tied)
            ]
            works.append(self.work((key, *twins), [key] * len(part.entries), part, depth_of.get(key, 0.0)))
        if sliced:
            for part in self.recipe.slices:
                for index, depth in _depths_of(self.length(part)):
                    layers.append((self.lead(part).model, self.start(self.lead_entry(part)) + index))
                    works += self.layer(part, len(layers) - 1, index, depth)
        untied = any(is_head(work.keys[0]) for work in works) and not tied
        return Layers(tuple(works), tuple(layers) if sliced else None, untied)

    def lead_entry(self, part: Slice) -> Entry:
        """The entry whose tensors say what there is to be made: the base, else the first."""
        based = [entry for entry in part.entries if entry.reference == part.base]
        return (based or list(part.entries))[0]

    def lead(self, part: Slice) -> FullInput:
        return self.inputs[self.lead_entry(part).reference]

    def of(self, part: Slice) -> list[FullInput]:
        return [self.inputs[entry.reference] for entry in part.entries]

    def start(self, entry: Entry) -> int:
        return 0 if entry.layers is None else entry.layers[0]

    def length(self, part: Slice) -> int:
        layers = part.entries[0].layers
        assert layers is not None
        return layers[1] - layers[0]

    def tied(self, first: Slice, last: Slice) -> bool:
        """Whether the head of the output is its embedding: of all models at both ends, which are the same."""
        same = [entry.reference for entry in first.entries] == [entry.reference for entry in last.entries]
        return same and all(each.model.ties_embeddings for each in (*self.of(first), *self.of(last)))

    def joins(self, twin: str, tied: bool) -> bool:
        """Whether a tied tensor is written as its twin, and not merged on its own."""
        return tied or not is_head(twin)

    def loose(self, first: Slice, last: Slice, *, all_keys: bool) -> Iterator[tuple[str, Slice]]:
        """(key, the slice whose models it is made of) of every tensor outside of layers; all_keys: of layers, too."""
        tied = self.tied(first, last)
        for part in (first,) if first is last else (first, last):
            lead = self.lead(part)
            keys = list(lead.keys)
            keys += [key for each in self.of(part) for key in each.keys if is_head(key) and key not in keys]
            for key in dict.fromkeys(keys):
                early = _is_early(key)
                if _LAYER.search(key) and not all_keys:
                    continue
                if first is not last and early != (part is first):
                    continue
                if key in lead.model.twins and self.joins(key, tied):
                    continue  # written with its twin
                if is_head(key) and key not in lead.model.tensors and tied:
                    continue  # a copy that only another model has saved
                yield key, part

    def check_keys(self, part: Slice) -> None:
        """Raise ModelError where a model has a tensor outside of layers that the lead does not have."""
        lead = self.lead(part)
        for each in self.of(part):
            for key in each.keys:
                known = key in lead.model.tensors or is_head(key)
                if not known and (not self.recipe.sliced or not _LAYER.search(key)):
                    raise ModelError(f"{each.name} has tensor {key} but {lead.name} does not")

    def spans_all(self, part: Slice) -> bool:
        """Whether the only slice has all layers of every stack of every model."""
        if len(self.recipe.slices) > 1:
            return False
        for entry in part.entries:
            counts = {1 + last for last in last_layers(self.inputs[entry.reference].keys).values()}
            if entry.layers is not None and (entry.layers[0] != 0 or counts != {entry.layers[1]}):
                return False
        return True

    def layer(self, part: Slice, number: int, index: int, depth: float) -> Iterator[TensorWork]:
        """The works of one layer of the output: the index-th of a slice."""
        names = [self.layer_names(entry, index) for entry in part.entries]
        lead = part.entries.index(self.lead_entry(part))
        for suffix, key in names[lead].items():
            own = []
            for entry, found in zip(part.entries, names, strict=True):
                if suffix not in found:
                    raise ModelError(
                        f"{entry.reference}: layer {self.start(entry) + index} has no {suffix}, wanted one as in {key} "
                        f"of {self.lead(part).name}"
                    )
                own.append(found[suffix])
            match = _LAYER.search(key)
            assert match is not None
            yield self.work((f"{key[: match.start()]}.{number}.{suffix}",), own, part, depth)

    def layer_names(self, entry: Entry, index: int) -> dict[str, str]:
        """{what follows the number: key} of the tensors of one layer of a model."""
        model = self.inputs[entry.reference]
        if entry.reference not in self.stacks:
            self.stacks[entry.reference] = last_layers(model.keys), _by_layer(model.keys)
        stacks, names = self.stacks[entry.reference]
        if len(stacks) != 1:
            raise RecipeError(
                f"{self.recipe.file}: slices: {model.name} has {len(stacks)} stacks of layers ({', '.join(stacks)}); "
                "wanted models in place of slices"
            )
        ((prefix, last),) = stacks.items()
        number = self.start(entry) + index
        if number > last:
            raise RecipeError(
                f"{self.recipe.file}: slices: layer_range: wanted layers of {model.name}, [0, {last + 1}], "
                f"got {list(entry.layers or ())}"
            )
        return names.get(f"{prefix}.{number}.", {})

    def work(self, keys: tuple[str, ...], own: Sequence[str], part: Slice, depth: float) -> TensorWork:
        """One tensor of the output. own: the key in each entry."""
        places: list[Part] = [
            (self.numbers[entry.reference], key) for entry, key in zip(part.entries, own, strict=True)
        ]
        lead = self.inputs[self.lead_entry(part).reference]
        if not is_float(lead.stored(own[part.entries.index(self.lead_entry(part))])):
            # buffers of whole numbers are the same in all, and copied
            return TensorWork(keys, (places[part.entries.index(self.lead_entry(part))],), None, "passthrough", _COPY)
        options = self.options(keys[0], own, part, depth)
        for twin in keys[1:]:
            if self.options(twin, [twin] * len(own), part, depth) != options:
                subject = f"{self.recipe.file}: {twin} is tied to {keys[0]}"
                raise RecipeError(f"{subject}; wanted the same parameters for both")
        based = self.row.base != "none" and part.base is not None
        other = [place for place, entry in zip(places, part.entries, strict=True) if not self.is_base(entry, part)]
        base = places[[self.is_base(entry, part) for entry in part.entries].index(True)] if based else None
        return TensorWork(keys, tuple(other), base, self.recipe.method, options)

    def is_base(self, entry: Entry, part: Slice) -> bool:
        return self.row.base != "none" and entry.reference == part.base

    def options(self, key: str, own: Sequence[str], part: Slice, depth: float) -> dict[str, Any]:
        """The options of one tensor: filters see the output's name, for what each model has its own."""
        scopes = [part.parameters, *self.recipe.scopes]
        found: dict[str, Any] = {}
        for name, option in self.row.options.items():
            if name == INERT:
                continue
            if option.of == "merge":
                value = first_value(scopes, name, key, depth, option.default)
                found[name] = self.given(name, value, str(part.where), key, option.optional)
                if option.kind is int:
                    found[name] = int(found[name])
                continue
            values = []
            for entry, one in zip(part.entries, own, strict=True):
                if option.of == "input" or not self.is_base(entry, part):
                    value = first_value([entry.parameters, *scopes], name, one, depth, option.default)
                    values.append(self.given(name, value, str(entry.reference), key, option.optional))
            found[name] = tuple(values)
        return found

    def given(self, name: str, value: Any, owner: str, key: str, optional: bool) -> Any:
        if value is None and not optional:
            raise missing(self.recipe.file, name, owner, key)
        return value


_COPY = {"scale": (None,)}


def _is_early(key: str) -> bool:
    """Whether a tensor outside of layers comes before them."""
    parts = key.split(".")
    return not is_head(key) and ("emb" in key or any(part in _EARLY for part in parts))


def _depths_of(count: int) -> Iterator[tuple[int, float]]:
    """(index, depth) of the layers of a slice: 0 in the first, 1 in the last or only one."""
    return ((index, index / (count - 1) if count > 1 else 1.0) for index in range(count))


def depths(keys: Sequence[str]) -> dict[str, float]:
    """{key: depth in the model}: 0 in the first layer, 1 in the last or only one; 0 for tensors outside of layers.

    The layer of a tensor is the first whole number in its name. Each prefix before it is a stack of layers of its own.
    """
    depth, last = {}, last_layers(keys)
    for key in keys:
        match = _LAYER.search(key)
        end = last[key[: match.start()]] if match else 0
        depth[key] = 0.0 if match is None else int(match[1]) / end if end else 1.0
    return depth


def last_layers(keys: Iterable[str]) -> dict[str, int]:
    """{prefix before the number of a layer: the highest number}."""
    last: dict[str, int] = {}
    for match in filter(None, map(_LAYER.search, keys)):
        prefix = match.string[: match.start()]
        last[prefix] = max(last.get(prefix, 0), int(match[1]))
    return last


def _by_layer(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """{prefix and number of a layer: {what follows: key}}."""
    found: dict[str, dict[str, str]] = {}
    for match in filter(None, map(_LAYER.search, keys)):
        key = match.string
        found.setdefault(key[: match.end()], {})[key[match.end() :]] = key
    return found
