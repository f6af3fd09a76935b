"""Recipes that are one merge into a base model by a method of our own: their settings as fields of `Recipe`.

Such a merge never multiplies adapters out, and runs on a GPU where there is one.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from merge_engine.errors import RecipeError
from merge_engine.formats.checkpoint import FLOATS, Checkpoint
from merge_engine.mergekit.file import Entry, MergekitRecipe
from merge_engine.mergekit.layers import depths, last_layers
from merge_engine.mergekit.reader import Parameters, Reference, first_value, missing
from merge_engine.rules.whole_methods import WHOLE_METHODS
from merge_engine.whole_tensors.arithmetic import NO_SUM, TINY

# Our own method for a method of mergekit's.
OURS = {
    "linear": "linear",
    "task_arithmetic": "linear",
    "ties": "ties",
    "dare_linear": "dare_linear",
    "dare_ties": "dare_ties",
}


class Values(NamedTuple):
    """The settings of one tensor: a weight and a density for each input, and those of the whole merge."""

    weights: tuple[float, ...]
    densities: tuple[float, ...]
    normalize: bool
    scale: float
    rescale: bool


class Bound(NamedTuple):
    """base: what is merged into. entries: what is merged. fields: of `Recipe`."""

    base: Reference
    entries: tuple[Entry, ...]
    fields: dict[str, Any]


def base_of(recipe: MergekitRecipe) -> Reference | None:
    """The full model that the others are changes of; linear takes one of its models. None: there is none such."""
    (part, *more) = recipe.slices
    if recipe.method not in OURS or more or recipe.tokenizer is not None or recipe.template is not None:
        return None
    if recipe.method == "linear":
        adapted = [entry.reference for entry in part.entries if entry.reference.lora]
        base: Reference | None = recipe.base or (adapted or [part.entries[0].reference])[0].full
    else:
        base = part.base
    if base is None or base.lora is not None:
        return None
    for entry in part.entries:
        if entry.reference.lora is not None and entry.reference.place != base.place:
            return None
    return base


def bind(recipe: MergekitRecipe, base: Checkpoint) -> Bound | None:
    """The merge into a base that gives mergekit's result; None where there is none.

    Raises RecipeError where a parameter is missing.
    """
    name = base_of(recipe)
    assert name is not None
    keys = [key for key, stored in base.tensors.items() if stored.dtype in FLOATS]
    part, depth = recipe.slices[0], depths(keys)
    counts = {1 + last for last in last_layers(keys).values()}
    ranges = {entry.layers for entry in part.entries if entry.layers is not None}
    if any(start != 0 or counts != {stop} for start, stop in ranges):
        return None
    weighed = [entry for entry in part.entries if recipe.method == "linear" or entry.reference != name]
    merged = tuple(entry for entry in weighed if entry.reference.lora or entry.reference.place != name.place)
    if not merged:
        return None
    values = {}
    for key in keys:
        found = _values(recipe, weighed, merged, key, depth[key])
        if found is None:
            return None
        values[key] = found
    for twin, first in base.twins.items():
        if twin in values and values[twin] != values[first]:
            raise RecipeError(f"{recipe.file}: {twin} is tied to {first}; wanted the same parameters for both")
    settings = {key.removesuffix(".weight"): value for key, value in values.items() if key not in base.twins}
    fields = _fields(recipe, settings)
    return None if fields is None else Bound(name, merged, fields)


def _fields(recipe: MergekitRecipe, settings: Mapping[str, Values]) -> dict[str, Any] | None:
    """The fields of `Recipe`; None where modules differ in what has to be the same for all."""
    ours = OURS[recipe.method]
    fields: dict[str, Any] = {"method": ours, "convention": "mergekit", "dtype": recipe.dtype}
    fields |= _by_module("weights", {name: value.weights for name, value in settings.items()})
    if recipe.method not in ("linear", "task_arithmetic"):
        fields |= _by_module("density", {name: value.densities for name, value in settings.items()})
    alike = {(value.normalize, value.scale, value.rescale) for value in settings.values()}
    if ours in ("ties", "dare_ties", "dare_linear") and len(alike) > 1:
        return None
    normalize, scale, rescale = next(iter(alike))
    if ours in ("ties", "dare_ties"):
        fields |= {"scale": scale, "normalize": normalize}
    if "dare" in ours:
        fields["rescale"] = "l1" if rescale else "density"
    return fields


def _values(
    recipe: MergekitRecipe, weighed: list[Entry], merged: tuple[Entry, ...], key: str, depth: float
) -> Values | None:
    """The settings of one tensor, converted to our own arithmetic; None where it has no such settings."""
    row = WHOLE_METHODS[recipe.method]
    scopes = [recipe.slices[0].parameters, *recipe.scopes]

    def find(name: str, entry: Entry | None = None) -> Any:
        if name not in row.options:
            return {"density": 1.0, "lambda": 1.0, "rescale": False}[name]
        own: list[Parameters] = [] if entry is None else [entry.parameters]
        return first_value([*own, *scopes], name, key, depth, row.options[name].default)

    normalize, rescale, scale = find("normalize"), find("rescale"), find("lambda")
    weights = [find("weight", entry) for entry in weighed]
    densities = [find("density", entry) for entry in merged]
    for entry, weight in zip(weighed, weights, strict=True):
        if weight is None:
            raise missing(recipe.file, "weight", str(entry.reference), key)
    total = math.fsum(weights)
    if recipe.method == "linear" and normalize and abs(total) < TINY:
        raise RecipeError(f"{recipe.file}: weight: linear divides by their sum, got 0 for {key}; {NO_SUM}")
    if recipe.method == "linear" and not normalize and not math.isclose(total, 1.0, abs_tol=1e-9):
        return None  # base + sum of differences needs a sum of 1
    if OURS[recipe.method] in ("linear", "dare_linear"):  # a sum: divisor and scale go into its weights
        share = scale / total if normalize and abs(total) >= TINY else scale
        weights, scale, normalize = [share * weight for weight in weights], 1.0, False
    weights = [weight for entry, weight in zip(weighed, weights, strict=True) if entry in merged]
    if "dare" not in recipe.method and rescale and recipe.method not in ("linear", "task_arithmetic"):
        return None  # a trim is not rescaled there
    if "dare" in recipe.method and not rescale:  # then ours is by 1 / density, and the weights undo it
        if recipe.method == "dare_ties" and normalize:
            return None
        weights = [weight * density for weight, density in zip(weights, densities, strict=True)]
    kept = [density > 0 for density in densities]  # a density of 0 keeps nothing: the same as a weight of 0
    weights = [weight if keep else 0.0 for weight, keep in zip(weights, kept, strict=True)]
    densities = [density if keep else 1.0 for density, keep in zip(densities, kept, strict=True)]
    return Values(tuple(weights), tuple(densities), normalize, scale, rescale)


def _by_module(name: str, numbers: Mapping[str, tuple[float, ...]]) -> dict[str, Any]:
    """The field of `Recipe` for numbers by module; the plain field if all modules have the same numbers."""
    if len(set(numbers.values())) == 1:
        return {name: next(iter(numbers.values()))}
    return {{"weights": "module_weights", "density": "module_densities"}[name]: dict(numbers)}
