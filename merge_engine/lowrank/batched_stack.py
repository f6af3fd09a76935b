"""Stacked factors of a group of modules, decomposed all at once, and cut to a rank for sums and merged cores.

`stack.Stack` for many modules: only products with the long sides run on the device, in one call each for the group;
the small cores are the host's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from merge_engine.lowrank.batched import Cuts
from merge_engine.lowrank.batched_qr import gaussians, orthonormal_rows
from merge_engine.lowrank.small_svd import Leading, Svd, check_request, leading, leading_of, rounding
from merge_engine.lowrank.stacked_rows import owners
from merge_engine.runtime.finite import finite

# What a decomposition may miss of a row, as a share of its length; `stack` rounds products to 2**-24.
_MISSED = 2.0**-44


class Triangles(NamedTuple):
    """What `Cores` needs of a module's stacked factors: see `Stack.triangles` and `Stack.sizes`."""

    ranks: list[int]
    triangles: tuple[Tensor, Tensor]
    sizes: Tensor


class Stacks:
    """Sums of products of G modules: ``rows`` A [G, R, N] and ``columns`` B^T [G, R, M], their adapters stacked.

    ``ranks`` r_t of the adapters, the same in every module, R = sum r_t <= min(M, N). Any float dtype.
    A = (A Q_A^T) Q_A and B^T = (B^T Q_B^T) Q_B with orthonormal rows Q_A [G, R, N] and Q_B [G, R, M] of shifted
    CholeskyQR3 (`batched_qr`), all in float64 on the device of the factors; R_A = (A Q_A^T)^T and R_B are copied to the
    host once. Unlike those of `Stack` they are triangles up to rounding only: nothing uses that.

    ``found``: whether a module is decomposed as well as `Stack` does it. Not found, and left to `Stack`: factors that
    are not finite, or of which a row misses more than 2**-44 of its length; that takes rows which depend on each other
    up to a share between 2**-44 and 1e-8. Rows that are equal, or zero, do no harm.
    Memory: 3 R (M + N) numbers in float64 a module while it is made (`nbytes`), R (M + N) later.

    Raises ValueError for shapes that do not fit.
    """

    def __init__(self, rows: Tensor, columns: Tensor, ranks: Sequence[int]) -> None:
        if rows.ndim != 3 or columns.ndim != 3 or rows.shape[:2] != columns.shape[:2] or 0 in rows.shape[:2]:
            raise ValueError(f"got {list(rows.shape)} and {list(columns.shape)}, wanted [G, R, N] and [G, R, M]")
        g, r = rows.shape[:2]
        if sum(ranks) != r or r > min(rows.shape[2], columns.shape[2]):
            raise ValueError(f"ranks are {list(ranks)}, wanted a sum of {r}, and no more than M and N")
        self.ranks = list(ranks)
        self._right, *right = _decomposed(rows.double())
        self._left, *left = _decomposed(columns.double())
        numbers = torch.cat([part.flatten(1) for part in (*left, *right)], dim=1).cpu()  # waits for the device
        parts = numbers.split([r * r, r, r] * 2, dim=1)
        self._triangles = [side.view(g, r, r).mT for side in (parts[0], parts[3])]
        self._sizes = parts[1] * parts[4]
        missed = torch.maximum(parts[2], parts[5]).amax(1)  # NaN where a number is not finite
        self.found: list[bool] = (missed <= _MISSED).tolist()

    @staticmethod
    def nbytes(r: int, m: int, n: int) -> int:
        """Bytes that making this takes for each module of R, M and N, about."""
        return 8 * 3 * r * (m + n)

    def __len__(self) -> int:
        return len(self.found)

    def triangles(self, i: int) -> Triangles:
        """R_B [R, R], R_A [R, R] and |B[:, j]| |A[j]| of each stacked column and row j, of one module, on the host."""
        left, right = self._triangles
        return Triangles(self.ranks, (left[i], right[i]), self._sizes[i])

    def cut(
        self, strengths: Sequence[Sequence[float]], rank: int, energy: float | None = None
    ) -> tuple[Cuts, list[Tensor | None]]:
        """B A = the best approximation of rank k of sum_t w_t B_t A_t, w = strengths[i] in module i: as `Stack.cut`.

        And the singular values of each sum, of modules that are ``found``.
        """
        check_request(rank, energy)
        cores: list[Leading | None] = []
        adapters = owners(self.ranks)
        for i, own in enumerate(strengths):
            (left, right), columns = self.triangles(i).triangles, torch.tensor(own, dtype=torch.float64)[adapters]
            scale = float((columns.abs() * self._sizes[i]).sum())
            core, noise = (left * columns) @ right.T, max(rounding(len(columns)), 2 * _MISSED) * scale
            known = self.found[i] and finite(core)
            cores.append(leading(core, rank, energy, noise=noise) if known else None)
        return self._unfolded(cores, rank)

    def unfold(
        self, cores: Sequence[Svd | None], noises: Sequence[float], rank: int, energy: float | None = None
    ) -> tuple[Cuts, list[Tensor | None]]:
        """B A = the best approximation of rank k of Q_B X Q_A^T, X = cores[i] [R, R] float64: see `Stack.unfold_svd`.

        Singular values up to noises[i] count as zero. None: a module that is not wanted.
        """
        check_request(rank, energy)
        given: list[Leading | None] = []
        for i, (core, noise) in enumerate(zip(cores, noises, strict=True)):
            if core is None or not (self.found[i] and finite(core.s)):
                given.append(None)
                continue
            own = rounding(len(core.s)) * float(torch.linalg.vector_norm(core.s))
            given.append(leading_of(core, rank, energy, max(noise, own)))
        return self._unfolded(given, rank)

    def _unfolded(self, cores: Sequence[Leading | None], rank: int) -> tuple[Cuts, list[Tensor | None]]:
        r = self._left.shape[1]
        small = torch.zeros(2, len(self), min(rank, r), r, dtype=torch.float64)
        energies, ranks = [], []
        for i, found in enumerate(cores):
            if found is not None:
                small[0, i, : len(found.s)] = (found.u * found.s).T
                small[1, i, : len(found.s)] = found.vh
            energies.append(found.kept if found else 0.0)
            ranks.append(len(found.s) if found else 0)
        of_left, of_right = small.to(self._left.device).unbind()
        both = torch.cat([torch.bmm(of_left, self._left), torch.bmm(of_right, self._right)], dim=2).float().cpu()
        B, A = both.split([self._left.shape[2], self._right.shape[2]], dim=2)
        fits = both.isfinite().flatten(1).all(1).tolist()
        cuts = Cuts(A, B.mT, energies, [k if fit else 0 for k, fit in zip(ranks, fits, strict=True)])
        return cuts, [None if found is None else found.values for found in cores]


def _decomposed(block: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Q [G, R, n], P Q^T [G, R, R], and of each row of P = ``block`` its length and what share of it Q misses [G, R].

    What Q misses of I counts for every row.
    """
    r, n = block.shape[1:]
    rows = orthonormal_rows(block, gaussians(r, n, block.device)).rows
    triangle = torch.bmm(block, rows.mT)
    lengths = torch.linalg.vector_norm(block, dim=2)
    rest = torch.linalg.vector_norm(torch.baddbmm(block, triangle, rows, alpha=-1), dim=2)
    identity = torch.eye(r, dtype=rows.dtype, device=rows.device)
    turned = torch.linalg.vector_norm(torch.bmm(rows, rows.mT) - identity, dim=2)
    return rows, triangle, lengths, torch.maximum(rest / lengths.clamp(min=1e-290), turned)
