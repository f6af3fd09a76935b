"""Merges tile by tile on the CPU, by compiled loops or torch's operators: one module at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from merge_engine.cpu.keep import MergeSpec, Trim
from merge_engine.cpu.merge import merge_deltas, vote_balance
from merge_engine.cpu.merge_several import merge_several, working_bytes
from merge_engine.cpu.one_sweep import trim_and_merge
from merge_engine.cpu.select import trims as find_trims
from merge_engine.cpu.source import Dense, Product, Source
from merge_engine.cpu.source import Difference as DifferenceSource
from merge_engine.engine.backend import Group, Known
from merge_engine.engine.cpu_thresholds import find_keeps, only_thresholds
from merge_engine.engine.plan import ModulePlan, Plan, Task
from merge_engine.loops import door
from merge_engine.models.finetuned import Difference
from merge_engine.rules.rule import make_rule

Trims = dict[tuple[str, int], Trim]  # by module and adapter


class TorchBackend:
    """See `backend.Backend`."""

    name = "torch"
    device = torch.device("cpu")
    merges_several = True
    cuts_groups = False

    @property
    def identity(self) -> str:
        return self.name if door.installed() else f"{self.name} without Numba"

    def groups(self, plan: Plan) -> list[list[ModulePlan]]:
        if not plan.by_factors:
            door.loops(sum(module.cost for module in plan.mine))  # all that there is to do
        return [[module] for module in plan.mine]

    def pack(self, plan: Plan, group: Sequence[ModulePlan], factors: Sequence[list[Any]], side: str) -> list[Source]:
        ((module,), (tasks,)) = group, factors
        return [_source(task, scaling, side) for task, scaling in zip(tasks, module.scalings, strict=True)]

    def model_trims(self, plan: Plan, side: str) -> Trims:
        door.loops(sum(module.cost for module in plan.mine))
        trims: Trims = {}
        for number in range(len(plan.adapters)):
            sources = _AdapterSources(plan, number, side)
            kept, modules = plan.kept_of_model(number, side), sources.modules
            mine = [i for i, module in enumerate(modules) if plan.share is None or module.name in plan.share]
            found = find_trims(sources, kept, plan.rule.trim_ties, mine=mine, total=plan.ranks.sum)
            trims.update({(modules[i].name, number): trim for i, trim in zip(mine, found, strict=True)})
        return trims

    def vote_balance(self, group: Group) -> int:
        (spec,) = self.specs([group], [{} for _ in group.packed])
        return vote_balance(group.packed, spec.weights, spec.keeps, spec.rule)

    def merge(
        self,
        group: Group,
        *,
        scale: float = 1.0,
        base: Sequence[Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> list[Tensor]:
        if base is None and (trimmed := only_thresholds(group)):
            spec = MergeSpec(tuple(group.weights), (), group.plan.rule, group.tied)
            merged = trim_and_merge(group.packed, *trimmed, spec, scale)
            if merged is not None:
                return [merged]
        (spec,) = self.specs([group], [{} for _ in group.packed])
        onto: dict[str, Any] = {}
        if base is not None:
            looked_at = any(isinstance(source, DifferenceSource) for source in group.packed)
            onto = _onto(base[0], dtype, in_place=not looked_at)
        how = {"scale": scale, "tied": spec.tied, **onto}
        return [merge_deltas(group.packed, spec.weights, spec.keeps, spec.rule, **how)]

    def parts(self, merges: Sequence[Sequence[Group]]) -> list[list[int]]:
        return [[number] for number in range(len(merges))]

    def merge_together(self, groups: Sequence[Group]) -> list[list[Tensor]]:
        return [self.merge(group) for group in groups]

    def staged(self, tensor: Tensor) -> Tensor:
        return tensor

    def home(self, merged: Tensor) -> Callable[[], Tensor]:
        return lambda: merged

    def add_product(self, A: Tensor, B: Tensor, base: Tensor, dtype: torch.dtype) -> Tensor:
        source, onto = Product(A, B, 1.0), _onto(base, dtype, in_place=True)
        return merge_deltas([source], [1.0], [None], make_rule("linear"), **onto)

    def specs(self, groups: Sequence[Group], known: Sequence[Known]) -> list[MergeSpec]:
        keeps = find_keeps(groups, known)
        return [
            MergeSpec(tuple(group.weights), kept, group.plan.rule, group.tied)
            for group, kept in zip(groups, keeps, strict=True)
        ]

    def merge_several(self, packed: Sequence[Source], specs: Sequence[MergeSpec]) -> list[Tensor]:
        return merge_several(packed, specs)

    def working_bytes(self, adapters: int, results: int = 1) -> int:
        return working_bytes(adapters, results)


class _AdapterSources(Sequence[Source]):
    """One side of one adapter in all its modules, read whenever it is looked at."""

    def __init__(self, plan: Plan, number: int, side: str) -> None:
        self.plan, self.number, self.side = plan, number, side
        self.modules = plan.having(number)

    def __len__(self) -> int:
        return len(self.modules)

    def __getitem__(self, index: Any) -> Any:
        module = self.modules[index]
        joined, place = self.plan.joined(module), module.adapters.index(self.number)
        task = self.plan.task(module, self.number) if joined is None else joined.factors[place]
        return _source(task, self.plan.as_merged(module, joined).scalings[place], self.side)


def _onto(base: Tensor, dtype: torch.dtype, *, in_place: bool) -> dict[str, Any]:
    """Where base + merged goes: into the base's own memory where it is of that dtype, and free."""
    return {"base": base, "out": base if in_place and base.dtype == dtype else torch.empty_like(base, dtype=dtype)}


def _source(task: Task, scaling: float, side: str) -> Source:
    if isinstance(task, Difference):
        return DifferenceSource(task.x, task.base)
    A, B = task
    return Product(A, B, scaling) if side == "delta" else Dense(A if side == "A" else B)
