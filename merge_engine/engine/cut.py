"""The cut: from a module's merged task tensors to the factors of the result, and the memory that this takes."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from merge_engine.engine.backend import Backend
from merge_engine.engine.plan import ModulePlan, Plan
from merge_engine.engine.prepare import Work
from merge_engine.errors import RecipeError, about
from merge_engine.lowrank.core import LowRank, product_norm
from merge_engine.lowrank.krylov import first_space, from_matrix
from merge_engine.lowrank.stack import Stack, from_products
from merge_engine.runtime.finite import finite

MAX_RECOMPRESSIONS = 4  # at a time: each holds a merged delta
WIDEST_START = 256  # rows that an iteration starts from, unless the rank asked for wants more


class Finished(NamedTuple):
    """One module of the result: its factors, on the CPU, and what |B A|_F^2 is before they are scaled."""

    factors: LowRank
    squared_norm: float


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
        if plan.stacks:
            return LowRank(torch.cat([A * x for A, x in zip(As, strengths, strict=True)]), torch.cat(Bs, dim=1), 1.0)
        if "delta" in work.merged:
            start = _start(As, module.rank)
            return from_matrix(work.merged["delta"], start, module.rank, recipe.energy, space=space)
        if recipe.space == "delta":
            return stack(As, Bs).cut(strengths, module.rank, recipe.energy)
        A, B = work.merged["A"], work.merged["B"]
        if recipe.energy is None and module.rank >= len(A):
            return LowRank(A, B, 1.0)
        return from_products([A], [B], [1.0], module.rank, recipe.energy)


def finished(result: LowRank) -> Finished:
    """What merges that differ in scale only have in common."""
    A, B, energy = result
    return Finished(LowRank(A.cpu(), B.cpu(), energy), product_norm(A, B) ** 2)


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
    if plan.recipe.space == "delta" and not plan.by_factors:
        return 4 * module.rows * module.columns
    return 4 * module.rank * (module.rows + module.columns)


def cutting_bytes(plan: Plan, module: ModulePlan) -> int:
    """What `cut` takes beside that, about: see `lowrank.from_matrix` and `stacked`."""
    ranks, width, least = _sum_of_ranks(plan, module), module.rows + module.columns, min(module.rows, module.columns)
    if plan.recipe.space == "factors" or plan.by_factors:
        return 8 * (3 * ranks * width + 6 * ranks * ranks)
    if module.rank * 12 > least:  # by the Gram matrix
        return 8 * (4 * least * least + 3 * module.rank * width)
    start = min(ranks, max(2 * module.rank, WIDEST_START))
    return 8 * (5 * (start + 8) + 12 * module.rank) * width
