"""Small cores: their leading singular vectors, and the low-rank factors that are made of them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from merge_engine.runtime.finite import finite

Decomposed = tuple[Tensor, Tensor]  # reflectors of Q below R, and their factors, as LAPACK's geqrf packs them


class Leading(NamedTuple):
    """u [m, k], s [k] and vh [k, n] of a matrix, and the share of the energy that they keep."""

    u: Tensor
    s: Tensor
    vh: Tensor
    kept: float


class LowRank(NamedTuple):
    """B A ~ D: A [k, N] with orthonormal rows, B [M, k] with orthogonal columns, float32, contiguous, of their own
    storage; ``energy`` = |B A|_F^2 / |D|_F^2 in [0, 1], and 1.0 for a zero matrix."""

    A: Tensor
    B: Tensor
    energy: float


def product_norm(A: Tensor, B: Tensor) -> float:
    """|B A|_F = sqrt(sum((A A^T) * (B^T B))) in float64, A [r, N], B [M, r]: no [M, N] matrix is made."""
    A, B = A.double(), B.double()
    return math.sqrt(max(float(((A @ A.T) * (B.T @ B)).sum()), 0.0))


def leading(
    core: Tensor, rank: int, energy: float | None, *, total: float | None = None, noise: float = 0.0
) -> Leading:
    """The leading singular vectors of core, as many as are asked for; ``total`` is |D|_F^2, that of core unless given.

    Singular values up to ``noise`` count as zero. Where a few of many are wanted, they are found in the span of as many
    eigenvectors U of core core^T, in half the time: U U^T core loses to the best at most what float64 loses in core^2,
    some 2**-26 |core|, and its own SVD has orthonormal vectors however small a value is.
    """
    unit = float(core.abs().max()) or 1.0  # of which squares stay in float64
    core, noise, span, rest = core / unit, noise / unit, None, 0.0
    if 4 * rank <= len(core):
        squares, vectors = torch.linalg.eigh(core @ core.T)
        values = squares.clamp(min=0).sqrt()
        blur = math.sqrt(len(core) * torch.finfo(values.dtype).eps) * float(values[-1])
        span, others = vectors[:, -rank:], values[:-rank]
        rest = float(others[others > max(noise, blur)].square().sum())
    u, s, vh = torch.linalg.svd(core if span is None else span.T @ core, full_matrices=False)
    s = torch.where(s > noise, s, 0.0)
    squares = s.square().cumsum(0)
    total = float(squares[-1]) + rest if total is None else total / unit / unit
    kept = (squares / total).clamp(max=1) if total > 0 else torch.ones_like(squares)
    k = min(rank, len(s))
    if energy is not None:
        k = min(k, 1 + int((kept < energy).sum()))
    u = u[:, :k]
    return Leading(u if span is None else span @ u, unit * s[:k], vh[:k], float(kept[k - 1]))


def unfolded(core: Leading, left: Decomposed, right: Decomposed) -> LowRank:
    """Q_left @ core @ Q_right.T."""
    return rounded(q_times(right, core.vh.T).T, q_times(left, core.u * core.s), core)


def rounded(A: Tensor, B: Tensor, core: Leading) -> LowRank:
    """The factors in float32; raises ValueError where that is too narrow."""
    A, B = A.float().contiguous(), B.float().contiguous()
    if not finite(B):
        raise ValueError(f"the largest singular value is {float(core.s[0]):.1e}: B does not fit float32")
    return LowRank(A, B, core.kept)


def q_times(decomposed: Decomposed, block: Tensor) -> Tensor:
    """Q @ block [p, k] for Q [m, p] by its reflectors: a third of a QR would go into a Q that is not asked for."""
    packed, tau = decomposed
    tall = block.new_zeros(len(packed), block.shape[1])
    tall[: len(block)] = block
    return torch.ormqr(packed[:, : len(tau)], tau, tall)


def completed(rows: Tensor, count: int) -> Tensor:
    """Orthonormal rows, and more of them up to that number."""
    if len(rows) == count:
        return rows
    generator = torch.Generator().manual_seed(0)
    more = torch.randn(count - len(rows), rows.shape[1], generator=generator, dtype=torch.float64).to(rows.device)
    for _ in range(2):
        more = orthonormal(more - more @ rows.T @ rows)
    return torch.cat([rows, more])


def rounding(columns: int) -> float:
    """How far float64 moves a singular value of a matrix that so many columns are stacked for, as a share of the sum of
    their norms: 2**-51 max(columns, 8), a bound on QR and SVD together that random matrices never come near."""
    return 2 * max(columns, 8) * torch.finfo(torch.float64).eps


def upper(decomposed: Decomposed) -> Tensor:
    packed, tau = decomposed
    return packed[: len(tau)].triu()


def orthonormal(block: Tensor) -> Tensor:
    return torch.linalg.qr(block.T)[0].T


def check_request(rank: int, energy: float | None) -> None:
    if rank < 1:
        raise ValueError(f"rank is {rank}, wanted at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy is {energy}, wanted 0 < energy <= 1")
