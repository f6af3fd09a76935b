"""Merges tile by tile on the CPU, by compiled loops or torch's operators: one module at a time."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from merge_engine import rng, selection, tiled, tiles
from merge_engine.finetuned import Difference
from merge_engine.plan import ModulePlan, Plan, Task
from merge_engine.rule import make_rule
from merge_engine.tiles import Drop, KeepTile, Source, Trim

Trims = dict[tuple[str, int], Trim]  # by module and adapter


class TorchBackend:
    """See `ops.Backend`."""

    name = "torch"
    device = torch.device("cpu")

    def groups(self, plan: Plan) -> list[list[ModulePlan]]:
        return [[module] for module in plan.mine]

    def pack(self, plan: Plan, group: Sequence[ModulePlan], factors: Sequence[list[Any]], side: str) -> list[Source]:
        ((module,), (tasks,)) = group, factors
        return [_source(task, scaling, side) for task, scaling in zip(tasks, module.scalings, strict=True)]

    def model_trims(self, plan: Plan, side: str) -> Trims:
        trims: Trims = {}
        for number in range(len(plan.adapters)):
            sources = _AdapterSources(plan, number, side)
            kept, modules = plan.kept_of_model(number, side), sources.modules
            mine = [i for i, module in enumerate(modules) if plan.share is None or module.name in plan.share]
            found = selection.trims(sources, kept, plan.rule.trim_ties, mine=mine, total=plan.ranks.sum)
            trims.update({(modules[i].name, number): trim for i, trim in zip(mine, found, strict=True)})
        return trims

    def vote_balance(self, plan: Plan, group: Sequence[ModulePlan], packed: list[Source], side: str, trims: Any) -> int:
        (module,) = group
        return tiled.vote_balance(
            packed, module.weights_of(side), keeps_of(plan, module, packed, side, trims), plan.rule
        )

    def merge(
        self,
        plan: Plan,
        group: Sequence[ModulePlan],
        packed: list[Source],
        side: str,
        trims: Any,
        *,
        scale: float,
        tied: int,
        base: Sequence[Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> list[Tensor]:
        (module,) = group
        keeps = keeps_of(plan, module, packed, side, trims)
        options: dict[str, Any] = {"scale": scale, "tied": tied}
        if base is not None:
            looked_at = any(isinstance(source, tiles.Difference) for source in packed)
            options |= _onto(base[0], dtype, in_place=not looked_at)
        return [tiled.merge_deltas(packed, module.weights_of(side), keeps, plan.rule, **options)]

    def add_product(self, A: Tensor, B: Tensor, base: Tensor, dtype: torch.dtype) -> Tensor:
        source = tiles.Product(A, B, 1.0)
        return tiled.merge_deltas([source], [1.0], [None], make_rule("linear"), **_onto(base, dtype, in_place=True))


class _AdapterSources(Sequence[Source]):
    """One side of one adapter in all its modules, read whenever it is looked at."""

    def __init__(self, plan: Plan, number: int, side: str) -> None:
        self.plan, self.number, self.side = plan, number, side
        self.modules = plan.having(number)

    def __len__(self) -> int:
        return len(self.modules)

    def __getitem__(self, index: Any) -> Any:
        module = self.modules[index]
        task = self.plan.task(module, self.number)
        return _source(task, module.scalings[module.adapters.index(self.number)], self.side)


def _onto(base: Tensor, dtype: torch.dtype, *, in_place: bool) -> dict[str, Any]:
    """Where base + merged goes: into the base's own memory where it is of that dtype, and free."""
    return {"base": base, "out": base if in_place and base.dtype == dtype else torch.empty_like(base, dtype=dtype)}


def _source(task: Task, scaling: float, side: str) -> Source:
    if isinstance(task, Difference):
        return tiles.Difference(task.x, task.base)
    A, B = task
    return tiles.Product(A, B, scaling) if side == "delta" else tiles.Dense(A if side == "A" else B)


def keeps_of(plan: Plan, module: ModulePlan, sources: Sequence[Source], side: str, trims: Trims) -> list[KeepTile]:
    rule, keeps = plan.rule, list[KeepTile]()
    own = [rule.keep == "magnitude" and not plan.spans_model and density < 1 for density in module.densities]
    counts = [[rule.kept(density, sources[0].rows * sources[0].columns)] for density in compress(module.densities, own)]
    found = iter(selection.trims_of_each(list(compress(sources, own)), counts, rule.trim_ties))
    for number, source, density, is_own in zip(module.adapters, sources, module.densities, own, strict=True):
        keeps.append(next(found)[0] if is_own else keep(plan, module.name, number, source, density, side, trims))
    return keeps


def keep(plan: Plan, module: str, number: int, source: Source, density: float, side: str, trims: Trims) -> KeepTile:
    """What is kept of one adapter in one module, but for a trim with a threshold of its own."""
    rule = plan.rule
    if rule.keep == "all" or density >= 1:
        return None
    if plan.spans_model:
        return trims[module, number]
    drop = Drop(density, plan.recipe.seed, rng.stream_id(module, side), number)
    return replace(drop, factor=tiled.l1_factor(source, drop)) if rule.l1_rescale else drop
