"""Low-rank factors of what a merge makes: of a sum of products exactly, of a dense merged delta by a Krylov iteration.

``|D - B A|_F`` is the smallest that rank k allows, and the factors are split as PEFT splits them: ``B = U S, A = Vh``.
Matrices with few columns are handled in float64, where they cost next to nothing; a dense one is only multiplied, in
float32, and on a GPU in float64. Rounding the factors to float32 moves their product by at most ``2 * 2**-24 |B A|_F``.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from merge_engine import passes

logger = logging.getLogger(__name__)

# Gaussian rows that join the start, so that no direction of the matrix stays unseen. The space starts at least this
# much wider than the rank: it never finds more vectors of a repeated singular value than it was wide at first.
_OVERSAMPLING = 8
# From rank n / 12 on, the n eigenvectors of the Gram matrix are found sooner than the leading ones. On two Zen 4 cores,
# 2048 x 2048, in seconds, Krylov against Gram: 0.02 and 1.0 at rank 16, 0.4 and 1.1 at 128, 1.9 and 1.1 at 256.
_DENSE_FRACTION = 12
_MAX_STEPS = 24
# A step is never expected to leave less than this share of the excess.
_BEST_RATIO = 0.1
# An excess of less than this share of |D|_F^2 is not looked for: products in float32 blur captured energy by more.
_NOISE = 2.0**-32
_CONVERGED = 2.0**-20  # of a vector's norm: float32 products leave more than that of one that has not converged
_BLUR = 2.0**-26  # how far float32 products move captured energy, as a share of |D|_F^2

# A singular value of less than this share of what its products sum up to comes with rounding of a share of 2**-33.
_CANCELLED = 2.0**-20

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


def from_products(
    As: Sequence[Tensor], Bs: Sequence[Tensor], weights: Sequence[float], rank: int, energy: float | None = None
) -> LowRank:
    """B A = the best approximation of rank k of D = sum_i w_i B_i A_i, by QR of the stacked factors and a small SVD.

    ``As[i]`` is [r_i, N] and ``Bs[i]`` [M, r_i], of any floating dtype, on one device; the ranks r_i may differ, and
    weights be zero or negative. k = min(rank, M, N, sum r_i), since further rows could only be zero; with ``energy`` in
    (0, 1], the smallest k up to that which keeps this share of |D|_F^2, or that number where none does.

    In float64, rounded once: |B A - D_k|_F <= 2 * 2**-24 |D_k|_F, and what float64 loses, which shows only where
    products cancel: singular values below 2**-51 max(sum r_i, 8) sum_i |w_i| |B_i|_F |A_i|_F count as zero.
    Time O((M + N) (sum r_i)^2); no [M, N] matrix is made.

    Raises ValueError for shapes, weights or a request that do not fit, and where a factor is not
    finite or the result leaves float32.
    """
    return Stack(As, Bs).cut(weights, rank, energy)


class Stack:
    """Sums of products whose weights change: the stacked factors in float64, and of their QR the triangle.

    ``sum_i w_i B_i A_i = Q_B (R_B W R_A^T) Q_A^T`` with ``X_B = [B_1 ... B_n] = Q_B R_B`` and
    ``X_A = [A_1^T ... A_n^T] = Q_A R_A``. Weights act on the core ``R_B W R_A^T = U S V^T`` alone, and no Q is needed:
    ``B = Q_B U S = X_B (W R_A^T V)`` and ``A^T = Q_A V = X_A (W R_B^T U / S)``.
    ``As[i]`` [r_i, N], ``Bs[i]`` [M, r_i], of any float dtype, on one device.

    Raises ValueError for shapes that do not fit, and where a factor is not finite.
    """

    def __init__(self, As: Sequence[Tensor], Bs: Sequence[Tensor]) -> None:
        if not len(As) == len(Bs) > 0:
            raise ValueError(f"got {len(As)} A and {len(Bs)} B, wanted equally many, at least one")
        for i, (A, B) in enumerate(zip(As, Bs, strict=True)):
            if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
                raise ValueError(f"A[{i}] is {list(A.shape)} and B[{i}] is {list(B.shape)}, wanted [r, N] and [M, r]")
            if (B.shape[0], A.shape[1]) != (Bs[0].shape[0], As[0].shape[1]):
                wanted = [Bs[0].shape[0], As[0].shape[1]]
                raise ValueError(f"B[{i}] @ A[{i}] is {[B.shape[0], A.shape[1]]}, wanted {wanted} as of the first")
        self.ranks = [len(A) for A in As]
        self._left, self._right = _stacked([B.T for B in Bs]), _stacked(As)
        self._norms = torch.linalg.vector_norm(self._left, dim=1) * torch.linalg.vector_norm(self._right, dim=1)
        if not passes.finite(self._norms):
            raise ValueError("a factor is not finite")
        self._upper_left, self._upper_right = (_upper(torch.geqrf(side.T)) for side in (self._left, self._right))

    @property
    def nbytes(self) -> int:
        parts = self._left, self._right, self._upper_left, self._upper_right, self._norms
        return sum(part.numel() * part.itemsize for part in parts)

    def cut(self, weights: Sequence[float], rank: int, energy: float | None = None) -> LowRank:
        """B A = the best approximation of rank k of ``sum_i w_i B_i A_i``, in O(r^3 + r k (M + N)).

        k = min(rank, M, N, sum r_i), or the smallest up to that which keeps ``energy`` of the squared norm. Singular
        values below 2**-51 max(sum r_i, 8) sum_i |w_i| |B_i|_F |A_i|_F count as zero.
        Raises ValueError for weights or a request that do not fit, and where the result leaves float32.
        """
        if len(weights) != len(self.ranks):
            raise ValueError(f"got {len(weights)} weights, wanted {len(self.ranks)}")
        _check(rank, energy)
        columns = torch.tensor(weights, dtype=torch.float64).repeat_interleave(torch.tensor(self.ranks))
        columns = columns.to(self._norms.device)
        scale = float((columns.abs() * self._norms).sum())
        if not math.isfinite(scale):
            raise ValueError("a weight is not finite")
        noise = 2 * max(len(columns), 8) * torch.finfo(columns.dtype).eps * scale
        core = _leading((self._upper_left * columns) @ self._upper_right.T, rank, energy, noise=noise)
        found, k = int((core.s > 0).sum()), len(core.s)
        u, s, vh = core.u[:, :found], core.s[:found], core.vh[:found]
        if found and s[-1] <= _CANCELLED * scale:  # X_A (W R_B^T U) has lost too much to be divided by S
            return _unfolded(core, torch.geqrf(self._left.T), torch.geqrf(self._right.T))
        B = (vh @ self._upper_right * columns) @ self._left
        A = ((u / s).T @ self._upper_left * columns) @ self._right
        return _rounded(_completed(A, k), torch.nn.functional.pad(B, (0, 0, 0, k - found)).T, core)


def first_space(start: Tensor, shape: tuple[int, int], k: int) -> Tensor:
    """Orthonormal rows [p, N] that the iteration for k vectors of a matrix [M, N] = ``shape`` begins with, in float64.

    They span ``start`` [., N], or min(M, N) / 4 random sums of its rows where there are more, and fixed Gaussian rows:
    8, and as many as p = k + 8 takes.
    """
    widest = min(shape) // 4
    generator = torch.Generator().manual_seed(0)
    if len(start) > widest:
        start = torch.randn(widest, len(start), generator=generator, dtype=torch.float64).to(start.device) @ start
    count = max(_OVERSAMPLING, k + _OVERSAMPLING - len(start))
    gaussians = torch.randn(count, shape[1], generator=generator, dtype=torch.float64)
    return _orthonormal(torch.cat([start, gaussians.to(start.device)]))


def from_matrix(
    matrix: Tensor,
    start: Tensor,
    rank: int,
    energy: float | None = None,
    tolerance: float = 1e-5,
    *,
    space: Callable[[Tensor, tuple[int, int], int], Tensor] = first_space,
) -> LowRank:
    """B A = an approximation of rank k = min(rank, M, N) of D = ``matrix``, as good as the best within ``tolerance``.

    ``matrix`` is [M, N] float32; ``start`` [p, N], of any floating dtype and with any p, holds rows that D is near to
    being made of, as the stacked A of the merged adapters: the better they are, the fewer the steps.
    ``tolerance`` bounds the excess (|D - B A|_F^2 - best) / best, so the error itself ends within tolerance / 2; it is
    an estimate (`_excess`), which a flat spectrum can deceive, and below about 1e-8 |D|_F^2 float32
    hides what is missing. Where 24 steps do not reach it
    a warning is logged. With ``energy`` in (0, 1], k is the smallest rank, up to the above, that keeps this share of
    |D|_F^2, or the above where none does. ``space`` is `first_space`, or knows what that would return.

    Method: block Krylov with Rayleigh-Ritz. The space V starts as the rows of ``start`` and 8 or more fixed Gaussian
    ones; a step takes the k leading left Ritz vectors U of D V, and adds D^T U to V: two passes over D, k columns wide.
    From rank min(M, N) / 12 on, the eigenvectors of the smaller Gram matrix in float64 are faster and exact.
    The same input, device and thread count give the same result; no global random state is read or written.
    Memory beyond D: O((M + N) (p + k steps)) in float64; for the Gram matrix 24 min(M, N)^2 bytes or so.

    Source: Musco and Musco, "Randomized block Krylov methods", NeurIPS 2015; the choice of Ritz vectors is Davidson's.
    Raises ValueError for shapes, dtypes or a request that do not fit, and for values that are not finite.
    """
    if matrix.ndim != 2 or 0 in matrix.shape or matrix.dtype != torch.float32:
        raise ValueError(f"matrix is {list(matrix.shape)} {matrix.dtype}, wanted [M, N] float32 with no empty side")
    if start.ndim != 2 or start.shape[1] != matrix.shape[1]:
        raise ValueError(f"start is {list(start.shape)}, wanted [p, {matrix.shape[1]}]")
    _check(rank, energy)
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}, wanted more than 0")
    total = passes.squared_norm(matrix)
    if not (math.isfinite(total) and passes.finite(start)):
        raise ValueError("matrix or start is not finite")
    if total >= torch.finfo(torch.float32).max ** 2:  # no product with a unit vector is larger
        raise ValueError(f"the norm of matrix is {math.sqrt(total):.1e}: its products do not fit float32")

    start = start.to(matrix.device, torch.float64)
    rank = min(rank, *matrix.shape)
    k = rank if energy is None else min(rank, max(start.shape[0], 16))
    while True:
        if k * _DENSE_FRACTION > min(matrix.shape):
            left, right = _eigen(matrix, rank, math.inf if energy is None else energy * total)
            break
        left, right = _krylov(matrix, space(start, (matrix.shape[0], matrix.shape[1]), k), k, total, tolerance)
        if energy is None or k == rank:
            break
        # No later singular value is larger than the last one found, so a rank below this one will not do.
        squares = torch.linalg.eigvalsh(right @ right.T)
        missing = energy * total - float(squares.sum())
        if missing <= 0:
            break
        least = k + missing / max(float(squares[0]), missing / rank)
        k = min(rank, max(2 * k, math.ceil(least)))
        start, space = right, first_space
    return _cut(left, right, rank, energy, total=total)


# Vectors are rows from here on, in float64: rows that join lie behind the others, and BLAS multiplies few rows sooner
# than few columns.


def _krylov(matrix: Tensor, new: Tensor, k: int, total: float, tolerance: float) -> tuple[Tensor, Tensor]:
    """U [k, M] orthonormal and U D [k, N], with U^T U D near the best approximation of rank k; new: `first_space`."""
    widest = min(matrix.shape) // 2
    v = new.new_empty(0, matrix.shape[1])
    w = new.new_empty(0, matrix.shape[0])  # V D^T
    gram = new.new_empty(0, 0)  # W W^T
    captured: list[float] = []
    for _ in range(_MAX_STEPS):
        if len(v) + len(new) > widest:
            return _eigen(matrix, k, math.inf)
        v = torch.cat([v, new])
        image = passes.times(new, matrix)
        border = w @ image.T
        gram = torch.cat([torch.cat([gram, border], dim=1), torch.cat([border.T, image @ image.T], dim=1)])
        w = torch.cat([w, image])
        u = _orthonormal(torch.linalg.eigh(gram).eigenvectors[:, -k:].T @ w)
        z = passes.times(u, matrix.T)
        captured.append(float(z.square().sum()))
        excess = _excess(captured, total)
        if excess <= max(tolerance * (total - captured[-1]), _NOISE * total):
            return u, z
        # A vector that has converged leaves nothing but rounding, which no projection could keep orthogonal to V.
        rest = z - z @ v.T @ v
        rest = rest[rest.norm(dim=1) > _CONVERGED * z.norm(dim=1)]
        if len(rest) == 0:
            return u, z
        new = _orthonormal(rest)
        new = _orthonormal(new - new @ v.T @ v)
    logger.warning(
        "rank %d of a matrix %s: after %d steps the squared error is about %.1e of the least above it, wanted %.1e",
        *(k, list(matrix.shape), _MAX_STEPS, excess / max(total - captured[-1], _NOISE * total), tolerance),
    )
    return u, z


def _excess(captured: Sequence[float], total: float) -> float:
    """The energy that further steps would still capture: gain * q / (1 - q), a geometric series of ratio q.

    q is the ratio of the last two gains. Krylov spaces converge faster than any geometric series, so q falls from step
    to step and the estimate errs on the high side, once the first steps have done away with what is easy: for these q
    is bounded from below. With one gain only, q = 1/2. The energy may fall for a step, since the Ritz vectors are the
    best for D V and not for D: that tells nothing, unless it is rounding.
    """
    if len(captured) < 2:
        return math.inf
    gain = captured[-1] - captured[-2]
    if gain <= 0:
        return 0.0 if -gain <= _BLUR * total else math.inf
    if len(captured) == 2:
        return gain
    before = captured[-2] - captured[-3]
    if gain >= before:
        return math.inf
    ratio = max(gain / before, _BEST_RATIO)
    return gain * ratio / (1 - ratio)


def _eigen(matrix: Tensor, k: int, enough: float) -> tuple[Tensor, Tensor]:
    """Factors [k, M] and [k, N] of the best approximation, from the eigenvectors of the smaller Gram matrix.

    k falls to the smallest rank that captures ``enough`` energy, and one more against rounding.
    """
    if matrix.shape[0] < matrix.shape[1]:
        right, left = _eigen(matrix.T, k, enough)
        return left, right
    n = matrix.shape[1]
    gram = torch.zeros(n, n, dtype=torch.float64, device=matrix.device)
    for rows in matrix.split(512):
        wide = rows.double()
        gram.addmm_(wide.T, wide)
    squares, vectors = torch.linalg.eigh(gram)
    k = min(k, 2 + int((squares.flip(0).cumsum(0) < enough).sum()))
    right = vectors[:, -k:].T
    return passes.times(right, matrix), right


def _cut(left: Tensor, right: Tensor, rank: int, energy: float | None, *, total: float) -> LowRank:
    """left.T @ right [M, N] cut to the rank asked for; ``total`` is |D|_F^2."""
    of_left, of_right = torch.geqrf(left.T), torch.geqrf(right.T)
    core = _leading(_upper(of_left) @ _upper(of_right).T, rank, energy, total=total)
    return _unfolded(core, of_left, of_right)


def _leading(
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


def _unfolded(core: Leading, left: Decomposed, right: Decomposed) -> LowRank:
    """Q_left @ core @ Q_right.T."""
    return _rounded(_q_times(right, core.vh.T).T, _q_times(left, core.u * core.s), core)


def _rounded(A: Tensor, B: Tensor, core: Leading) -> LowRank:
    """The factors in float32; raises ValueError where that is too narrow."""
    A, B = A.float().contiguous(), B.float().contiguous()
    if not passes.finite(B):
        raise ValueError(f"the largest singular value is {float(core.s[0]):.1e}: B does not fit float32")
    return LowRank(A, B, core.kept)


def _q_times(decomposed: Decomposed, block: Tensor) -> Tensor:
    """Q @ block [p, k] for Q [m, p] by its reflectors: a third of a QR would go into a Q that is not asked for."""
    packed, tau = decomposed
    tall = block.new_zeros(len(packed), block.shape[1])
    tall[: len(block)] = block
    return torch.ormqr(packed[:, : len(tau)], tau, tall)


def _stacked(blocks: Sequence[Tensor]) -> Tensor:
    """[X_1; ...; X_n], X_i [r_i, n], in float64."""
    stacked = torch.cat([block.double() for block in blocks])
    if 0 in stacked.shape:
        raise ValueError(f"the stacked factors are {list(stacked.shape)}, wanted no empty side")
    return stacked


def _completed(rows: Tensor, count: int) -> Tensor:
    """Orthonormal rows, and more of them up to that number."""
    if len(rows) == count:
        return rows
    generator = torch.Generator().manual_seed(0)
    more = torch.randn(count - len(rows), rows.shape[1], generator=generator, dtype=torch.float64).to(rows.device)
    for _ in range(2):
        more = _orthonormal(more - more @ rows.T @ rows)
    return torch.cat([rows, more])


def _upper(decomposed: Decomposed) -> Tensor:
    packed, tau = decomposed
    return packed[: len(tau)].triu()


def _orthonormal(block: Tensor) -> Tensor:
    return torch.linalg.qr(block.T)[0].T


def _check(rank: int, energy: float | None) -> None:
    if rank < 1:
        raise ValueError(f"rank is {rank}, wanted at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy is {energy}, wanted 0 < energy <= 1")
