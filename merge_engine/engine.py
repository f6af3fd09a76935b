"""Runs a plan: reads ahead, merges module by module, recompresses, writes behind.

The four stages overlap. At most a constant number of merged deltas is in memory at a time, and what is written appears
whole or not at all.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from merge_engine import lowrank, ops
from merge_engine.adapter import Adapter, open_adapters
from merge_engine.adapter_writer import AdapterWriter
from merge_engine.errors import RecipeError, about
from merge_engine.finetuned import Finetuned
from merge_engine.lowrank import LowRank, Stack, first_space
from merge_engine.ops import Backend
from merge_engine.passes import finite
from merge_engine.pipeline import ahead
from merge_engine.place import place_folder
from merge_engine.plan import Factors, ModulePlan, Plan, make_plan
from merge_engine.recipe import Recipe

MAX_RECOMPRESSIONS = 4  # at a time: each holds a merged delta
WIDEST_START = 256  # rows that an iteration starts from, unless the rank asked for wants more

Loaded = tuple[list[ModulePlan], list[Factors], dict[str, Any]]  # a group, its factors, and these packed by side


@dataclass(frozen=True)
class Merged:
    """A merged adapter: its factors if it was kept in memory, its folder if it was written.

    modules: {name: LowRank(A [k, N], B [M, k], energy)}, float32, delta = B @ A; empty if written to a folder.
    energy: {name: kept energy |B A|^2 / |merged delta|^2 of the cut to rank k}; 1.0 where nothing was cut.
    ranks: {name: k}.
    """

    plan: Plan = field(repr=False)
    path: Path | None
    energy: dict[str, float] = field(repr=False)
    total_energy: float
    modules: dict[str, LowRank] = field(default_factory=dict, repr=False)
    ranks: dict[str, int] = field(default_factory=dict, repr=False)


class Preparation(NamedTuple):
    """What has to be known of the whole model before the first module can be merged, by side."""

    trims: dict[str, Any]  # thresholds of scope="model"
    tied: dict[str, int]  # what a tied vote elects


class Work(NamedTuple):
    """One module on its way from merging to recompression."""

    module: ModulePlan
    factors: Factors
    merged: dict[str, Tensor]  # by side


def merge(
    adapters: Sequence[str | Path | Adapter],
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: bool | None = None,
    backend: str | None = None,
    **recipe: Any,
) -> Merged:
    """scale * method(w_1 t_1, ..., w_n t_n) for every module of the adapters, cut to a rank: one merged adapter.

    adapters: folders or hub ids (``user/repo``) of LoRA adapters as PEFT writes them.
    output: the folder to write, loadable by PEFT; it appears complete or not at all, and an existing one is refused
        unless overwrite. None keeps the result in memory.
    progress: a bar on standard error; None shows it on a terminal only.
    backend: "triton", "torch", or "auto" (Triton on a GPU, torch elsewhere); None: as MERGE_ENGINE_BACKEND says.
    recipe: the fields of `Recipe`: method, weights, density, space, scale, election, scope, trim_ties, convention,
        seed, rank, energy, dtype.

    No base model is loaded, and no delta of an adapter is stored. Raises MergeError before anything is written.
    """
    asked = Recipe.from_mapping(recipe)
    opened = open_adapters(adapters)
    chosen = ops.choose(backend)
    return run(make_plan(opened, asked), output, backend=chosen, overwrite=overwrite, progress=progress)


def run(
    plan: Plan,
    output: str | Path | None = None,
    *,
    backend: Backend,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Merged:
    """Carry out a plan: see `merge`."""
    with output_of(plan, backend, None if output is None else Path(output), overwrite) as result:
        for name, factors in merged_modules(plan, backend, progress):
            result.add(name, factors)
    return result.merged


class Finished(NamedTuple):
    """One module of the result: its factors, on the CPU, and what |B A|_F^2 is before they are scaled."""

    factors: LowRank
    squared_norm: float


class Output:
    """What a merge makes, module by module: kept, or written into a folder."""

    def __init__(self, plan: Plan, backend: Backend, path: Path | None, folder: Path | None) -> None:
        self.plan, self.backend, self.path = plan, backend, path
        self.writer = None if folder is None else _writer(plan, folder)
        self.energy: dict[str, float] = {}
        self.ranks: dict[str, int] = {}
        self.kept: dict[str, LowRank] = {}
        self.norms = _Norms()

    def add(self, name: str, result: Finished) -> None:
        """Take one module's factors, in any order."""
        A, B, energy = result.factors
        self.energy[name], self.ranks[name] = energy, len(A)
        self.norms.add(result.squared_norm, energy)
        if self.writer is None:
            self.kept[name] = result.factors
        else:
            self.writer.add(name, A, B)

    def finish(self) -> None:
        """Complete the folder: every module is there."""
        if self.writer is not None:
            _finish(self.writer, self.plan, self.backend, self.energy, self.norms.kept_energy)

    def abandon(self) -> None:
        if self.writer is not None:
            self.writer.abandon()

    @property
    def merged(self) -> Merged:
        energy, modules = dict(sorted(self.energy.items())), dict(sorted(self.kept.items()))
        ranks = dict(sorted(self.ranks.items()))
        return Merged(self.plan, self.path, energy, self.norms.kept_energy, modules, ranks)


@contextmanager
def output_of(plan: Plan, backend: Backend, path: Path | None, overwrite: bool = False) -> Iterator[Output]:
    """The output of a plan: the folder appears when the block ends, and does not where it raises."""
    place: AbstractContextManager[Path | None]
    place = nullcontext() if path is None else place_folder(path, overwrite, output_bytes(plan), inputs=plan.inputs)
    with place as folder:
        output = Output(plan, backend, path, folder)
        try:
            yield output
            output.finish()
        except BaseException:
            output.abandon()
            raise


def merged_modules(plan: Plan, backend: Backend, progress: bool | None = None) -> Iterator[tuple[str, Finished]]:
    """(name, result) of every module; reading, merging and recompressing overlap."""
    from tqdm import tqdm

    shown = None if progress is None else not progress
    with tqdm(total=work_of(plan), unit="element", unit_scale=True, disable=shown) as bar:
        ready = prepare(plan, backend, bar.update)
        workers = min(torch.get_num_threads(), MAX_RECOMPRESSIONS)
        for module, result in ahead(
            lambda work: recompress(plan, backend, work), merge_groups(plan, backend, ready), workers
        ):
            bar.update(module.cost)
            yield module.name, result


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
        for group, _, packed in ahead(lambda group: _load(plan, backend, group), backend.groups(plan)):
            for side in plan.sides:
                balance[side] += backend.vote_balance(plan, group, packed[side], side, trims[side])
            done(sum(module.cost for module in group))
        totals = plan.ranks.sum(np.array([balance[side] for side in plan.sides]))
        balance = dict(zip(plan.sides, totals.tolist(), strict=True))
    return Preparation(trims, {side: 1 if total > 0 else -1 for side, total in balance.items()})


def merge_groups(plan: Plan, backend: Backend, ready: Preparation) -> Iterator[Work]:
    """Every module with its factors, and its merged task tensors where the factors alone do not say it all."""
    for group, factors, packed in ahead(lambda group: _load(plan, backend, group), backend.groups(plan)):
        with about(names_of(group)):
            merged = {
                side: backend.merge(
                    plan,
                    group,
                    packed[side],
                    side,
                    ready.trims[side],
                    scale=1.0,  # the recipe's comes last: see `scaled`
                    tied=ready.tied[side],
                )
                for side in packed
            }
        for i, module in enumerate(group):
            yield Work(module, factors[i], {side: tensors[i] for side, tensors in merged.items()})


def recompress(plan: Plan, backend: Backend, work: Work) -> tuple[ModulePlan, Finished]:
    """One module of the result."""
    return work.module, scaled(finished(cut(plan, backend, work)), plan.recipe.scale, work.module.name)


def cut(
    plan: Plan,
    backend: Backend,
    work: Work,
    stack: Callable[[Sequence[Tensor], Sequence[Tensor]], Stack] = Stack,
    space: Callable[[Tensor, tuple[int, int], int], Tensor] = first_space,
) -> LowRank:
    """The factors of one module's result before `scaled`: stacked, cut by QR, or cut by subspace iteration.

    stack, space: make what depends on the factors only, or know it already.
    Raises RecipeError, naming the module, where numbers leave float32.
    """
    recipe, module = plan.recipe, work.module
    with about(module.name):
        strengths = [w * s for w, s in zip(module.weights, module.scalings, strict=True)]
        As, Bs = ([factor.to(backend.device).float() for factor in side] for side in zip(*work.factors, strict=True))
        if recipe.method == "cat":
            return LowRank(torch.cat([A * x for A, x in zip(As, strengths, strict=True)]), torch.cat(Bs, dim=1), 1.0)
        if "delta" in work.merged:
            start = _start(As, module.rank)
            return lowrank.from_matrix(work.merged["delta"], start, module.rank, recipe.energy, space=space)
        if recipe.space == "delta":
            return stack(As, Bs).cut(strengths, module.rank, recipe.energy)
        A, B = work.merged["A"], work.merged["B"]
        if recipe.energy is None and module.rank >= len(A):
            return LowRank(A, B, 1.0)
        return lowrank.from_products([A], [B], [1.0], module.rank, recipe.energy)


def finished(result: LowRank) -> Finished:
    """What merges that differ in scale only have in common."""
    A, B, energy = result
    return Finished(LowRank(A.cpu(), B.cpu(), energy), lowrank.product_norm(A, B) ** 2)


def scaled(result: Finished, scale: float, name: str) -> Finished:
    """scale * B @ A: B times scale, rounded to float32.

    Raises RecipeError, naming the module, where a factor leaves float32.
    """
    (A, B, energy), squared_norm = result
    if not (finite(A) and finite(B)):
        raise RecipeError(f"{name}: its merge leaves float32; wanted smaller weights")
    if scale == 1:
        return result
    scaled_B = B * scale
    if not finite(scaled_B):
        raise RecipeError(f"scale: {scale} times {name}, which reaches {B.abs().max():.1e}, is no float32")
    return Finished(LowRank(A, scaled_B, energy), squared_norm)


def names_of(group: Sequence[ModulePlan]) -> str:
    """What to call a group of modules in a message."""
    return group[0].name + (f" and {len(group) - 1} more" if len(group) > 1 else "")


def _start(As: Sequence[Tensor], rank: int) -> Tensor:
    """Rows that a merged delta is near to being made of: the stacked A [sum r_i, N], or so many random sums of them
    that the iteration starts twice as wide as it has to."""
    rows, widest = sum(map(len, As)), max(2 * rank, WIDEST_START)
    if rows <= widest:
        return torch.cat(list(As))
    generator = torch.Generator().manual_seed(0)
    start = As[0].new_zeros(widest, As[0].shape[1])
    for A in As:
        start.addmm_(torch.randn(widest, len(A), generator=generator).to(A), A)
    return start


def _load(
    plan: Plan, backend: Backend, group: Sequence[ModulePlan]
) -> tuple[Sequence[ModulePlan], list[Factors], dict[str, Any]]:
    factors = [plan.read(module) for module in group]
    alone = plan.recipe.method == "cat" or (plan.rule.keep == "all" and plan.recipe.space == "delta")
    return group, factors, {} if alone else {side: backend.pack(plan, group, factors, side) for side in plan.sides}


class _Norms:
    """Kept energy over all modules: sum |B A|^2 / sum |merged delta|^2, whatever they are scaled by."""

    def __init__(self) -> None:
        self.kept = self.total = 0.0

    def add(self, squared_norm: float, energy: float) -> None:
        self.kept += squared_norm
        self.total += squared_norm / energy if energy > 0 else 0.0

    @property
    def kept_energy(self) -> float:
        return self.kept / self.total if self.total > 0 else 1.0


def work_of(plan: Plan) -> int:
    """Elements that a progress bar counts: one pass over all, and one more for each sweep before it."""
    sweeps = plan.spans_model + (plan.rule.majority and plan.rule.elect != "none")
    return sum(module.cost for module in plan.mine) * (1 + sweeps)


def output_bytes(plan: Plan) -> int:
    """Bytes of the factors of the result, at most."""
    return sum(module.rank * (module.rows + module.columns) for module in plan.modules) * plan.dtype.itemsize


def _writer(plan: Plan, folder: Path) -> AdapterWriter:
    described = {module.name: plan.adapters[module.adapters[0]].modules[module.name] for module in plan.modules}
    adapters = [adapter for adapter in plan.adapters if not isinstance(adapter, Finetuned)]
    return AdapterWriter(folder, adapters, described, plan.dtype)


def _finish(writer: AdapterWriter, plan: Plan, backend: Backend, energy: dict[str, float], total: float) -> None:
    recipe = plan.recipe.as_dict()
    recipe["weights"] = list(plan.recipe.weights_for([adapter.name for adapter in plan.adapters]))
    modules = {
        module.name: {
            "energy": energy[module.name],
            "adapters": [plan.adapters[number].name for number in module.adapters],
        }
        for module in plan.modules
    }
    report = {"energy": total, "backend": backend.name, "adapters": [adapter.source for adapter in plan.adapters]}
    writer.finish(recipe, {**report, "modules": modules})
