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
from merge_engine.lowrank.balance import auto_scale
from merge_engine.lowrank.core import LowRank, product_norm
from merge_engine.lowrank.cores import Cores
from merge_engine.lowrank.krylov import first_space, from_matrix
from merge_engine.lowrank.spectral import CORE_METHODS
from merge_engine.lowrank.stack import Stack, from_products
from merge_engine.rules.methods import METHODS
from merge_engine.rules.recipe import Recipe
from merge_engine.runtime.finite import finite

MAX_RECOMPRESSIONS = 4  # at a time: each holds a merged delta
WIDEST_START = 256  # rows that an iteration starts from, unless the rank asked for wants more


class Finished(NamedTuple):
    """One module of the result: its factors, on the CPU, and what |B A|_F^2 is before they are scaled.

    norms: |tau_t|_F of the adapters, where the scale is "auto". figures: what the report says of the module beside its
    rank and energy, by name.
    """

    factors: LowRank
    squared_norm: float
    norms: tuple[float, ...] = ()
    figures: Mapping[str, float] = MappingProxyType({})


class Decompositions:
    """What a cut needs of a module's factors whatever the weights; here it is made anew, a `Session` keeps it."""

    def stack(self, As: Sequence[Tensor], Bs: Sequence[Tensor]) -> Stack:
        """The stacked factors, decomposed."""
        return Stack(As, Bs)

    def cores(self, stack: Stack, scalings: Sequence[float]) -> Cores:
        """The cores of the deltas."""
        return Cores(stack, scalings)

    def start(self, rows: Tensor, shape: tuple[int, int], k: int) -> Tensor:
        """What the iteration for a merged delta begins with."""
        return first_space(rows, shape, k)


def recompress(plan: Plan, backend: Backend, work: Work) -> tuple[ModulePlan, Finished]:
    """One module of the result."""
    return work.module, scaled(cut(plan, backend, work), plan.recipe, work.module.name)


def cut(plan: Plan, backend: Backend, work: Work, known: Decompositions | None = None) -> Finished:
    """One module's result before `scaled`: what merges that differ in their scale have in common.

    Raises RecipeError, naming the module, where numbers leave float32.
    """
    with about(work.module.name):
        (A, B, energy), figures = _factors(plan, backend, work, known or Decompositions())
        norms = work.norms() if plan.recipe.scale == "auto" else ()
        return Finished(LowRank(A.cpu(), B.cpu(), energy), product_norm(A, B) ** 2, norms, figures)


def _factors(plan: Plan, backend: Backend, work: Work, known: Decompositions) -> tuple[LowRank, dict[str, float]]:
    """Stacked, made from a merged core, cut by QR, or cut by subspace iteration; and what there is to report."""
    recipe, module, scalings = plan.recipe, work.module, work.module.scalings
    As, Bs = ([factor.to(backend.device).float() for factor in side] for side in zip(*work.factors, strict=True))
    strengths = [w * s for w, s in zip(module.weights, scalings, strict=True)]
    if plan.stacks:
        stacked = torch.cat([A * x for A, x in zip(As, strengths, strict=True)])
        return LowRank(stacked, torch.cat(Bs, dim=1), 1.0), {}
    if plan.on_cores:
        stack = known.stack(As, Bs)
        method = CORE_METHODS[recipe.method]
        options = {name: getattr(recipe, name) for name in METHODS[recipe.method].options}
        merged = method(known.cores(stack, scalings), module.weights, **options)
        figures = {"numerical_rank": float(merged.rank)}
        if merged.smallest is not None:
            figures["smallest_singular_value"] = merged.smallest
        return stack.unfold(merged.core, module.rank, recipe.energy, merged.noise), figures
    space = None if work.joined is None else work.joined.space
    if space is not None:
        return space.lift(work.merged["delta"], module.rank, recipe.energy), {}
    if "delta" in work.merged:
        start = _start(As, module.rank)
        return from_matrix(work.merged["delta"], start, module.rank, recipe.energy, space=known.start), {}
    if plan.by_factors:
        return known.stack(As, Bs).cut(strengths, module.rank, recipe.energy), {}
    A, B = work.merged["A"], work.merged["B"]
    if recipe.energy is None and module.rank >= len(A):
        return LowRank(A, B, 1.0), {}
    return from_products([A], [B], [1.0], module.rank, recipe.energy), {}


def scaled(result: Finished, recipe: Recipe, name: str) -> Finished:
    """scale * B @ A: B times scale, rounded to float32; see `scale_of`.

    Raises RecipeError, naming the module, where a factor leaves float32.
    """
    A, B, energy = result.factors
    if not (finite(A) and finite(B)):
        raise RecipeError(f"{name}: its merge leaves float32; wanted smaller weights")
    scale = scale_of(recipe, result.norms, result.squared_norm / energy if energy > 0 else 0.0)
    if recipe.scale == "auto":
        result = result._replace(figures={**result.figures, "scale": scale})
    if scale == 1:
        return result
    scaled_B = B * scale
    if not finite(scaled_B):
        raise RecipeError(f"scale: {scale} times {name}, which reaches {B.abs().max():.1e}, overflows float32")
    return result._replace(factors=LowRank(A, scaled_B, energy))


def scale_of(recipe: Recipe, norms: Sequence[float], squared_norm: float) -> float:
    """The recipe's scale; for "auto", that of `balance.auto_scale`.

    norms: |tau_t|_F, for "auto" only. squared_norm: |merged|_F^2 before the cut to a rank.
    """
    return auto_scale(norms, math.sqrt(squared_norm), recipe.gain) if recipe.scale == "auto" else recipe.scale


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
    """What `cut` takes beside that, about: see `lowrank.from_matrix` and `stacked`."""
    ranks, width, least = _sum_of_ranks(plan, module), module.rows + module.columns, min(module.rows, module.columns)
    if plan.recipe.space != "delta" or plan.by_factors:
        return 8 * (3 * ranks * width + 6 * ranks * ranks)
    if module.rank * 12 > least:  # by the Gram matrix
        return 8 * (4 * least * least + 3 * module.rank * width)
    start = min(ranks, max(2 * module.rank, WIDEST_START))
    return 8 * (5 * (start + 8) + 12 * module.rank) * width
