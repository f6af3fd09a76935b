"""The cut: from a module's merged task tensors to the factors of the result, and the memory that this takes."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from merge_engine.engine.backend import Backend
from merge_engine.engine.plan import ModulePlan, Plan
from merge_engine.engine.prepare import Work
from merge_engine.errors import RecipeError, about
from merge_engine.lowrank.auto_scale import auto_scale
from merge_engine.lowrank.core_methods import CORE_METHODS, MergedCore
from merge_engine.lowrank.cores import Cores
from merge_engine.lowrank.krylov import first_space, from_matrix
from merge_engine.lowrank.small_svd import LowRank, product_norm, rank_that_keeps
from merge_engine.lowrank.stack import Stack, from_products
from merge_engine.rules.methods import METHODS
from merge_engine.rules.recipe import Recipe
from merge_engine.runtime.finite import finite

MAX_RECOMPRESSIONS = 4  # at a time: each holds a merged delta
WIDEST_START = 256  # rows that an iteration starts from, unless the rank asked for wants more
# Of a cut that keeps less than LOW of the energy it is told which rank would keep ENOUGH.
LOW, ENOUGH = 0.9, 0.99
# Figures of a module, by their names in the report.
SCALE, NUMERICAL_RANK, ENOUGH_RANK = "scale", "numerical_rank", "rank_that_keeps_0.99"
SMALLEST, SMALLEST_ROW = "smallest_singular_value", "smallest_row_singular_value"


class Finished(NamedTuple):
    """One module of the result: its factors, on the CPU, and what |B A|_F^2 is before they are scaled.

    norms: |tau_t|_F of the adapters, where the scale is "auto". figures: what the report says of the module beside its
    rank and energy, by name. rounding: a merged delta of a norm up to this is what float32 leaves of a sum that is 0.
    """

    factors: LowRank
    squared_norm: float
    norms: tuple[float, ...] = ()
    figures: Mapping[str, float] = MappingProxyType({})
    rounding: float = 0.0


class Decompositions:
    """What a cut needs of a module's factors whatever the weights; here it is made anew, a `Session` keeps it."""

    def stack(self, work: Work, device: torch.device) -> Stack:
        """The stacked factors, decomposed."""
        return Stack(*sides_of(work, device))

    def cores(self, stack: Stack, scalings: Sequence[float]) -> Cores:
        """The cores of the deltas."""
        return Cores(stack, scalings)

    def start(self, rows: Tensor, shape: tuple[int, int], k: int) -> Tensor:
        """What the iteration for a merged delta begins with."""
        return first_space(rows, shape, k)

    def norms(self, work: Work) -> tuple[float, ...]:
        """|tau_t|_F of the adapters."""
        return work.norms()


def recompress(plan: Plan, backend: Backend, work: Work) -> tuple[ModulePlan, Finished]:
    """One module of the result."""
    return work.module, scaled(cut(plan, backend, work), plan.recipe, work.module.name)


def cut(plan: Plan, backend: Backend, work: Work, known: Decompositions | None = None) -> Finished:
    """One module's result before `scaled`: what merges that differ in their scale have in common.

    Raises RecipeError, naming the module, where numbers overflow float32.
    """
    known = known or Decompositions()
    with about(work.module.name):
        return finished(plan, work, _factors(plan, backend, work, known), known)


class CutFactors(NamedTuple):
    """What a module was cut to, and its figures. values: all singular values of what was cut, descending, if they are
    known."""

    factors: LowRank
    figures: dict[str, float]
    values: Tensor | None = None


def finished(plan: Plan, work: Work, found: CutFactors, known: Decompositions) -> Finished:
    """A module that was cut to some factors, on the CPU, with what else there is to say of it.

    Raises RecipeError, naming the module, where a factor overflows float32.
    """
    (A, B, energy), figures, values = found
    if values is None and not (finite(A) and finite(B)):  # else the cut has looked
        raise RecipeError(f"{work.module.name}: its merge overflows float32; wanted smaller weights")
    if values is not None and energy < LOW:
        figures[ENOUGH_RANK] = rank_that_keeps(ENOUGH, values)
    squared_norm = product_norm(A, B) ** 2 if values is None else float(values[: len(A)].square().sum())
    norms = known.norms(work) if plan.recipe.scale == "auto" else ()
    lost = 0.0 if plan.by_factors else rounding_of(work.module, norms)
    return Finished(LowRank(A.cpu(), B.cpu(), energy), squared_norm, norms, figures, lost)


def _factors(plan: Plan, backend: Backend, work: Work, known: Decompositions) -> CutFactors:
    """Lifted from common spaces, stacked, made from a merged core, cut by QR, or cut by subspace iteration."""
    recipe, module, scalings = plan.recipe, work.module, work.module.scalings
    space = None if work.joined is None else work.joined.space
    if space is not None:
        small = work.merged["delta"].cpu()
        factors = space.lift(small, module.rank, recipe.energy)
        values = torch.linalg.svdvals(small.double()) if factors.energy < LOW else None
        return CutFactors(factors, {SMALLEST_ROW: space.nearness}, values)
    if plan.stacks:
        (As, Bs), strengths = sides_of(work, backend.device), strengths_of(module)
        stacked = torch.cat([A * x for A, x in zip(As, strengths, strict=True)])
        return CutFactors(LowRank(stacked, torch.cat(Bs, dim=1), 1.0), {})
    if plan.on_cores:
        stack = known.stack(work, backend.device)
        merged, figures = merge_cores(recipe, module, known.cores(stack, scalings))
        factors, values = stack.unfold_svd(merged.svd, module.rank, recipe.energy, merged.noise)
        return CutFactors(factors, figures, values)
    if "delta" in work.merged:
        start = start_rows(sides_of(work, backend.device)[0], module.rank)
        return CutFactors(from_matrix(work.merged["delta"], start, module.rank, recipe.energy, space=known.start), {})
    if plan.by_factors:
        stack = known.stack(work, backend.device)
        factors, values = stack.cut_and_values(strengths_of(module), module.rank, recipe.energy)
        return CutFactors(factors, {}, values)
    A, B = work.merged["A"], work.merged["B"]
    if recipe.energy is None and module.rank >= len(A):
        return CutFactors(LowRank(A, B, 1.0), {})
    return CutFactors(from_products([A], [B], [1.0], module.rank, recipe.energy), {})


def sides_of(work: Work, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """All A [r_t, N] and all B [M, r_t] of a module in float32."""
    As, Bs = zip(*work.factors, strict=True)
    return [A.to(device).float() for A in As], [B.to(device).float() for B in Bs]


def strengths_of(module: ModulePlan) -> list[float]:
    """w_t s_t, what B_t A_t counts in a sum."""
    return [w * s for w, s in zip(module.weights, module.scalings, strict=True)]


def merge_cores(recipe: Recipe, module: ModulePlan, cores: Cores) -> tuple[MergedCore, dict[str, float]]:
    """The merged core of a module by the recipe's method, and its figures."""
    options = {name: getattr(recipe, name) for name in METHODS[recipe.method].options}
    merged = CORE_METHODS[recipe.method](cores, module.weights, module.rank, **options)
    figures: dict[str, float] = {NUMERICAL_RANK: merged.rank}
    if merged.smallest is not None:
        figures[SMALLEST] = merged.smallest
    return merged, figures


def scaled(result: Finished, recipe: Recipe, name: str) -> Finished:
    """scale * B @ A: B times scale, rounded to float32; see `scale_of`.

    Raises RecipeError, naming the module, where a factor overflows float32.
    """
    A, B, energy = result.factors
    squared_norm = result.squared_norm / energy if energy > 0 else 0.0
    scale = scale_of(recipe, name, result.norms, squared_norm, result.rounding)
    if recipe.scale == "auto":
        result = result._replace(figures={**result.figures, SCALE: scale})
    if scale == 1:
        return result
    scaled_B = B * scale
    if not finite(scaled_B):
        raise RecipeError(f"scale: {scale} times {name}, which reaches {B.abs().max():.1e}, overflows float32")
    return result._replace(factors=LowRank(A, scaled_B, energy))


def scale_of(recipe: Recipe, name: str, norms: Sequence[float], squared_norm: float, rounding: float) -> float:
    """The recipe's scale of a module; for "auto" that of `auto_scale`, or 0 where adapters cancel but for rounding.

    norms: |tau_t|_F, for "auto" only. squared_norm: |merged|_F^2 before the cut to a rank. rounding: as in `Finished`.
    """
    if recipe.scale != "auto":
        return recipe.scale
    norm = math.sqrt(squared_norm)
    return 0.0 if 0 < norm <= rounding else auto_scale(norms, norm, recipe.gain_for(name))


def rounding_of(module: ModulePlan, norms: Sequence[float]) -> float:
    """2**-20 sum_t |w_t tau_t|, where norms |tau_t| are known: 16 times the rounding of one element."""
    return 2.0**-20 * sum(abs(w) * norm for w, norm in zip(module.weights, norms, strict=bool(norms)))


def widest_start(rank: int) -> int:
    """Rows that the iteration for so many vectors starts from, at most."""
    return max(2 * rank, WIDEST_START)


def start_rows(As: Sequence[Tensor], rank: int) -> Tensor:
    """Rows that a merged delta is near to being made of: the stacked A [sum r_i, N], or so many random sums of them
    that the iteration starts twice as wide as it has to."""
    rows, widest = sum(map(len, As)), widest_start(rank)
    if rows <= widest:
        return torch.cat(list(As))
    generator = torch.Generator().manual_seed(0)
    start = As[0].new_zeros(widest, As[0].shape[1])
    for A in As:
        start.addmm_(torch.randn(widest, len(A), generator=generator).to(A), A)
    return start


def _sum_of_ranks(plan: Plan, module: ModulePlan) -> int:
    return sum(plan.adapters[number].modules[module.name].rank for number in module.adapters)


def factor_bytes(plan: Plan, module: ModulePlan) -> int:
    """What the packed factors of one module take; ranks are padded to multiples of 8."""
    ranks = sum(-(-plan.adapters[number].modules[module.name].rank // 8) * 8 for number in module.adapters)
    return 4 * ranks * (module.rows + module.columns)


def matrix_bytes(plan: Plan, module: ModulePlan) -> int:
    """What is merged of one module: a matrix, or factors."""
    if plan.lifts:
        return 4 * min(_sum_of_ranks(plan, module), module.rows) * module.columns
    if plan.recipe.space == "delta" and not plan.by_factors:
        return 4 * module.rows * module.columns
    return 4 * module.rank * (module.rows + module.columns)


def cutting_bytes(plan: Plan, module: ModulePlan) -> int:
    """What `cut` takes beside that, about: see `lowrank.from_matrix` and `lowrank.stack`."""
    ranks, width, least = _sum_of_ranks(plan, module), module.rows + module.columns, min(module.rows, module.columns)
    if plan.on_cores:
        return _core_bytes(plan, module)
    if plan.recipe.space != "delta" or plan.by_factors:
        return 8 * (4 * ranks * width + 8 * ranks * ranks)
    if module.rank * 12 > least:  # by the Gram matrix
        return 8 * (4 * least * least + 3 * module.rank * width)
    start = min(ranks, max(2 * module.rank, WIDEST_START))
    return 8 * (5 * (start + 8) + 12 * (module.rank + 4)) * width


def joining_bytes(plan: Plan, module: ModulePlan) -> int:
    """What it takes to join a module, where its task tensors depend on all of its adapters: see `joint.Joint`."""
    return 0 if plan.joint is None else _core_bytes(plan, module)


def joined_bytes(plan: Plan, module: ModulePlan) -> int:
    """What a joined module takes, at most: its factors, and in a space the stack and the cores."""
    if plan.joint is None:
        return 0
    ranks, width, adapters = _sum_of_ranks(plan, module), module.rows + module.columns, len(module.adapters)
    factors = 4 * ranks * width
    if not plan.lifts:
        return factors
    stack = 4 * ranks * width + 8 * (_core_sides(ranks, module) + 4) * ranks
    return factors + stack + 8 * ((4 * _core_sides(ranks, module) + ranks + 8) * ranks + adapters * (adapters + 2))


def _core_bytes(plan: Plan, module: ModulePlan) -> int:
    """What it takes to stack factors, and to find cores, their singular vectors and what is merged of them.

    Measured up to R = M = N = 1024, where the second term is as large as it gets.
    """
    ranks, width = _sum_of_ranks(plan, module), module.rows + module.columns
    return 8 * (4 * ranks * width + 8 * _core_sides(ranks, module) * ranks)


def _core_sides(ranks: int, module: ModulePlan) -> int:
    """p + q of a core [p, q]."""
    return min(ranks, module.rows) + min(ranks, module.columns)
