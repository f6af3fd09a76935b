"""Merges by the tiled torch operators: one module at a time, on the CPU."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from merge_engine import rng, tiled
from merge_engine.plan import Factors, ModulePlan, Plan
from merge_engine.tiled import Drop, KeepTile, Source, Trim

Trims = dict[tuple[str, int], Trim]  # by module and adapter


class TorchBackend:
    """See `ops.Backend`."""

    name = "torch"
    device = torch.device("cpu")

    def groups(self, plan: Plan) -> list[list[ModulePlan]]:
        return [[module] for module in plan.modules]

    def pack(self, plan: Plan, group: Sequence[ModulePlan], factors: Sequence[Factors], side: str) -> list[Source]:
        ((module,), (pairs,)) = group, factors
        return [_source(A, B, scaling, side) for (A, B), scaling in zip(pairs, module.scalings, strict=True)]

    def model_trims(self, plan: Plan, side: str) -> Trims:
        trims: Trims = {}
        for number in range(len(plan.adapters)):
            sources = _AdapterSources(plan, number, side)
            found = tiled.trims(sources, plan.kept_of_model(number, side), plan.rule.trim_ties)
            trims.update({(module.name, number): trim for module, trim in zip(sources.modules, found, strict=True)})
        return trims

    def vote_balance(self, plan: Plan, group: Sequence[ModulePlan], packed: list[Source], side: str, trims: Any) -> int:
        (module,) = group
        return tiled.vote_balance(packed, module.weights_of(side), _keeps(plan, module, packed, side, trims), plan.rule)

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
    ) -> list[Tensor]:
        (module,) = group
        keeps = _keeps(plan, module, packed, side, trims)
        return [tiled.merge_deltas(packed, module.weights_of(side), keeps, plan.rule, scale=scale, tied=tied)]


class _AdapterSources(Sequence[Source]):
    """One side of one adapter in all its modules, read whenever it is looked at."""

    def __init__(self, plan: Plan, number: int, side: str) -> None:
        self.adapter, self.number, self.side = plan.adapters[number], number, side
        self.modules = plan.having(number)

    def __len__(self) -> int:
        return len(self.modules)

    def __getitem__(self, index: Any) -> Any:
        module = self.modules[index]
        A, B = self.adapter.factors(module.name)
        return _source(A, B, module.scalings[module.adapters.index(self.number)], self.side)


def _source(A: Tensor, B: Tensor, scaling: float, side: str) -> Source:
    return tiled.Product(A, B, scaling) if side == "delta" else tiled.Dense(A if side == "A" else B)


def _keeps(plan: Plan, module: ModulePlan, sources: Sequence[Source], side: str, trims: Trims) -> list[KeepTile]:
    return [
        _keep(plan, module.name, number, source, density, side, trims)
        for number, source, density in zip(module.adapters, sources, module.densities, strict=True)
    ]


def _keep(plan: Plan, module: str, number: int, source: Source, density: float, side: str, trims: Trims) -> KeepTile:
    rule = plan.rule
    if rule.keep == "all" or density >= 1:
        return None
    if plan.spans_model:
        return trims[module, number]
    if rule.keep == "magnitude":
        return tiled.trims([source], rule.kept(density, source.rows * source.columns), rule.trim_ties)[0]
    drop = Drop(density, plan.recipe.seed, rng.stream_id(module, side), number)
    return replace(drop, factor=tiled.l1_factor(source, drop)) if rule.l1_rescale else drop
