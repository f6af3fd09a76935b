"""Sums of products B_i A_i: the stacked factors are decomposed once, and cut to a rank for any weights."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from merge_engine.lowrank.small_svd import (
    Leading,
    LowRank,
    Svd,
    check_request,
    completed,
    leading,
    leading_of,
    q_times,
    rounded,
    rounding,
    unfolded,
    upper,
)
from merge_engine.lowrank.stacked_rows import StackedRows, owners
from merge_engine.lowrank.triangle import CANCELLED, Triangle
from merge_engine.runtime.finite import finite


def from_products(
    As: Sequence[Tensor], Bs: Sequence[Tensor], weights: Sequence[float], rank: int, energy: float | None = None
) -> LowRank:
    """B A = the best approximation of rank k of D = sum_i w_i B_i A_i, by QR of the stacked factors and a small SVD.

    ``As[i]`` is [r_i, N] and ``Bs[i]`` [M, r_i], of any floating dtype, on one device; the ranks r_i may differ, and
    weights be zero or negative. k = min(rank, M, N, sum r_i), since further rows could only be zero; with ``energy`` in
    (0, 1], the smallest k up to that which keeps this share of |D|_F^2, or that number where none does.

    Computed in float64 and rounded once: |B A - D_k|_F <= 2 * 2**-24 |D_k|_F, plus the rounding of float64, which shows
    only where products cancel: singular values below 2**-51 max(sum r_i, 8) sum_i |w_i| |B_i|_F |A_i|_F count as zero.
    Time O((M + N) (sum r_i)^2); no [M, N] matrix is made.

    Raises ValueError for shapes, weights or a request that do not fit, and where a factor is not finite or the result
    overflows float32.
    """
    return Stack(As, Bs).cut(weights, rank, energy)


class Stack:
    """Sums of products whose weights change: the stacked factors, and the triangles R of their QR in float64.

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
        self._owners = owners(self.ranks)
        self._left, self._right = StackedRows([B.T for B in Bs]), StackedRows(As)
        left, right = self._left.wide(), self._right.wide()
        lengths = torch.linalg.vector_norm(left, dim=1), torch.linalg.vector_norm(right, dim=1)
        self._norms = lengths[0] * lengths[1]
        if not finite(self._norms):
            raise ValueError("a factor is not finite")
        uppers = [upper(torch.geqrf(side.T)) for side in (left, right)]
        self._of_left, self._of_right = map(Triangle, uppers, lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        parts = self._left, self._right, self._of_left, self._of_right, self._norms, self._owners
        return sum(part.nbytes for part in parts)

    def cut(self, weights: Sequence[float], rank: int, energy: float | None = None) -> LowRank:
        """B A = the best approximation of rank k of ``sum_i w_i B_i A_i``, in O(r^3 + r k (M + N)).

        k = min(rank, M, N, sum r_i), or the smallest up to that which keeps ``energy`` of the squared norm. Singular
        values below 2**-51 max(sum r_i, 8) sum_i |w_i| |B_i|_F |A_i|_F count as zero.
        Raises ValueError for weights or a request that do not fit, and where the result overflows float32.
        """
        return self.cut_and_values(weights, rank, energy)[0]

    def cut_and_values(
        self, weights: Sequence[float], rank: int, energy: float | None = None
    ) -> tuple[LowRank, Tensor]:
        """`cut`, and all singular values of the sum, descending: see `Leading.values`."""
        if len(weights) != len(self.ranks):
            raise ValueError(f"got {len(weights)} weights, wanted {len(self.ranks)}")
        check_request(rank, energy)
        columns = torch.tensor(weights, dtype=torch.float64)[self._owners].to(self._norms.device)
        scale = float((columns.abs() * self._norms).sum())
        if not math.isfinite(scale):
            raise ValueError("a weight is not finite")
        noise = rounding(len(columns)) * scale
        core = leading((self._of_left.upper * columns) @ self._of_right.upper.T, rank, energy, noise=noise)
        found, k = int((core.s > 0).sum()), len(core.s)
        u, s, vh = core.u[:, :found], core.s[:found], core.vh[:found]
        if found and s[-1] <= CANCELLED * scale:  # X_A (W R_B^T U) is too inexact to be divided by S
            return unfolded(core, *(torch.geqrf(side.wide().T) for side in (self._left, self._right))), core.values
        of_left, of_right = vh @ self._of_right.upper * columns, (u / s).T @ self._of_left.upper * columns
        if found == k:
            A = self._right.combined(of_right, torch.float32)
            return rounded(A, self._left.combined(of_left, torch.float32, turned=True), core), core.values
        A, B = self._right.combined(of_right, torch.float64), self._left.combined(of_left, torch.float64)
        return rounded(completed(A, k), torch.nn.functional.pad(B, (0, 0, 0, k - found)).T, core), core.values

    @property
    def width(self) -> int:
        """N."""
        return self._right.shape[1]

    @property
    def triangles(self) -> tuple[Tensor, Tensor]:
        """R_B [p, R] and R_A [q, R] in float64, p = min(M, R), q = min(N, R), R = sum r_i: trapezoids if R > M or N.

        Column j belongs to the same adapter as row j of the stacked A. sum_i w_i B_i A_i = Q_B (R_B W R_A^T) Q_A^T.
        """
        return self._of_left.upper, self._of_right.upper

    @property
    def sizes(self) -> Tensor:
        """|B[:, j]| |A[j]| of each stacked column and row, [R] float64: rounding errors are shares of their sum."""
        return self._norms

    def unfold(self, core: Tensor, rank: int, energy: float | None = None, noise: float = 0.0) -> LowRank:
        """B A = the best approximation of rank k of ``Q_B X Q_A^T``, X = ``core`` [p, q] float64, p and q as above.

        k = min(rank, p, q), or the smallest up to that which keeps ``energy`` of |X|_F^2, as in `cut`; where X has
        fewer singular values than k, columns of B are zero. Singular values up to ``noise``, or up to
        2**-51 max(sum r_i, 8) |X|_F, count as zero. Computed in float64 and rounded once to float32; ``core`` may be on
        the CPU while the factors are elsewhere. O(R^3 + R k (M + N)): see `columns`.

        Raises ValueError for a core or a request that does not fit, and where the result overflows float32.
        """
        self._check_core(tuple(core.shape), core)
        check_request(rank, energy)
        own = rounding(self._left.shape[0]) * float(torch.linalg.matrix_norm(core))
        return self._unfolded(leading(core, rank, energy, noise=max(noise, own)))

    def unfold_svd(
        self, core: Svd, rank: int, energy: float | None = None, noise: float = 0.0
    ) -> tuple[LowRank, Tensor]:
        """`unfold` of a core whose decomposition is known, and its singular values; zero where they count as zero."""
        self._check_core((len(core.u), core.vh.shape[1]), core.s)
        check_request(rank, energy)
        own = rounding(self._left.shape[0]) * float(torch.linalg.vector_norm(core.s))
        cut = leading_of(core, rank, energy, max(noise, own))
        return self._unfolded(cut), cut.values

    def _check_core(self, shape: tuple[int, ...], numbers: Tensor) -> None:
        wanted = len(self._of_left.upper), len(self._of_right.upper)
        if shape != wanted or numbers.dtype != torch.float64:
            raise ValueError(f"core is {list(shape)} {numbers.dtype}, wanted {list(wanted)} float64")
        if not finite(numbers):
            raise ValueError("the merged core is not finite")

    def _unfolded(self, cut: Leading) -> LowRank:
        found, k = int((cut.s > 0).sum()), len(cut.s)
        of_left, of_right = cut.u[:, :found] * cut.s[:found], cut.vh[:found].T
        if found == k:
            A, B = self._narrow_rows(of_right), self._narrow_columns(of_left)
            return rounded(A, B, cut)
        B, A = self.columns(of_left), self.rows(of_right)
        return rounded(completed(A, k), torch.nn.functional.pad(B.T, (0, 0, 0, k - found)).T, cut)

    def columns(self, block: Tensor) -> Tensor:
        """Q_B @ block [M, k] of ``block`` [p, k], float64.

        As X_B @ C with R_B C = block, in a third of the time that Q takes. By the reflectors of a second QR where block
        is no combination of columns of R_B, or only one in which large columns cancel.
        """
        return _times_q(self._left, self._of_left, block).T

    def rows(self, block: Tensor) -> Tensor:
        """(Q_A @ block)^T [k, N] of ``block`` [q, k]; see `columns`."""
        return _times_q(self._right, self._of_right, block)

    def _narrow_columns(self, block: Tensor) -> Tensor:
        """`columns` in float32."""
        combination = self._of_left.combination(block)
        if combination is None:
            return self.columns(block)
        return self._left.combined(combination.to(self._left.device), torch.float32, turned=True)

    def _narrow_rows(self, block: Tensor) -> Tensor:
        """`rows` in float32."""
        combination = self._of_right.combination(block)
        if combination is None:
            return self.rows(block)
        return self._right.combined(combination.to(self._right.device), torch.float32)


def _times_q(stacked: StackedRows, triangle: Triangle, block: Tensor) -> Tensor:
    """(Q @ block)^T, stacked^T = Q @ triangle: see `Stack.columns`."""
    if block.shape[1] == 0:  # LAPACK refuses this
        return block.new_zeros(0, stacked.shape[1], device=stacked.device)
    combination = triangle.combination(block)
    if combination is None:
        return q_times(torch.geqrf(stacked.wide().T), block.to(stacked.device)).T
    return stacked.combined(combination.to(stacked.device), torch.float64)
