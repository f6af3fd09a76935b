"""mergekit's recipes, carried out: the same file gives the same model.

For each tensor of the base the settings that apply to it are found, and become a `Recipe` of ours with
``convention="mergekit"``. A setting is searched for at the model, then at its slice, then in the whole recipe; the
first one whose filter fits the tensor counts.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch

from merge_engine.errors import RecipeError
from merge_engine.files.shards import SHARD_SIZE
from merge_engine.formats.checkpoint import FLOATS, Checkpoint, open_checkpoint
from merge_engine.into.merge import MergedModel, merge_models
from merge_engine.mergekit.file import MERGEKIT_METHODS, MergekitRecipe, Parameters, read_recipe
from merge_engine.models.vocabulary import tokens
from merge_engine.rules.recipe import DTYPES

TINY = 1e-8  # sums of weights below this are not divided by
_LAYER = re.compile(r"\.(\d+)\.")


class Values(NamedTuple):
    """The settings of one tensor: a weight and a density for each input, and those of the whole merge."""

    weights: tuple[float, ...]
    densities: tuple[float, ...]
    normalize: bool
    scale: float
    rescale: bool


def merge_recipe(
    recipe: str | Path | Mapping[str, Any],
    output: str | Path,
    *,
    seed: int = 0,
    shard_size: int | str = SHARD_SIZE,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool | None = None,
    backend: str | None = None,
) -> MergedModel:
    """The model that mergekit makes from its YAML file, written by `merge_models`, which documents the other arguments.

    recipe: the file, or its parsed YAML. Its methods are linear, task_arithmetic, ties, dare_linear and dare_ties;
        paths in it are relative to the current folder, as in mergekit. seed: of the random drops.

    All arithmetic is in float32; ``dtype`` and ``out_dtype`` only set the dtype of the output. Random drops are our
    own. Raises MergeError before anything is written; warns (UserWarning) of parameters without effect.
    """
    parsed = read_recipe(recipe)
    base = open_checkpoint(parsed.base.path, revision=parsed.base.revision)
    inputs = [entry.reference.open() for entry in parsed.inputs]
    fields = bind(parsed, base)
    if parsed.dtype is None:
        fields["dtype"] = _promoted(parsed.file, base, [each for each in inputs if isinstance(each, Checkpoint)])
    if parsed.vocab == "base":
        _check_tokens(parsed, base, [each for each in inputs if isinstance(each, Checkpoint)])
    return merge_models(
        base,
        inputs,
        output,
        shard_size=shard_size,
        overwrite=overwrite,
        dry_run=dry_run,
        progress=progress,
        backend=backend,
        vocab=parsed.vocab or "base",
        seed=seed,
        **fields,
    )


def bind(recipe: MergekitRecipe, base: Checkpoint) -> dict[str, Any]:
    """The fields of `Recipe` that give mergekit's result on this base.

    Raises RecipeError if a weight is missing, or if our arithmetic does not support the parameters.
    """
    keys = [key for key, stored in base.tensors.items() if stored.dtype in FLOATS]
    depth = depths(keys)
    _check_layers(recipe, base, keys)
    values = {key: _values(recipe, key, depth[key]) for key in keys}
    for twin, first in base.twins.items():
        if twin in values and values[twin] != values[first]:
            raise RecipeError(f"{recipe.file}: {twin} is tied to {first}; wanted the same parameters for both")
    found = {key.removesuffix(".weight"): value for key, value in values.items() if key not in base.twins}
    row = MERGEKIT_METHODS[recipe.method]
    fields: dict[str, Any] = {"method": row.ours, "convention": "mergekit", "dtype": recipe.dtype}
    fields |= _by_module("weights", {name: value.weights for name, value in found.items()})
    if "density" in row.parameters:
        fields |= _by_module("density", {name: value.densities for name, value in found.items()})
    if row.ours in ("ties", "dare_ties"):
        fields["scale"] = _one(recipe, "lambda", {name: value.scale for name, value in found.items()})
        fields["normalize"] = _one(recipe, "normalize", {name: value.normalize for name, value in found.items()})
    if row.rescale:
        rescales = _one(recipe, "rescale", {name: value.rescale for name, value in found.items()})
        fields["rescale"] = "l1" if rescales else "density"
    return fields


def _values(recipe: MergekitRecipe, key: str, depth: float) -> Values:
    """The settings of one tensor, converted to our own arithmetic."""
    row = MERGEKIT_METHODS[recipe.method]

    def find(name: str, default: Any, own: Sequence[Parameters] = ()) -> Any:
        return _first([*own, *recipe.scopes], name, key, depth, default) if name in row.parameters else default

    normalize, rescale, scale = find("normalize", row.normalize), find("rescale", row.rescale), find("lambda", 1.0)
    weights = [find("weight", None, [entry.parameters]) for entry in recipe.entries]
    densities = [find("density", 1.0, [entry.parameters]) for entry in recipe.inputs]
    for entry, weight in zip(recipe.entries, weights, strict=True):
        if weight is None:
            raise RecipeError(f"{recipe.file}: wanted a weight for {entry.reference}, got none for {key}")
    total = math.fsum(weights)
    if recipe.method == "linear":
        _check_average(recipe, key, total, normalize)
    if row.ours in ("linear", "dare_linear"):  # a sum: divisor and scale go into its weights
        share = scale / total if normalize and abs(total) >= TINY else scale
        weights, scale = [share * weight for weight in weights], 1.0
    weights = [weight for entry, weight in zip(recipe.entries, weights, strict=True) if entry.differs]
    if row.ours == "ties" and rescale:
        raise RecipeError(f"{recipe.file}: rescale: wanted false for ties, got true: trims are not rescaled")
    if row.rescale and not rescale:  # then ours is by 1 / density, and the weights undo it
        if row.ours == "dare_ties" and normalize:
            raise RecipeError(f"{recipe.file}: rescale: wanted true for dare_ties with normalize, got false")
        weights = [weight * density for weight, density in zip(weights, densities, strict=True)]
    kept = [density > 0 for density in densities]  # a density of 0 keeps nothing: the same as a weight of 0
    weights = [weight if keep else 0.0 for weight, keep in zip(weights, kept, strict=True)]
    densities = [density if keep else 1.0 for density, keep in zip(densities, kept, strict=True)]
    return Values(tuple(weights), tuple(densities), normalize, scale, rescale)


def _check_average(recipe: MergekitRecipe, key: str, total: float, normalize: bool) -> None:
    """A weighted sum of whole models equals base + the weighted sum of differences only if the weights sum to 1."""
    if normalize and abs(total) < TINY:
        raise RecipeError(f"{recipe.file}: weight: linear divides by their sum, got 0 for {key}")
    if not normalize and not math.isclose(total, 1.0, abs_tol=1e-9):
        raise RecipeError(
            f"{recipe.file}: normalize: linear without it needs weights that sum to 1, got {total:g} for {key}"
        )


def _check_layers(recipe: MergekitRecipe, base: Checkpoint, keys: Sequence[str]) -> None:
    if recipe.layers is None:
        return
    counts = {1 + last for last in _last_layers(keys).values()}
    if recipe.layers[0] != 0 or counts != {recipe.layers[1]}:
        have = ", ".join(f"[0, {count}]" for count in sorted(counts)) or "no layers"
        raise RecipeError(
            f"{recipe.file}: slices: layer_range: wanted all of {base.name}, {have}, got {list(recipe.layers)}"
        )


def _one(recipe: MergekitRecipe, name: str, values: Mapping[str, Any]) -> Any:
    """The value that all tensors share. Raises RecipeError where they differ."""
    first = next(iter(values))
    for other, value in values.items():
        if value != values[first]:
            raise RecipeError(
                f"{recipe.file}: {name}: {recipe.method} takes one for the whole model, "
                f"got {values[first]} for {first} and {value} for {other}"
            )
    return values[first]


def depths(keys: Sequence[str]) -> dict[str, float]:
    """{key: depth in the model}: 0 in the first layer, 1 in the last or only one; 0 for tensors outside of layers.

    The layer of a tensor is the first whole number in its name. Each prefix before it is a stack of layers of its own.
    """
    depth, last = {}, _last_layers(keys)
    for key in keys:
        match = _LAYER.search(key)
        end = last[key[: match.start()]] if match else 0
        depth[key] = 0.0 if match is None else int(match[1]) / end if end else 1.0
    return depth


def _last_layers(keys: Iterable[str]) -> dict[str, int]:
    """{prefix before the number of a layer: the highest number}."""
    last: dict[str, int] = {}
    for match in filter(None, map(_LAYER.search, keys)):
        prefix = match.string[: match.start()]
        last[prefix] = max(last.get(prefix, 0), int(match[1]))
    return last


def _first(scopes: Iterable[Parameters], name: str, tensor: str, depth: float, default: Any) -> Any:
    """The value in the first scope that has one for the tensor."""
    for scope in scopes:
        for clause in scope.get(name, ()):
            if clause.filter is None or clause.filter == "*" or clause.filter in tensor:
                value = clause.at(depth)
                if value is not None:
                    return value
                break
    return default


def _by_module(name: str, numbers: Mapping[str, tuple[float, ...]]) -> dict[str, Any]:
    """The field of `Recipe` for numbers by module; the plain field if all modules have the same numbers."""
    if len(set(numbers.values())) == 1:
        return {name: next(iter(numbers.values()))}
    return {{"weights": "module_weights", "density": "module_densities"}[name]: dict(numbers)}


def _check_tokens(recipe: MergekitRecipe, base: Checkpoint, models: Sequence[Checkpoint]) -> None:
    """mergekit reorders other models' tokens as in the base, and drops added ones. Here they have to be the same."""
    wanted = tokens(base.path)
    for model in models:
        if tokens(model.path) not in ({}, wanted):
            raise RecipeError(
                f"{recipe.file}: tokenizer_source: base: wanted the tokens of {base.name} in {model.name}, got others"
            )


def _promoted(file: str, base: Checkpoint, models: Sequence[Checkpoint]) -> str | None:
    """The dtype that mergekit writes by default: the one that all inputs of a tensor promote to; None: the base's."""
    of_base = {key: stored.dtype for key, stored in base.tensors.items() if stored.dtype in FLOATS}
    stored = [{key: each.tensors[key].dtype for key in of_base.keys() & each.tensors.keys()} for each in models]
    wanted = {
        key: reduce(torch.promote_types, [each[key] for each in stored if key in each], of_base[key]) for key in of_base
    }
    if wanted == of_base:
        return None
    names = sorted({str(dtype).removeprefix("torch.") for dtype in wanted.values()})
    if len(names) > 1 or names[0] not in DTYPES:
        raise RecipeError(f"{file}: wanted a dtype for models that come in {', '.join(names)}, got none")
    return names[0]
