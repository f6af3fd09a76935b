"""Small matrices ("cores"): their leading singular vectors, and the low-rank factors made from these."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from merge_engine.runtime.finite import finite

# |u_i s| <= s: singular values up to this, B fits float32, and only beyond it is B looked at.
_SURELY_FITS = 1e38
# A singular value of a dense merged delta D of up to this share of |D|_F may be rounding alone: that of its elements to
# float32, and of products with it (see `products.times`).
ROUNDED = 2.0**-21
_BLUR = 2.0**-26  # of |D|_F^2: how much products in float32 change the energy that a cut keeps
# Rows of U^T core, U eigenvectors of core core^T, have inner products of up to 2**-52 len(core) of the largest squared
# singular value. Where no squared one is below this share of it, unit rows are orthogonal to 2**-33 (128 rows).
_STEADY = 2.0**-12
_TURNED = 2.0**-26  # what vectors may be off by: a quarter of what rounding to float32 loses
_EPS = torch.finfo(torch.float64).eps
Decomposed = tuple[Tensor, Tensor]  # reflectors of Q below R, and their factors, as LAPACK's geqrf packs them


class Svd(NamedTuple):
    """u [m, k], s [p] and vh [k, n] of a matrix: all singular values, descending, and vectors of the k largest."""

    u: Tensor
    s: Tensor
    vh: Tensor

    def tells(self, k: int, limit: float) -> bool:
        """Whether it is certain that k values are above ``limit``: `leading_svd` may know their squares only."""
        return self._is_whole or all(abs(each - self._square(limit)) > self._blur for each in self._squares_around(k))

    def separates(self, k: int) -> bool:
        """Whether the k leading vectors span what those of the matrix do, up to 2**-26, as `leading_svd` finds them."""
        last, *others = self._squares_around(k)
        return self._is_whole or last - sum(others) >= self._blur / _TURNED

    @property
    def _is_whole(self) -> bool:
        return self.u.shape[1] == len(self.s)

    @property
    def _blur(self) -> float:
        """What products in float64 and eigenvalues may be off by, of a largest square of 1."""
        return len(self.u) * _EPS

    def _squares_around(self, k: int) -> list[float]:
        """The squares of the k-th value and of the next one, as far as there are such."""
        return [self._square(value) for value in self.s[max(k - 1, 0) : k + 1].tolist()]

    def _square(self, value: float) -> float:
        share = value / (float(self.s[0]) or 1.0)
        return share * share  # which may be Inf


class Leading(NamedTuple):
    """u [m, k], s [k] and vh [k, n] of a matrix, and the share of the energy that they keep.

    values: all singular values, descending; those that are not in s are right to some 2**-26 of the largest.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    kept: float
    values: Tensor


class LowRank(NamedTuple):
    """B A ~ D: A [k, N] with orthonormal rows, B [M, k] with orthogonal columns, float32, contiguous, of their own
    storage; ``energy`` = |B A|_F^2 / |D|_F^2 in [0, 1], and 1.0 for a zero matrix."""

    A: Tensor
    B: Tensor
    energy: float


def rank_that_keeps(share: float, values: Tensor) -> int:
    """The smallest rank that keeps this share of the energy of a matrix with these singular values, descending."""
    squares = (values / (float(values[0]) or 1.0)).square().cumsum(0)
    return 1 + int((squares < share * squares[-1]).sum())


def asks_for_all(energy: float | None) -> bool:
    """Whether the numerical rank is asked for: energy 1, or what products in float32 cannot tell from it."""
    return energy is not None and energy > 1 - _BLUR


def product_norm(A: Tensor, B: Tensor) -> float:
    """|B A|_F = sqrt(sum((A A^T) * (B^T B))) in float64, A [r, N], B [M, r]: no [M, N] matrix is made."""
    A, B = A.double(), B.double()
    return math.sqrt(max(float(((A @ A.T) * (B.T @ B)).sum()), 0.0))


def leading(
    core: Tensor, rank: int, energy: float | None, *, total: float | None = None, noise: float = 0.0
) -> Leading:
    """The leading ``rank`` singular vectors of core, or the fewest that keep ``energy``.

    ``total`` is |D|_F^2, by default |core|_F^2. Singular values up to ``noise`` count as zero.
    """
    return leading_of(leading_svd(core, rank), rank, energy, noise, total)


def leading_svd(core: Tensor, count: int | None) -> Svd:
    """All singular values of core, and its leading ``count`` singular vectors or more; all of them where it is None.

    Where count is a quarter of the size or less, they are found in half the time: in the span of as many eigenvectors U
    of core core^T. U U^T core is worse than the best approximation by at most what float64 loses in core core^T, some
    2**-26 |core|. The rows of U^T core are orthogonal unless a singular value is very small: then an SVD of it makes
    them so. The squares of the other values are right to 2**-52 len(core) of the largest; smaller ones are given as 0.
    """
    unit = float(core.abs().max()) or 1.0  # in this unit squares do not overflow float64
    core = core / unit
    if count is None or 4 * count > len(core):
        u, s, vh = svd_of(core)
        return Svd(u, unit * s, vh)
    squares, vectors = torch.linalg.eigh(core @ core.T, UPLO="U")  # which MKL is quicker at
    span, others = vectors[:, -count:], squares[:-count].flip(0)[: max(min(core.shape) - count, 0)]
    others = torch.where(others > len(core) * _EPS * squares[-1], others, 0.0).sqrt()
    image = span.T @ core
    if squares[-count] > _STEADY * squares[-1]:
        s, order = torch.linalg.vector_norm(image, dim=1).sort(descending=True)
        return Svd(span[:, order], unit * torch.cat([s, others]), image[order] / s[:, None])
    u, s, vh = svd_of(image)
    return Svd(span @ u, unit * torch.cat([s, others]), vh)


def svd_of(core: Tensor) -> Svd:
    """The singular value decomposition, without null directions beyond a side."""
    return Svd(*torch.linalg.svd(core, full_matrices=False))


def leading_of(svd: Svd, rank: int, energy: float | None, noise: float = 0.0, total: float | None = None) -> Leading:
    """As `leading`, of a core whose decomposition is known. Raises ValueError where it has too few vectors."""
    s = torch.where(svd.s > noise, svd.s, 0.0)
    k = min(rank, len(s))
    if svd.u.shape[1] < k:
        raise ValueError(f"{svd.u.shape[1]} singular vectors are known, wanted {k}")
    unit = float(s[0]) or 1.0  # in this unit squares do not overflow float64
    squares = (s / unit).square().cumsum(0)
    whole = float(squares[-1]) if total is None else total / unit / unit
    kept = (squares / whole).clamp(max=1) if whole > 0 else torch.ones_like(squares)
    if energy is not None:
        k = min(k, 1 + int((kept < energy).sum()))
    return Leading(svd.u[:, :k], s[:k], svd.vh[:k], float(kept[k - 1]), s)


def unfolded(core: Leading, left: Decomposed, right: Decomposed) -> LowRank:
    """Q_left @ core @ Q_right.T."""
    return rounded(q_times(right, core.vh.T).T, q_times(left, core.u * core.s), core)


def rounded(A: Tensor, B: Tensor, core: Leading) -> LowRank:
    """The factors in float32; raises ValueError where B overflows it."""
    A, B = A.float().contiguous(), B.float().contiguous()
    if not (float(core.s[0]) <= _SURELY_FITS or finite(B)):
        raise ValueError(f"the largest singular value is {float(core.s[0]):.1e}: B overflows float32")
    return LowRank(A, B, core.kept)


def q_times(decomposed: Decomposed, block: Tensor) -> Tensor:
    """Q @ block [p, k] for Q [m, p], by its reflectors: to make Q itself would take half as long as the QR did."""
    packed, tau = decomposed
    tall = block.new_zeros(len(packed), block.shape[1])
    tall[: len(block)] = block
    return torch.ormqr(packed[:, : len(tau)], tau, tall)


def completed(rows: Tensor, count: int) -> Tensor:
    """Orthonormal rows: the given ones, then fixed random ones, ``count`` in all."""
    if len(rows) == count:
        return rows
    generator = torch.Generator().manual_seed(0)
    more = torch.randn(count - len(rows), rows.shape[1], generator=generator, dtype=torch.float64).to(rows.device)
    for _ in range(2):
        more = orthonormal(more - more @ rows.T @ rows)
    return torch.cat([rows, more])


def rounding(columns: int) -> float:
    """The rounding error of a singular value by QR and SVD of so many stacked columns, as a share of their norms' sum.

    It is 2**-51 max(columns, 8), for float64: a bound that random matrices never come near.
    """
    return 2 * max(columns, 8) * _EPS


def upper(decomposed: Decomposed) -> Tensor:
    """R of a QR decomposition."""
    packed, tau = decomposed
    return packed[: len(tau)].triu()


def orthonormal(block: Tensor) -> Tensor:
    """Orthonormal rows that span the rows of ``block``."""
    return torch.linalg.qr(block.T)[0].T


def check_request(rank: int, energy: float | None) -> None:
    """Raise ValueError unless rank is 1 or more, and energy None or in (0, 1]."""
    if rank < 1:
        raise ValueError(f"rank is {rank}, wanted at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy is {energy}, wanted 0 < energy <= 1")
