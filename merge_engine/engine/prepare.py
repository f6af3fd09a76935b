"""Before and at the merge of modules: what spans the model, and every module's merged task tensors."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from merge_engine.engine.backend import Backend, Group
from merge_engine.engine.plan import Factors, ModulePlan, Plan
from merge_engine.errors import about
from merge_engine.runtime.threads import ahead


class Preparation(NamedTuple):
    """What has to be known of the whole model before the first module can be merged, by side."""

    trims: dict[str, Any]  # thresholds of scope="model"
    tied: dict[str, int]  # what a tied vote elects

    def group(self, plan: Plan, modules: Sequence[ModulePlan], side: str, packed: Any) -> Group:
        """Modules that can be merged now."""
        return Group(plan, modules, side, packed, self.trims[side], self.tied[side])


class Work(NamedTuple):
    """One module on its way from merging to recompression."""

    module: ModulePlan
    factors: Factors
    merged: dict[str, Tensor]  # by side


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
        for group, _, packed in ahead(lambda group: load_group(plan, backend, group), backend.groups(plan)):
            for side in plan.sides:
                balance[side] += backend.vote_balance(Group(plan, group, side, packed[side], trims[side]))
            done(sum(module.cost for module in group))
        totals = plan.ranks.sum(np.array([balance[side] for side in plan.sides]))
        balance = dict(zip(plan.sides, totals.tolist(), strict=True))
    return Preparation(trims, {side: 1 if total > 0 else -1 for side, total in balance.items()})


def merge_groups(plan: Plan, backend: Backend, ready: Preparation) -> Iterator[Work]:
    """Every module with its factors, and its merged task tensors where the factors alone do not say it all."""
    for group, factors, packed in ahead(lambda group: load_group(plan, backend, group), backend.groups(plan)):
        with about(names_of(group)):
            merged = {side: backend.merge(ready.group(plan, group, side, packed[side])) for side in packed}
        for i, module in enumerate(group):
            yield Work(module, factors[i], {side: tensors[i] for side, tensors in merged.items()})


def names_of(group: Sequence[ModulePlan]) -> str:
    """What to call a group of modules in a message."""
    return group[0].name + (f" and {len(group) - 1} more" if len(group) > 1 else "")


def load_group(
    plan: Plan, backend: Backend, group: Sequence[ModulePlan]
) -> tuple[Sequence[ModulePlan], list[Factors], dict[str, Any]]:
    """The modules of a group, their factors, and their task tensors by side where the factors alone do not do."""
    factors = [plan.read(module) for module in group]
    sides = () if plan.by_factors else plan.sides
    return group, factors, {side: backend.pack(plan, group, factors, side) for side in sides}


def work_of(plan: Plan) -> int:
    """Elements that a progress bar counts: one pass over all, and one more for each sweep before it."""
    sweeps = plan.spans_model + (plan.rule.majority and plan.rule.elect != "none")
    return sum(module.cost for module in plan.mine) * (1 + sweeps)
