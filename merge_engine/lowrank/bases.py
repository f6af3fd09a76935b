"""Spaces that all adapters of a module share: elementwise rules act there on small matrices, and the result is a LoRA.

U [M, K] spans the columns of all deltas, V [N, K'] their rows: left singular vectors of [tau_1 | ... | tau_T], and
right ones of the stacked tau_t, in descending order, K and K' the numerical ranks, at most min(R, M, N), R = sum r_t.

| space | task tensors, merged by any rule to P | result |
| --- | --- | --- |
| knots | U^T tau_t = (U^T s_t B_t) A_t [K, N] | U P |
| core | U^T tau_t V = (U^T s_t B_t) (A_t V) [K, K'] | U P V^T |

The bases are those of the deltas, not of stacked factors: how a delta is split into B and A changes nothing. Signs of
the vectors do not matter to a rule that treats both signs alike. Vectors of equal singular values are known only up to
a rotation: there an elementwise rule may give different results on different machines.

Sources: Stoica et al., "Model merging with SVD to tie the Knots", ICLR 2025 (2410.19735), whose bases are those of the
deltas; Panariello et al., "Accurate and efficient low-rank model merging in core space", NeurIPS 2025 (2509.17786),
whose bases are those of the stacked factors. The code of neither reads alpha / r; here s_t is part of every delta.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from merge_engine.lowrank.cores import Cores, Polar
from merge_engine.lowrank.small_svd import LowRank, check_request, leading, q_times, rounded, rounding, upper
from merge_engine.lowrank.stack import Stack
from merge_engine.runtime.finite import finite


class Projected(NamedTuple):
    """Factors of the task tensors in a space, scalings included: ``As`` [r_t, N] or [r_t, K'], ``Bs`` [K, r_t]."""

    As: list[Tensor]
    Bs: list[Tensor]


class Nearness(NamedTuple):
    """How nearly parallel adapters are: the smallest singular values of their stacked unit directions.

    ``rows``: of [V_1 ... V_T]^T, the right singular vectors of every delta as rows; 0 where a row of one is a sum of
    rows of the others, 1 where all are orthogonal. 1e-4 or so is an A that was drawn once and trained apart.
    ``columns``: of [U_1 ... U_T], the left ones.
    ``polar``: the smallest on both sides within the numerical rank: the polar factors that `core_methods.tsv` uses
    change by 1 / polar times as much as the adapters do. Exactly parallel directions do not count: they do no harm.
    """

    rows: float
    columns: float
    polar: float


def nearness(cores: Cores) -> Nearness:
    """See `Nearness`; of all adapters but zero ones."""
    left, right = cores.polars([True] * len(cores))
    return Nearness(_smallest(right), _smallest(left), min(left.smallest, right.smallest))


def knots_factors(cores: Cores, As: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Projected:
    """A_t [r_t, N] as given, and U^T s_t B_t [K, r_t] in ``dtype``, on the device of A_t.

    Raises ValueError where a factor leaves ``dtype``.
    """
    return Projected(list(As), [B.to(A.device) for A, B in zip(As, _left_factors(cores, dtype), strict=True)])


def core_factors(cores: Cores, dtype: torch.dtype = torch.float32) -> Projected:
    """A_t V [r_t, K'] and U^T s_t B_t [K, r_t] in ``dtype``, on the CPU. Raises ValueError where one leaves it."""
    basis = cores.right_basis.vectors
    rows = [_narrowed(cores.factors(t)[1].T @ basis, dtype) for t in range(len(cores))]
    return Projected(rows, _left_factors(cores, dtype))


def lift_knots(stack: Stack, cores: Cores, merged: Tensor, rank: int, energy: float | None = None) -> LowRank:
    """U P of a merged P = ``merged`` [K, N], of any float dtype; |U P|_F = |P|_F.

    Where rank >= K and no energy is asked for, A = P and B = U, which has orthonormal columns: all of P is kept, and
    only U is rounded, to float32. Else the best approximation of rank min(rank, K), or the smallest that keeps
    ``energy``, as `Stack.cut` makes it. K = 0 gives one column of zeros.
    Raises ValueError for a matrix or a request that does not fit, and where the result overflows float32.
    """
    basis = cores.left_basis.vectors
    k = basis.shape[1]
    _check_merged(merged, k, stack.width)
    check_request(rank, energy)
    if k == 0:
        return _nothing(stack)
    if rank >= k and energy is None:
        return LowRank(merged.float().clone(memory_format=torch.contiguous_format), _contiguous(stack, basis), 1.0)
    right = torch.geqrf(merged.double().T)
    core = upper(right).T
    cut = leading(core, rank, energy, noise=rounding(k) * float(torch.linalg.matrix_norm(core)))
    B = stack.columns(basis @ (cut.u * cut.s).cpu())
    return rounded(q_times(right, cut.vh.T).T, B, cut)


def lift_core(stack: Stack, cores: Cores, merged: Tensor, rank: int, energy: float | None = None) -> LowRank:
    """U P V^T of a merged P = ``merged`` [K, K'], of any float dtype; |U P V^T|_F = |P|_F.

    The best approximation of rank min(rank, K, K'), or the smallest that keeps ``energy``, by the SVD of P, as
    `Stack.unfold` makes it. K = 0 gives one column of zeros.
    Raises ValueError for a matrix or a request that does not fit, and where the result overflows float32.
    """
    left, right = cores.left_basis.vectors, cores.right_basis.vectors
    least = min(left.shape[1], right.shape[1])
    _check_merged(merged, left.shape[1], right.shape[1])
    check_request(rank, energy)
    if least == 0:
        return _nothing(stack)
    return stack.unfold(left @ merged.double().cpu() @ right.T, min(rank, least), energy)


def _left_factors(cores: Cores, dtype: torch.dtype) -> list[Tensor]:
    basis = cores.left_basis.vectors
    return [_narrowed(basis.T @ cores.factors(t)[0], dtype) for t in range(len(cores))]


def _narrowed(factor: Tensor, dtype: torch.dtype) -> Tensor:
    narrow = factor.to(dtype).contiguous()
    if not finite(narrow):
        raise ValueError(f"a factor of a task tensor reaches {float(factor.abs().max()):.1e}: it does not fit {dtype}")
    return narrow


def _check_merged(merged: Tensor, rows: int, columns: int) -> None:
    if tuple(merged.shape) != (rows, columns):
        raise ValueError(f"merged is {list(merged.shape)}, wanted {[rows, columns]}")
    if not finite(merged):
        raise ValueError("merged is not finite")


def _smallest(polar: Polar) -> float:
    p, n = polar.factor.shape
    if n == 0:
        return 1.0
    return 0.0 if n > p else float(polar.values[-1])


def _nothing(stack: Stack) -> LowRank:
    p, q = (len(triangle) for triangle in stack.triangles)
    return stack.unfold(torch.zeros(p, q, dtype=torch.float64), 1)


def _contiguous(stack: Stack, basis: Tensor) -> Tensor:
    return stack.columns(basis).float().contiguous()
