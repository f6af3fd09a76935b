"""Runs a plan: reads ahead, merges module by module, recompresses, writes behind.

The four stages overlap. At most a constant number of merged deltas is in memory at a time, and what is written appears
whole or not at all.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merge_engine import lowrank, rng, tiled
from merge_engine.adapter import Adapter, open_adapter
from merge_engine.adapter_writer import AdapterWriter
from merge_engine.lowrank import LowRank
from merge_engine.pipeline import ahead
from merge_engine.place import place_folder
from merge_engine.plan import ModulePlan, Plan, make_plan
from merge_engine.recipe import Recipe
from merge_engine.tiled import Drop, KeepTile, Source, Trim

Factors = list[tuple[Tensor, Tensor]]  # (A [r, N], B [M, r]) of each adapter that has the module
Trims = dict[tuple[str, int, str], Trim]  # by side, adapter and module: thresholds that span modules
SIDES = {"delta": ("delta",), "factors": ("A", "B")}
MAX_RECOMPRESSIONS = 4  # at a time: each holds a merged delta


@dataclass(frozen=True)
class Merged:
    """A merged adapter: its factors if it was kept in memory, its folder if it was written.

    modules: {name: LowRank(A [k, N], B [M, k], energy)}, float32, delta = B @ A; empty if written to a folder.
    energy: {name: kept energy |B A|^2 / |merged delta|^2 of the cut to rank k}; 1.0 where nothing was cut.
    """

    plan: Plan
    path: Path | None
    energy: dict[str, float]
    total_energy: float
    modules: dict[str, LowRank] = field(default_factory=dict)


class Preparation(NamedTuple):
    """What has to be known of the whole model before the first module can be merged."""

    trims: Trims  # thresholds of scope="model"
    tied: dict[str, int]  # by side: what a tied vote elects


def merge(
    adapters: Sequence[str | Path | Adapter],
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: bool | None = None,
    **recipe: Any,
) -> Merged:
    """scale * method(w_1 t_1, ..., w_n t_n) for every module of the adapters, cut to a rank: one merged adapter.

    adapters: folders or hub ids (``user/repo``) of LoRA adapters as PEFT writes them.
    output: the folder to write, loadable by PEFT; it appears complete or not at all, and an existing one is refused
        unless overwrite. None keeps the result in memory.
    progress: a bar on standard error; None shows it on a terminal only.
    recipe: the fields of `Recipe`: method, weights, density, space, scale, election, scope, trim_ties, convention,
        seed, rank, energy, dtype.

    No base model is loaded, and no delta of an adapter is stored. Raises MergeError before anything is written.
    """
    asked = Recipe.from_mapping(recipe)
    opened = [adapter if isinstance(adapter, Adapter) else open_adapter(adapter) for adapter in adapters]
    return run(make_plan(opened, asked), output, overwrite=overwrite, progress=progress)


def run(
    plan: Plan, output: str | Path | None = None, *, overwrite: bool = False, progress: bool | None = None
) -> Merged:
    """Carry out a plan: see `merge`."""
    path = None if output is None else Path(output)
    place: AbstractContextManager[Path | None]
    place = nullcontext() if path is None else place_folder(path, overwrite, _output_bytes(plan))
    energy: dict[str, float] = {}
    kept: dict[str, LowRank] = {}
    norms = _Norms()
    with place as folder:
        writer = None if folder is None else _writer(plan, folder)
        try:
            for module, result in zip(plan.modules, merged_modules(plan, progress), strict=True):
                energy[module.name] = result.energy
                norms.add(result)
                if writer is None:
                    kept[module.name] = result
                else:
                    writer.add(module.name, result.A, result.B)
            if writer is not None:
                _finish(writer, plan, energy, norms.kept_energy)
        except BaseException:
            if writer is not None:
                writer.abandon()
            raise
    return Merged(plan, path, energy, norms.kept_energy, kept)


def merged_modules(plan: Plan, progress: bool | None = None) -> Iterator[LowRank]:
    """The merged factors of each of plan.modules, in order; reading, merging and recompressing overlap."""
    from tqdm import tqdm

    with tqdm(
        total=_work(plan), unit="element", unit_scale=True, disable=None if progress is None else not progress
    ) as bar:
        ready = prepare(plan, bar.update)
        read = ahead(lambda module: (module, _read(plan, module)), plan.modules)
        merged = ((module, factors, merge_sides(plan, module, factors, ready)) for module, factors in read)
        workers = min(torch.get_num_threads(), MAX_RECOMPRESSIONS)
        results = ahead(lambda work: recompress(plan, *work), merged, workers)
        for module, result in zip(plan.modules, results, strict=True):
            bar.update(module.cost)
            yield result


def prepare(plan: Plan, done: Callable[[int], object]) -> Preparation:
    """Sweep over all modules for what spans them: thresholds of scope="model", and the majority sign.

    Memory: one module's factors at a time, one histogram. `done` is told the elements covered.
    """
    trims: Trims = {}
    sides = SIDES[plan.recipe.space]
    if plan.rule.keep == "magnitude" and plan.rule.scope == "model":
        for number in range(len(plan.adapters)):
            modules = plan.having(number)
            density = modules[0].densities[modules[0].adapters.index(number)]
            for side in sides:
                spanning = _AdapterSources(plan, number, side)
                found = tiled.trims(spanning, plan.rule.kept(density, spanning.numel), plan.rule.trim_ties)
                trims.update({(side, number, module.name): trim for module, trim in zip(modules, found, strict=True)})
            done(sum(module.rows * module.columns for module in modules))
    ready = Preparation(trims, dict.fromkeys(sides, 1))
    if plan.rule.majority and plan.rule.elect != "none":
        balance = dict.fromkeys(sides, 0)
        for module, factors in ahead(lambda module: (module, _read(plan, module)), plan.modules):
            for side in sides:
                sources = _sources(module, factors, side)
                keeps = _keeps(plan, module, sources, side, ready)
                balance[side] += tiled.vote_balance(sources, _weights(module, side), keeps, plan.rule)
            done(module.cost)
        ready = Preparation(trims, {side: 1 if total > 0 else -1 for side, total in balance.items()})
    return ready


def merge_sides(plan: Plan, module: ModulePlan, factors: Factors, ready: Preparation) -> dict[str, Tensor]:
    """The merged task tensors of one module by side, float32; none where the factors alone say it all (linear, cat)."""
    if plan.recipe.method == "cat" or (plan.rule.keep == "all" and plan.recipe.space == "delta"):
        return {}
    merged = {}
    for side in SIDES[plan.recipe.space]:
        sources = _sources(module, factors, side)
        merged[side] = tiled.merge_deltas(
            sources,
            _weights(module, side),
            _keeps(plan, module, sources, side, ready),
            plan.rule,
            scale=1.0 if side == "A" else plan.recipe.scale,
            tied=ready.tied[side],
        )
    return merged


def recompress(plan: Plan, module: ModulePlan, factors: Factors, merged: dict[str, Tensor]) -> LowRank:
    """The factors of one module's result: stacked, cut by QR, or cut by subspace iteration."""
    recipe = plan.recipe
    strengths = [recipe.scale * w * s for w, s in zip(module.weights, module.scalings, strict=True)]
    As, Bs = [A.float() for A, _ in factors], [B.float() for _, B in factors]
    if recipe.method == "cat":
        return LowRank(torch.cat([A * x for A, x in zip(As, strengths, strict=True)]), torch.cat(Bs, dim=1), 1.0)
    if "delta" in merged:
        return lowrank.from_matrix(merged["delta"], torch.cat(As), module.rank, recipe.energy)
    if recipe.space == "factors":
        As, Bs, strengths = [merged["A"]], [merged["B"]], [1.0]
        if recipe.energy is None and module.rank >= len(As[0]):
            return LowRank(As[0], Bs[0], 1.0)
    return lowrank.from_products(As, Bs, strengths, module.rank, recipe.energy)


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

    @property
    def numel(self) -> int:
        """Elements of all of them together, from the headers."""
        parts = [self.adapter.modules[module.name] for module in self.modules]
        sizes = {
            "delta": lambda p: p.rows * p.columns,
            "A": lambda p: p.rank * p.columns,
            "B": lambda p: p.rows * p.rank,
        }
        return sum(sizes[self.side](part) for part in parts)


class _Norms:
    """Kept energy over all modules: sum |B A|^2 / sum |merged delta|^2."""

    def __init__(self) -> None:
        self.kept = self.total = 0.0

    def add(self, result: LowRank) -> None:
        norm = lowrank.product_norm(result.A, result.B) ** 2
        self.kept += norm
        self.total += norm / result.energy if result.energy > 0 else 0.0

    @property
    def kept_energy(self) -> float:
        return self.kept / self.total if self.total > 0 else 1.0


def _read(plan: Plan, module: ModulePlan) -> Factors:
    return [plan.adapters[number].factors(module.name) for number in module.adapters]


def _source(A: Tensor, B: Tensor, scaling: float, side: str) -> Source:
    return tiled.Product(A, B, scaling) if side == "delta" else tiled.Dense(A if side == "A" else B)


def _sources(module: ModulePlan, factors: Factors, side: str) -> list[Source]:
    return [_source(A, B, scaling, side) for (A, B), scaling in zip(factors, module.scalings, strict=True)]


def _weights(module: ModulePlan, side: str) -> list[float]:
    """The weights themselves; for factors sqrt(|weight * scaling|) on each side, with the sign on A."""
    if side == "delta":
        return list(module.weights)
    strengths = [weight * scaling for weight, scaling in zip(module.weights, module.scalings, strict=True)]
    roots = [math.sqrt(abs(strength)) for strength in strengths]
    return roots if side == "B" else [math.copysign(root, x) for root, x in zip(roots, strengths, strict=True)]


def _keeps(plan: Plan, module: ModulePlan, sources: Sequence[Source], side: str, ready: Preparation) -> list[KeepTile]:
    return [
        _keep(plan, module.name, number, source, density, side, ready)
        for number, source, density in zip(module.adapters, sources, module.densities, strict=True)
    ]


def _keep(
    plan: Plan, module: str, number: int, source: Source, density: float, side: str, ready: Preparation
) -> KeepTile:
    rule, numel = plan.rule, source.rows * source.columns
    if rule.keep == "all" or density >= 1:
        return None
    if rule.keep == "magnitude":
        spanning = ready.trims.get((side, number, module))
        return spanning or tiled.trims([source], rule.kept(density, numel), rule.trim_ties)[0]
    drop = Drop(density, plan.recipe.seed, rng.stream_id(module, side), number)
    return replace(drop, factor=tiled.l1_factor(source, drop)) if rule.l1_rescale else drop


def _work(plan: Plan) -> int:
    """Elements that the progress bar counts: one pass over all, and one more for each sweep before it."""
    rule, cost = plan.rule, sum(module.cost for module in plan.modules)
    sweeps = (rule.keep == "magnitude" and rule.scope == "model") + (rule.majority and rule.elect != "none")
    return cost * (1 + sweeps)


def _output_bytes(plan: Plan) -> int:
    return sum(module.rank * (module.rows + module.columns) for module in plan.modules) * plan.dtype.itemsize


def _writer(plan: Plan, folder: Path) -> AdapterWriter:
    described = {module.name: plan.adapters[module.adapters[0]].modules[module.name] for module in plan.modules}
    return AdapterWriter(folder, plan.adapters, described, plan.dtype)


def _finish(writer: AdapterWriter, plan: Plan, energy: dict[str, float], total: float) -> None:
    recipe = plan.recipe.as_dict()
    recipe["weights"] = list(plan.recipe.weights_for([adapter.name for adapter in plan.adapters]))
    modules = {
        module.name: {
            "energy": energy[module.name],
            "adapters": [plan.adapters[number].name for number in module.adapters],
        }
        for module in plan.modules
    }
    writer.finish(recipe, {"energy": total, "adapters": [str(a.path) for a in plan.adapters], "modules": modules})
