"""Sums of products whose weights change: the stacked factors are decomposed once, and weights act on a small core.

``sum_i w_i B_i A_i = Q_B (R_B W R_A^T) Q_A^T`` with ``[B_1 ... B_n] = Q_B R_B`` and ``[A_1^T ... A_n^T] = Q_A R_A``.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from merge_engine.lowrank import LowRank, _check, _q_times

Decomposed = tuple[Tensor, Tensor]  # reflectors of Q below R, and their factors, as LAPACK's geqrf packs them


class Stack:
    """The QR of stacked factors, in float64: ``As[i]`` [r_i, N], ``Bs[i]`` [M, r_i], of any float dtype, on one device.

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
        self._left, norms_left = _decomposed([B.T for B in Bs])
        self._right, norms_right = _decomposed(As)
        self._norms = norms_left * norms_right
        if not bool(self._norms.isfinite().all()):
            raise ValueError("a factor is not finite")

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.itemsize for part in (*self._left, *self._right, self._norms))

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
        u, s, vh = torch.linalg.svd((_upper(self._left) * columns) @ _upper(self._right).T, full_matrices=False)
        s = torch.where(s > 2 * max(len(columns), 8) * torch.finfo(s.dtype).eps * scale, s, 0.0)
        squares = s.square().cumsum(0)
        kept = squares / squares[-1] if float(squares[-1]) > 0 else torch.ones_like(squares)
        k = min(rank, len(s))
        if energy is not None:
            k = min(k, 1 + int((kept < energy).sum()))
        B = _q_times(_reflectors(self._left), u[:, :k] * s[:k]).float().contiguous()
        A = _q_times(_reflectors(self._right), vh[:k].T).T.float().contiguous()
        if not bool(B.isfinite().all()):
            raise ValueError(f"the largest singular value is {float(s[0]):.1e}: B does not fit float32")
        return LowRank(A, B, float(kept[k - 1]))


def _decomposed(blocks: Sequence[Tensor]) -> tuple[Decomposed, Tensor]:
    """(the QR, the norms of the columns) of [X_1^T ... X_n^T], X_i [r_i, n]; made in the memory of its result."""
    stacked = torch.empty(sum(map(len, blocks)), blocks[0].shape[1], dtype=torch.float64, device=blocks[0].device)
    if 0 in stacked.shape:
        raise ValueError(f"the stacked factors are {list(stacked.shape)}, wanted no empty side")
    for target, block in zip(stacked.split(list(map(len, blocks))), blocks, strict=True):
        target.copy_(block)
    norms = torch.linalg.vector_norm(stacked, dim=1)
    packed, tau = stacked.T, stacked.new_empty(min(stacked.shape))
    torch.geqrf(packed, out=(packed, tau))
    return (packed, tau), norms


def _upper(decomposed: Decomposed) -> Tensor:
    packed, tau = decomposed
    return packed[: len(tau)].triu()


def _reflectors(decomposed: Decomposed) -> Decomposed:
    packed, tau = decomposed
    return packed[:, : len(tau)], tau
