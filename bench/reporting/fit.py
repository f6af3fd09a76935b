"""A straight line through costs by size."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Line:
    """y = intercept + slope x; residual: the largest |fitted - y| / y."""

    slope: float
    intercept: float
    residual: float


def fit(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """The line with the least sum of squared relative residuals, so that small sizes count as much as large ones.

    A cost that is linear but not proportional has an intercept; one that is not linear has a residual. Raises
    ValueError for fewer than two sizes, or a cost that is not positive.
    """
    if len(xs) != len(ys) or len(set(xs)) < 2 or min(ys) <= 0:
        raise ValueError(f"a line wants at least two sizes and positive costs, got {list(xs)} and {list(ys)}")
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (xs, ys))
    solution = torch.linalg.lstsq(torch.stack([1 / y, x / y], 1), torch.ones(len(y), 1, dtype=torch.float64)).solution
    intercept, slope = solution.flatten().tolist()
    residual = float(((intercept + slope * x - y).abs() / y).max())
    return Line(slope, intercept, residual)
