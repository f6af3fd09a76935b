"""What is to be done, before anything is done: modules, adapters, shapes, ranks, densities, and every check."""

import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_engine.engine.joint import Joined, Joint, Keeper, LastFew
from merge_engine.errors import AdapterError, RecipeError
from merge_engine.formats.adapter import Adapter, Module, common_dtype
from merge_engine.formats.biases import BIAS
from merge_engine.formats.experts import check_experts
from merge_engine.formats.extras import shared_extras
from merge_engine.formats.families import check_one_family
from merge_engine.lowrank.small_svd import product_norm
from merge_engine.models.finetuned import Difference, Finetuned
from merge_engine.rules.factor_weights import factor_weights
from merge_engine.rules.methods import METHODS
from merge_engine.rules.patterns import check_blocks
from merge_engine.rules.recipe import DTYPES, Recipe
from merge_engine.rules.rule import Rule
from merge_engine.runtime.processes import ALONE, Ranks

Factors = list[tuple[Tensor, Tensor]]  # (A [r, N], B [M, r]) of each adapter that has a module
Task = tuple[Tensor, Tensor] | Difference  # what one input brings to a module: factors, or finetuned - base


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
        return factor_weights([w * s for w, s in zip(self.weights, self.scalings, strict=True)], side)


@dataclass(frozen=True)
class Plan:
    """A recipe bound to its adapters (or full models in their place); modules in name order.

    joint: where task tensors depend on all adapters of a module: `balance`, and the spaces that they share.
    ranks, share: the processes that work on it together, and the names of the modules that are this one's; None: all.
    """

    adapters: tuple[Adapter | Finetuned, ...]
    recipe: Recipe
    rule: Rule
    modules: tuple[ModulePlan, ...]
    dtype: torch.dtype
    joint: Joint | None = None
    ranks: Ranks = ALONE
    share: frozenset[str] | None = None

    @property
    def weights(self) -> tuple[float, ...]:
        """One weight for each adapter, in the whole model: those of the recipe, or 1 each."""
        return self.recipe.weights_for([source.name for source in self.adapters])

    @property
    def mine(self) -> tuple[ModulePlan, ...]:
        """The modules that this process works on."""
        return tuple(module for module in self.modules if self.share is None or module.name in self.share)

    @property
    def sides(self) -> tuple[str, ...]:
        """The kinds of task tensors that a module has: its deltas, or all A and all B."""
        return ("A", "B") if self.recipe.space == "factors" else ("delta",)

    @property
    def inputs(self) -> list[Path]:
        """The folders that are merged."""
        return [source.model.path if isinstance(source, Finetuned) else source.path for source in self.adapters]

    @property
    def stacks(self) -> bool:
        """Whether the factors are put side by side, as they are."""
        return METHODS[self.recipe.method].kind == "stacked"

    @property
    def on_cores(self) -> bool:
        """Whether the method is a function of the modules' small cores."""
        return METHODS[self.recipe.method].kind == "core"

    @property
    def by_factors(self) -> bool:
        """Whether the result is made from the factors alone, with no pass over the elements of the deltas."""
        rule = self.rule
        adds_up = rule.keep == "all" and rule.elect == "none" and rule.combine == "sum"
        return self.stacks or self.on_cores or (adds_up and self.recipe.space != "factors")

    @property
    def lifts(self) -> bool:
        """Whether deltas are merged as small matrices in their common spaces, and what is merged is lifted back."""
        return self.recipe.space in ("core", "knots") and not self.by_factors

    @property
    def spans_model(self) -> bool:
        """Whether a trim has one threshold for all modules of an adapter."""
        return self.rule.keep == "magnitude" and self.rule.scope == "model"

    def having(self, adapter: int) -> list[ModulePlan]:
        """The modules that this adapter takes part in."""
        return [module for module in self.modules if adapter in module.adapters]

    def read(self, module: ModulePlan, base: Tensor | None = None) -> list[Any]:
        """The `Task` of each adapter that has the module: joined, or in the dtypes they are stored in; see `task`."""
        joined = self.joined(module)
        if joined is not None:
            return list(joined.factors)
        return [self.task(module, number, base) for number in module.adapters]

    def task(self, module: ModulePlan, number: int, base: Tensor | None = None) -> Task:
        """One adapter's own factors, or one full model's difference from `base` [M, N], which is read if not given."""
        source = self.adapters[number]
        return source.difference(module.name, base) if isinstance(source, Finetuned) else source.factors(module.name)

    def joined(self, module: ModulePlan) -> Joined | None:
        """The module's task tensors, where they depend on all of its adapters."""
        return None if self.joint is None else self.joint.module(module.name)

    def as_merged(self, module: ModulePlan, joined: Joined | None) -> ModulePlan:
        """The module in the shape in which it is merged: in a space that its adapters share it is smaller."""
        if joined is None or joined.space is None:
            return module
        rows, columns = joined.shape
        return replace(module, rows=rows, columns=columns, scalings=(1.0,) * len(module.scalings))

    @property
    def view(self) -> Hashable:
        """In what way task tensors are not the adapters' own."""
        return self.recipe.balance, self.recipe.space if self.lifts else None

    def kept_of_model(self, adapter: int, side: str) -> int:
        """How many elements of this adapter a trim over the whole model keeps, from the headers."""
        modules = self.having(adapter)
        density = modules[0].densities[modules[0].adapters.index(adapter)]
        if self.joint is not None and self.lifts:
            return self.rule.kept(density, sum(math.prod(self.joint.shape(module.name)) for module in modules))
        parts = [self.adapters[adapter].modules[module.name] for module in modules]
        if side == "delta":
            numel = sum(part.rows * part.columns for part in parts)
        else:
            numel = sum(part.rank * (part.columns if side == "A" else part.rows) for part in parts)
        return self.rule.kept(density, numel)


def norms_of_tasks(module: ModulePlan, tasks: Sequence[Task]) -> tuple[float, ...]:
    """|tau_t|_F of each input in float64: of s B A, or of finetuned - base."""
    return tuple(_norm(task, scaling) for task, scaling in zip(tasks, module.scalings, strict=True))


def _norm(task: Task, scaling: float) -> float:
    if isinstance(task, Difference):
        difference = task.x.float() - task.base.float()
        return float(torch.linalg.vector_norm(difference, dtype=torch.float64))
    return abs(scaling) * product_norm(*task)


def make_plan(
    adapters: Sequence[Adapter | Finetuned], recipe: Recipe, joint: Callable[[Plan], Joint | None] | None = None
) -> Plan:
    """Check that the adapters can be merged by the recipe, and say module by module how.

    Reads the adapters' headers, and their values once, to refuse NaN and Inf; those of full models are checked when
    they are merged, since reading them takes as long as merging them. joint: as `make_joint`. Raises RecipeError or
    AdapterError with subject, wanted and got; warns (UserWarning) where adapters name different base models.
    """
    if not adapters:
        raise RecipeError("adapters: wanted at least one, got none")
    names = [adapter.name for adapter in adapters]
    rule = recipe.rule()
    if rule.min_tasks > len(adapters):  # nothing would stay
        raise RecipeError(f"min_tasks: wanted at most {len(adapters)}, one for each input, got {rule.min_tasks}")
    only_adapters = [adapter for adapter in adapters if not isinstance(adapter, Finetuned)]
    check_one_family(only_adapters)
    for adapter in only_adapters:
        adapter.refuse_dora()
    _warn_of_different_bases(only_adapters)
    shared_extras(only_adapters, recipe.saved)
    check_experts(_owned(only_adapters))
    if recipe.block_weights is not None:
        check_blocks(recipe.block_weights, names, [adapter.modules for adapter in adapters])
    modules = tuple(
        _plan_module(name, adapters, recipe)
        for name in sorted({module for adapter in adapters for module in adapter.modules})
    )
    _check_vectors(adapters, recipe)
    if rule.keep == "magnitude" and rule.scope == "model":
        for number in range(len(adapters)):
            _check_one_density(number, names, modules)
    for adapter in only_adapters:
        adapter.check_finite()
    stored = {module.dtype for adapter in adapters for module in adapter.modules.values()}
    dtype = DTYPES[recipe.dtype] if recipe.dtype else common_dtype(stored)
    plan = Plan(tuple(adapters), recipe, rule, modules, dtype)
    return replace(plan, joint=(joint or make_joint)(plan))


def make_joint(plan: Plan, keep: Keeper | None = None) -> Joint | None:
    """The joint task tensors of a plan, if it has any; keep: where they are kept.

    With a threshold or a majority over the whole model all modules are kept: each is looked at several times.
    """
    if plan.view == (None, None):
        return None
    adapters = [adapter for adapter in plan.adapters if isinstance(adapter, Adapter)]
    again = plan.spans_model or plan.rule.majority
    space = plan.recipe.space if plan.lifts else None
    return Joint(adapters, plan.recipe.balance, space, keep or (LastFew(None) if again else None))


def _plan_module(name: str, adapters: Sequence[Adapter | Finetuned], recipe: Recipe) -> ModulePlan:
    having = [number for number, adapter in enumerate(adapters) if name in adapter.modules]
    parts = [adapters[number].modules[name] for number in having]
    stacks = METHODS[recipe.method].kind == "stacked"
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
        if recipe.space == "factors" and not stacks and part.rank != first.rank:
            raise AdapterError(
                f"{owner}: {name} has rank {part.rank}, wanted {first.rank} as in {first_owner}: "
                "factors of different ranks cannot be merged side by side; space='delta' can"
            )
    ranks = sum(part.rank for part in parts)
    if stacks:
        rank = ranks
    elif recipe.rank == "auto":
        rank = first.rank if recipe.space == "factors" else min(ranks, first.rows, first.columns)
    else:
        rank = min(recipe.rank, first.rows, first.columns)
    names = [adapter.name for adapter in adapters]
    weights, densities = recipe.weights_for(names, name), recipe.densities_for(name, names)
    recipe.gain_for(name)  # raises RecipeError where a table has none
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


def _check_vectors(adapters: Sequence[Adapter | Finetuned], recipe: Recipe) -> None:
    """Refuse what takes matrices apart, where an adapter has a bias, which is a vector."""
    having = [each.name for each in adapters for module in each.modules.values() if module.kind == BIAS]
    if not having:
        return
    what = f"{having[0]} has lora_bias, which is a vector"
    if METHODS[recipe.method].kind == "core":
        known = ", ".join(name for name, row in METHODS.items() if row.kind != "core")
        raise RecipeError(f"method: {what}; wanted one of {known}, got {recipe.method}")
    if recipe.space != "delta":
        raise RecipeError(f"space: {what}; wanted delta, got {recipe.space}")
    if recipe.balance is not None:
        raise RecipeError(f"balance: {what}; wanted none, got {recipe.balance}")


def _owned(adapters: Sequence[Adapter]) -> dict[str, list[tuple[str, Module]]]:
    """{module: (adapter, its module) of all that have it}."""
    owned: dict[str, list[tuple[str, Module]]] = {}
    for adapter in adapters:
        for name, module in adapter.modules.items():
            owned.setdefault(name, []).append((adapter.name, module))
    return owned


def _warn_of_different_bases(adapters: Sequence[Adapter]) -> None:
    for adapter in adapters[1:]:
        first = adapters[0]
        if adapter.base_model and first.base_model and adapter.base_model != first.base_model:
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
