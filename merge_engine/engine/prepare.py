"""Before and at the merge of modules: what spans the model, and every module's merged task tensors."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from merge_engine.engine.backend import Backend, Group
from merge_engine.engine.joint import Joined
from merge_engine.engine.plan import Factors, ModulePlan, Plan, norms_of_tasks
from merge_engine.errors import about
from merge_engine.runtime.threads import ahead


class Preparation(NamedTuple):
    """What has to be known of the whole model before the first module can be merged, by side."""

    trims: dict[str, Any]  # thresholds of scope="model"
    tied: dict[str, int]  # what a tied vote elects

    def group(self, plan: Plan, modules: Sequence[ModulePlan], side: str, packed: Any) -> Group:
        """Modules that can be merged now."""
        return Group(plan, modules, side, packed, self.trims[side], self.tied[side])


class Loaded(NamedTuple):
    """A group of modules that has been read.

    group: the modules of the plan; modules: as they are merged, which differs where they are merged in their common
    spaces. factors: the tasks of each. packed: task tensors by side, none where the factors alone do. joined: of each
    module, where its task tensors depend on all adapters.
    """

    group: Sequence[ModulePlan]
    modules: Sequence[ModulePlan]
    factors: list[Factors]
    packed: dict[str, Any]
    joined: Sequence[Joined | None]


class Work(NamedTuple):
    """One module on its way from merging to recompression."""

    module: ModulePlan
    factors: Factors
    merged: dict[str, Tensor]  # by side
    joined: Joined | None = None

    def norms(self) -> tuple[float, ...]:
        """|tau_t|_F of the adapters as they are."""
        return norms_of_tasks(self.module, self.factors) if self.joined is None else self.joined.norms


def prepare(plan: Plan, backend: Backend, done: Callable[[int], object]) -> Preparation:
    """Sweep over all modules for what spans them: thresholds of scope="model", and the majority sign.

    `done` is told the elements covered.
    """
    trims: dict[str, Any] = {side: {} for side in plan.sides}
    if plan.spans_model:
        with about("scope='model'"):
            trims = {side: backend.model_trims(plan, side) for side in plan.sides}
        done(sum(module.cost for module in plan.mine))
    balance = dict.fromkeys(plan.sides, 1)
    if plan.rule.majority and plan.rule.elect != "none":
        balance = dict.fromkeys(plan.sides, 0)
        for loaded in ahead(lambda group: load_group(plan, backend, group), backend.groups(plan)):
            for side in plan.sides:
                group = Group(plan, loaded.modules, side, loaded.packed[side], trims[side])
                balance[side] += backend.vote_balance(group)
            done(sum(module.cost for module in loaded.group))
        totals = plan.ranks.sum(np.array([balance[side] for side in plan.sides]))
        balance = dict(zip(plan.sides, totals.tolist(), strict=True))
    return Preparation(trims, {side: 1 if total > 0 else -1 for side, total in balance.items()})


def merge_groups(plan: Plan, backend: Backend, ready: Preparation) -> Iterator[Work]:
    """Every module with its factors, and its merged task tensors where the factors alone do not do."""
    for works in merged_groups(plan, backend, ready):
        yield from works


def merged_groups(plan: Plan, backend: Backend, ready: Preparation) -> Iterator[list[Work]]:
    """The same, by the groups that are merged at once."""
    for loaded in ahead(lambda group: load_group(plan, backend, group), backend.groups(plan)):
        with about(names_of(loaded.group)):
            works = merge_loaded(plan, backend, loaded, ready)
        yield works


def merge_loaded(plan: Plan, backend: Backend, loaded: Loaded, ready: Preparation) -> list[Work]:
    """The modules of a group, merged."""
    merged = {
        side: backend.merge(ready.group(plan, loaded.modules, side, packed)) for side, packed in loaded.packed.items()
    }
    return works_of(loaded.group, loaded, merged)


def works_of(group: Sequence[ModulePlan], loaded: Loaded, merged: dict[str, list[Tensor]]) -> list[Work]:
    """The modules of a plan with what was loaded for it, or for one that differs in numbers only. merged: by side."""
    parts = zip(group, loaded.factors, loaded.joined, strict=True)
    return [
        Work(module, factors, {side: tensors[i] for side, tensors in merged.items()}, joined)
        for i, (module, factors, joined) in enumerate(parts)
    ]


def names_of(group: Sequence[ModulePlan]) -> str:
    """What to call a group of modules in a message."""
    return group[0].name + (f" and {len(group) - 1} more" if len(group) > 1 else "")


def load_group(
    plan: Plan, backend: Backend, group: Sequence[ModulePlan], bases: Sequence[Tensor | None] | None = None
) -> Loaded:
    """Read the modules of a group; bases: their tensors of the base model [M, N], where the merge goes into one."""
    bases = bases or [None] * len(group)
    joined = [plan.joined(module) for module in group]
    factors = [
        plan.read(module, base) if own is None else own.factors
        for module, base, own in zip(group, bases, joined, strict=True)
    ]
    by_factors = plan.by_factors and (bases[0] is None or plan.on_cores)  # a base is added in the pass over elements
    sides = () if by_factors else plan.sides
    modules = [plan.as_merged(module, own) for module, own in zip(group, joined, strict=True)]
    packed = {side: backend.pack(plan, modules, factors, side) for side in sides}
    return Loaded(group, modules, factors, packed, joined)


def work_of(plan: Plan) -> int:
    """Elements that a progress bar counts: one pass over all, and one more for each sweep before it."""
    sweeps = plan.spans_model + (plan.rule.majority and plan.rule.elect != "none")
    return sum(module.cost for module in plan.mine) * (1 + sweeps)
