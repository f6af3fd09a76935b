"""Low-rank factors of a dense merged delta, by a Krylov iteration.

``|D - B A|_F`` is the smallest that rank k allows, and the factors are split as PEFT splits them: ``B = U S, A = Vh``.
Matrices with few columns are handled in float64, which costs next to nothing. The dense one is only multiplied: in
float32, and on a GPU in float64. Rounding the factors to float32 moves their product by at most ``2 * 2**-24 |B A|_F``.
"""

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from merge_engine.lowrank.products import squared_norm, times
from merge_engine.lowrank.small_svd import (
    ROUNDED,
    Leading,
    LowRank,
    asks_for_all,
    check_request,
    leading,
    orthonormal,
    unfolded,
    upper,
)
from merge_engine.runtime.finite import finite

logger = logging.getLogger(__name__)
# Gaussian rows that are added to the start, so that no direction of the matrix is missed. The space starts at least so
# much wider than the rank: of a repeated singular value it never finds more vectors than it has rows at first.
_OVERSAMPLING = 8
# From rank n / 12 on, all n eigenvectors of the Gram matrix are faster than the leading ones alone. On two Zen 4 cores,
# 2048 x 2048, in seconds, Krylov against Gram: 0.02 and 1.0 at rank 16, 0.4 and 1.1 at 128, 1.9 and 1.1 at 256.
_DENSE_FRACTION = 12
_MAX_STEPS = 24
_ROOM = 3  # steps whose rows find room beside those of the first: most iterations end within these
# Ritz vectors that are multiplied beside the k that are wanted: without them what lies next to the k-th singular value
# converges slowly, and a merge by ties takes one step more.
_GUARDS = 4
# The estimate of `_excess` assumes that half a step leaves at least this share of the excess.
_BEST_RATIO = 0.3
# An excess below this share of |D|_F^2 counts as none: products in float32 change the captured energy by more.
_NOISE = 2.0**-32
_CONVERGED = 2.0**-20  # of a vector's norm: what is left of a vector that has converged is below this share
_BLUR = 2.0**-26  # how much float32 products change the captured energy, as a share of |D|_F^2


def first_space(start: Tensor, shape: tuple[int, int], k: int) -> Tensor:
    """Orthonormal rows [p, N] in float64, with which the iteration for k vectors of a [M, N] = ``shape`` matrix begins.

    They span the rows of ``start`` [., N], or min(M, N) / 4 random sums of these where there are more, and fixed
    Gaussian rows: 8, or more so that p is at least k + 8.
    """
    widest = min(shape) // 4
    generator = torch.Generator().manual_seed(0)
    if len(start) > widest:
        start = torch.randn(widest, len(start), generator=generator, dtype=torch.float64).to(start.device) @ start
    count = max(_OVERSAMPLING, k + _OVERSAMPLING - len(start))
    gaussians = torch.randn(count, shape[1], generator=generator, dtype=torch.float64)
    return orthonormal(torch.cat([start, gaussians.to(start.device)]))


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

    ``matrix`` is [M, N] float32; ``start`` [p, N], of any floating dtype and with any p, holds rows whose span contains
    most of D, such as the stacked A of the merged adapters: the better they are, the fewer the steps.
    ``tolerance`` bounds the excess (|D - B A|_F^2 - best) / best, so the error itself is within tolerance / 2 of the
    best. The excess is estimated (`_excess`): a flat spectrum can deceive the estimate, and so can a start of exact
    singular vectors, where those that it lacks are hardly larger. float32 hides what is below about 1e-8 |D|_F^2. A
    warning is logged where 24 steps do not reach the tolerance. With ``energy`` in (0, 1], k is the smallest rank, up
    to the above, that keeps this share of |D|_F^2, or the above where none does; with 1, or a number within 2**-26 of
    it, the numerical rank of D: how many singular values are above 2**-21 |D|_F. ``space`` is `first_space`, or a
    function that returns what that would return.

    Method: block Krylov with Rayleigh-Ritz. The space V starts as the rows of ``start`` and 8 or more fixed Gaussian
    ones; a step takes the k + 4 leading left Ritz vectors U of D V, and adds D^T U to V: two passes over D, so many
    columns wide. It ends after either pass.
    From rank min(M, N) / 12 on, the eigenvectors of the smaller Gram matrix in float64 are faster and exact.
    The same input, device and thread count give the same result; no global random state is read or written.
    Memory beside D: O((M + N) (p + k steps)) in float64; for the Gram matrix about 24 min(M, N)^2 bytes.

    Source: Musco and Musco, "Randomized block Krylov methods", NeurIPS 2015; the choice of Ritz vectors is Davidson's.
    Raises ValueError for shapes, dtypes or a request that do not fit, and for values that are not finite.
    """
    if matrix.ndim != 2 or 0 in matrix.shape or matrix.dtype != torch.float32:
        raise ValueError(f"matrix is {list(matrix.shape)} {matrix.dtype}, wanted [M, N] float32 with no empty side")
    if start.ndim != 2 or start.shape[1] != matrix.shape[1]:
        raise ValueError(f"start is {list(start.shape)}, wanted [p, {matrix.shape[1]}]")
    check_request(rank, energy)
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}, wanted more than 0")
    total = squared_norm(matrix)
    if not (math.isfinite(total) and finite(start)):
        raise ValueError("matrix or start is not finite")
    if total >= torch.finfo(torch.float32).max ** 2:  # no product with a unit vector is larger
        raise ValueError(f"the norm of matrix is {math.sqrt(total):.1e}: its products overflow float32")

    start = start.to(matrix.device, torch.float64)
    rank = min(rank, *matrix.shape)
    whole = asks_for_all(energy)
    share = None if whole else energy
    k = rank if share is None else min(rank, max(start.shape[0], 16))
    while True:
        if k * _DENSE_FRACTION > min(matrix.shape):
            left, right = _eigen(matrix, rank, math.inf if share is None else share * total)
            break
        left, right = _krylov(matrix, space(start, (matrix.shape[0], matrix.shape[1]), k), k, total, tolerance)
        if share is None or k == rank:
            break
        # No later singular value is larger than the last one found, so a rank below this one will not do.
        squares = torch.linalg.eigvalsh(right @ right.T)
        missing = share * total - float(squares.sum())
        if missing <= 0:
            break
        least = k + missing / max(float(squares[0]), missing / rank)
        k = min(rank, max(2 * k, math.ceil(least)))
        start, space = right, first_space
    return _cut(left, right, rank, share, total=total, whole=whole)


# From here on vectors are rows, in float64: new ones are appended in memory, and BLAS multiplies few rows faster than
# few columns.


def _krylov(matrix: Tensor, new: Tensor, k: int, total: float, tolerance: float) -> tuple[Tensor, Tensor]:
    """U [k, M] orthonormal and R [k, N], with U^T R near the best approximation of rank k; new: `first_space`."""
    widest, block = min(matrix.shape) // 2, k + _GUARDS
    v_rows, w_rows = _Rows(_ROOM * block), _Rows(_ROOM * block)
    w = new.new_empty(0, matrix.shape[0])  # V D^T
    gram = new.new_empty(0, 0)  # W W^T
    captured: list[float] = []

    def suffices() -> bool:
        excess = _excess(captured, total)
        return excess <= max(tolerance * (total - captured[-1]), _NOISE * total)

    for _ in range(_MAX_STEPS):
        if len(w) + len(new) > widest:
            return _eigen(matrix, k, math.inf)
        v = v_rows.extended(new)
        image = times(new, matrix)
        border = w @ image.T
        gram = torch.cat([torch.cat([gram, border], dim=1), torch.cat([border.T, image @ image.T], dim=1)])
        w = w_rows.extended(image)
        squares, vectors = torch.linalg.eigh(gram)
        captured.append(float(squares[-k:].sum()))
        u = orthonormal(vectors[:, -block:].T @ w)
        if suffices():
            return u[-k:], u[-k:] @ w.T @ v
        z = times(u, matrix.T)
        squares, turn = torch.linalg.eigh(z @ z.T)
        captured.append(float(squares[-k:].sum()))
        best = turn[:, -k:].T
        if suffices():
            return best @ u, best @ z
        rest = _outside(z, v)
        if len(rest) == 0:
            # The leading vectors have converged, if any others in the space stay in it as well: it may have started
            # from exact singular vectors, and not the leading ones.
            others = orthonormal(vectors[:, :-block].T @ w)
            rest = _outside(times(others, matrix.T), v)
            if len(rest) == 0:
                return best @ u, best @ z
        new = orthonormal(rest)
        new = orthonormal(new - new @ v.T @ v)
    logger.warning(
        "rank %d of a matrix %s: after %d steps the squared error is about %.1e of the least above it, wanted %.1e",
        *(k, list(matrix.shape), _MAX_STEPS),
        *(_excess(captured, total) / max(total - captured[-1], _NOISE * total), tolerance),
    )
    return best @ u, best @ z


def _outside(z: Tensor, v: Tensor) -> Tensor:
    """z less its part in the span of the rows v, without the rows that have converged.

    What is left of these is rounding, which no projection could make orthogonal to V.
    """
    rest = z - z @ v.T @ v
    return rest[rest.norm(dim=1) > _CONVERGED * z.norm(dim=1)]


class _Rows:
    """Rows to which others are added, mostly without a copy of those that are there: there is room for `more`."""

    def __init__(self, more: int) -> None:
        self._more, self._count = more, 0
        self._memory: Tensor | None = None

    def extended(self, new: Tensor) -> Tensor:
        """All rows, the new ones last: a view."""
        start, self._count = self._count, self._count + len(new)
        if self._memory is None or self._count > len(self._memory):
            grown = new.new_empty(self._count + self._more, new.shape[1])
            if self._memory is not None:
                grown[:start] = self._memory[:start]
            self._memory = grown
        self._memory[start : self._count] = new
        return self._memory[: self._count]


def _excess(captured: Sequence[float], total: float) -> float:
    """The energy that further half steps would capture, as a geometric series of ratio q: gain * q / (1 - q).

    q is the larger one of the last two ratios of gains, since the two halves of a step need not gain alike, and at
    least _BEST_RATIO. Krylov spaces converge faster than any geometric series, so q falls from step to step and the
    estimate is too high rather than too low. Only the first steps, which capture what is easy, make q too small. No
    energy falls but for rounding: the space grows, and what the Ritz vectors capture of D is at least what they capture
    of D V. With fewer than three gains nothing is known (Inf).
    """
    if len(captured) < 4:
        return math.inf
    first, before, gain = (captured[i] - captured[i - 1] for i in (-3, -2, -1))
    if gain <= 0:
        return 0.0 if -gain <= _BLUR * total else math.inf
    if gain >= before or before >= first:
        return math.inf
    ratio = max(gain / before, before / first, _BEST_RATIO)
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
    return times(right, matrix), right


def _cut(left: Tensor, right: Tensor, rank: int, energy: float | None, *, total: float, whole: bool) -> LowRank:
    """left.T @ right [M, N] cut to the rank asked for; ``total`` is |D|_F^2. whole: to the numerical rank."""
    of_left, of_right = torch.geqrf(left.T), torch.geqrf(right.T)
    core = leading(upper(of_left) @ upper(of_right).T, rank, energy, total=total)
    return unfolded(_whole(core, total) if whole else core, of_left, of_right)


def _whole(core: Leading, total: float) -> Leading:
    """The core without what may be rounding alone; if there is such, all of |D|_F^2 is kept."""
    k = max(1, int((core.s > ROUNDED * math.sqrt(total)).sum()))
    if k == len(core.s) and total > 0:
        return core
    return core._replace(u=core.u[:, :k], s=core.s[:k], vh=core.vh[:k], kept=1.0)
