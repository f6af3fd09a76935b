"""The triangle of a QR decomposition X = Q R: Q times a block as a combination of the columns of X."""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from merge_engine.lowrank.small_svd import rounding

# Below this share of what it is the sum of, a number has a relative rounding error of 2**-33 or more.
CANCELLED = 2.0**-20
# What a solution may miss of a column, as a share of it: a 64th of what rounding to float32 loses.
_MISSED = 2.0**-30
_EPS = torch.finfo(torch.float64).eps


class Triangle:
    """R [p, n] in float64, p <= n: a trapezoid where X has more columns than rows. lengths [n]: of its columns."""

    def __init__(self, upper: Tensor, lengths: Tensor) -> None:
        self.upper, self._lengths = upper, lengths
        self._is_known = False  # whether it was of use before

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return self.upper.nbytes + self._lengths.nbytes

    def combination(self, block: Tensor) -> Tensor | None:
        """C [k, n] with R C^T = block [p, k], on the CPU, so that Q @ block = X C^T.

        None where there is no such C, or large columns cancel in it.
        """
        upper, lengths, block = self.upper.cpu(), self._lengths.cpu(), block.cpu()
        if self._is_known and self._is_safe:
            return torch.linalg.solve_triangular(upper, block, upper=True).T
        self._is_known = True
        wanted = torch.linalg.vector_norm(block, dim=0)
        for solution in _solutions(upper, lengths, block):
            sums = CANCELLED * (lengths @ solution.abs()) <= wanted
            missed = torch.linalg.vector_norm(upper @ solution - block, dim=0)
            if (sums & (missed <= _MISSED * wanted)).all():
                return solution.T
        return None

    @cached_property
    def _is_safe(self) -> bool:
        """Whether substitution passes the checks for any block: they cost more than one look at the triangle.

        With columns of length 1, |C|_1 <= sqrt(n) |R^-1|_F |block|, and substitution misses up to n 2**-52 times that.
        """
        p, n = self.upper.shape
        if p < n:
            return False
        unit = (self.upper / self._lengths).cpu()
        inverse = torch.linalg.solve_triangular(unit, torch.eye(n, dtype=torch.float64), upper=True)
        sums = n**0.5 * float(torch.linalg.matrix_norm(inverse))  # NaN or Inf where R is singular
        return CANCELLED * sums <= 1 and n * _EPS * sums <= _MISSED


def _solutions(upper: Tensor, lengths: Tensor, block: Tensor) -> Iterator[Tensor]:
    """C^T with R C^T = block, if there is one: first by substitution, which is fastest, then of the least norm.

    That of the least norm, for columns of length 1, spreads C over columns that depend on each other, and gives nothing
    to columns of zeros.
    """
    if upper.shape[0] == upper.shape[1]:
        yield torch.linalg.solve_triangular(upper, block, upper=True)  # Inf or NaN where it is singular
    lengths = torch.where(lengths > 0, lengths, 1.0)[:, None]
    # LAPACK's gelsy is faster, but torch leaves its pivots uninitialised.
    least = torch.linalg.lstsq(upper / lengths.T, block, rcond=rounding(upper.shape[1]), driver="gelsd").solution
    yield least / lengths
