"""What is to be done, before anything is done: modules, adapters, shapes, ranks, densities, and every check."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from merge_engine.adapter import Adapter, shared_extras
from merge_engine.errors import AdapterError, RecipeError
from merge_engine.recipe import DTYPES, Recipe
from merge_engine.rule import Rule

Factors = list[tuple[Tensor, Tensor]]  # (A [r, N], B [M, r]) of each adapter that has a module


@dataclass(frozen=True)
class ModulePlan:
    """One module of the result: delta [rows, columns], from the adapters (by number) that have it."""

    name: str
    rows: int
    columns: int
    adapters: tuple[int, ...]
    weights: tuple[float, ...]
    scalings: tuple[float, ...]
    densities: tuple[float, ...]
    rank: int  # of the result, at most

    @property
    def cost(self) -> int:
        """Elements to be computed: M N for each adapter."""
        return self.rows * self.columns * len(self.adapters)

    def weights_of(self, side: str) -> list[float]:
        """What each task tensor of a side counts: w for a delta; for factors sqrt(|w s|) each, with the sign on A."""
        if side == "delta":
            return list(self.weights)
        strengths = [weight * scaling for weight, scaling in zip(self.weights, self.scalings, strict=True)]
        roots = [math.sqrt(abs(strength)) for strength in strengths]
        return roots if side == "B" else [math.copysign(root, x) for root, x in zip(roots, strengths, strict=True)]


@dataclass(frozen=True)
class Plan:
    """A recipe bound to its adapters; modules in name order."""

    adapters: tuple[Adapter, ...]
    recipe: Recipe
    rule: Rule
    modules: tuple[ModulePlan, ...]
    dtype: torch.dtype

    @property
    def sides(self) -> tuple[str, ...]:
        """The kinds of task tensors that a module has: its deltas, or all A and all B."""
        return ("delta",) if self.recipe.space == "delta" else ("A", "B")

    @property
    def spans_model(self) -> bool:
        """Whether a trim has one threshold for all modules of an adapter."""
        return self.rule.keep == "magnitude" and self.rule.scope == "model"

    def having(self, adapter: int) -> list[ModulePlan]:
        """The modules that this adapter takes part in."""
        return [module for module in self.modules if adapter in module.adapters]

    def read(self, module: ModulePlan) -> Factors:
        """The factors of each adapter that has the module, in the dtype they are stored in."""
        return [self.adapters[number].factors(module.name) for number in module.adapters]

    def kept_of_model(self, adapter: int, side: str) -> int:
        """How many elements of this adapter a trim over the whole model keeps, from the headers."""
        modules = self.having(adapter)
        parts = [self.adapters[adapter].modules[module.name] for module in modules]
        if side == "delta":
            numel = sum(part.rows * part.columns for part in parts)
        else:
            numel = sum(part.rank * (part.columns if side == "A" else part.rows) for part in parts)
        return self.rule.kept(modules[0].densities[modules[0].adapters.index(adapter)], numel)


def make_plan(adapters: Sequence[Adapter], recipe: Recipe) -> Plan:
    """Check that the adapters can be merged by the recipe, and say module by module how.

    Reads the adapters' headers, and their values once, to refuse NaN and Inf. Raises RecipeError or AdapterError with
    subject, wanted and got; warns (UserWarning) where adapters name different base models.
    """
    if not adapters:
        raise RecipeError("adapters: wanted at least one, got none")
    names = [adapter.name for adapter in adapters]
    weights = recipe.weights_for(names)
    rule = recipe.rule()
    _warn_of_different_bases(adapters)
    shared_extras(adapters)
    modules = tuple(
        _plan_module(name, adapters, weights, recipe)
        for name in sorted({module for adapter in adapters for module in adapter.modules})
    )
    if rule.keep == "magnitude" and rule.scope == "model":
        for number in range(len(adapters)):
            _check_one_density(number, names, modules)
    for adapter in adapters:
        adapter.check_finite()
    dtype = DTYPES[recipe.dtype] if recipe.dtype else _common_dtype(adapters)
    return Plan(tuple(adapters), recipe, rule, modules, dtype)


def _plan_module(name: str, adapters: Sequence[Adapter], weights: Sequence[float], recipe: Recipe) -> ModulePlan:
    having = [number for number, adapter in enumerate(adapters) if name in adapter.modules]
    parts = [adapters[number].modules[name] for number in having]
    first, first_owner = parts[0], adapters[having[0]].name
    for number, part in zip(having, parts, strict=True):
        owner = adapters[number].name
        if (part.kind, part.rows, part.columns) != (first.kind, first.rows, first.columns) or (
            part.a_shape[1:] != first.a_shape[1:]
        ):
            raise AdapterError(
                f"{owner}: {name} is {part.kind} [{part.rows}, {part.columns}], "
                f"wanted {first.kind} [{first.rows}, {first.columns}] as in {first_owner}"
            )
        if recipe.space == "factors" and recipe.method != "cat" and part.rank != first.rank:
            raise AdapterError(
                f"{owner}: {name} has rank {part.rank}, wanted {first.rank} as in {first_owner}: "
                "factors of different ranks cannot be merged side by side; space='delta' can"
            )
    ranks = sum(part.rank for part in parts)
    if recipe.method == "cat":
        rank = ranks
    elif recipe.rank == "auto":
        rank = first.rank if recipe.space == "factors" else min(ranks, first.rows, first.columns)
    else:
        rank = min(recipe.rank, first.rows, first.columns)
    densities = recipe.densities_for(name, [adapter.name for adapter in adapters])
    return ModulePlan(
        name=name,
        rows=first.rows,
        columns=first.columns,
        adapters=tuple(having),
        weights=tuple(weights[number] for number in having),
        scalings=tuple(part.scaling for part in parts),
        densities=tuple(densities[number] for number in having),
        rank=rank,
    )


def _warn_of_different_bases(adapters: Sequence[Adapter]) -> None:
    first = adapters[0]
    for adapter in adapters[1:]:
        if adapter.base_model != first.base_model:
            warnings.warn(
                f"{adapter.name} was trained on {adapter.base_model}, {first.name} on {first.base_model}: "
                "adapters of different base models rarely merge well",
                stacklevel=4,
            )


def _check_one_density(number: int, names: Sequence[str], modules: Sequence[ModulePlan]) -> None:
    densities = {module.densities[module.adapters.index(number)] for module in modules if number in module.adapters}
    if len(densities) > 1:
        raise RecipeError(
            f"density: scope='model' has one threshold for all of {names[number]}, wanted one density, "
            f"got {', '.join(map(str, sorted(densities)))}"
        )


def _common_dtype(adapters: Sequence[Adapter]) -> torch.dtype:
    return reduce(torch.promote_types, (module.dtype for adapter in adapters for module in adapter.modules.values()))
