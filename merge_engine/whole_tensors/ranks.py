"""What DELLA keeps of a row: elements by chances that grow with the ranks of their magnitudes."""

import numpy as np
import torch
from torch import Tensor

from merge_engine.loops import door
from merge_engine.runtime.memory import scratch


def chances_of_ranks(columns: int, density: float, epsilon: float) -> np.ndarray:
    """p of each rank from below, float64: density - epsilon + 2 epsilon rank / (columns - 1)."""
    return np.linspace(density - epsilon, density + epsilon, columns) if columns > 1 else np.array([density])


def keep_by_rank(sizes: Tensor, words: np.ndarray, chances: np.ndarray, kept: Tensor, factors: Tensor | None) -> None:
    """kept = words < chances[rank] 2**32, the rank of |x| in its row from below; of equal ones the first is the lower.

    sizes: |x|, float32 [rows, columns], in place 0 where it is not kept; words: uint32, and kept: bool, of this shape.
    factors: kept / chances[rank], if wanted, float32. All are contiguous.
    """
    limits = np.rint(chances * 2.0**32)  # whole numbers up to 2**32: exact in float64
    rank_loops = door.rank_loops(sizes.numel())
    if rank_loops is None:
        _by_sort(sizes, words, limits, chances, kept.numpy(), factors)
        sizes.mul_(kept)
        return
    columns = sizes.shape[1]
    found = torch.empty((0, columns)) if factors is None else factors
    rank_loops.keep_by_rank(
        sizes.numpy().view(np.uint32),
        words,
        limits.astype(np.uint64),
        (1 / chances).astype(np.float32),
        kept.numpy(),
        found.numpy(),
        scratch("keys", (2, columns), torch.int64).numpy().view(np.uint64),
        scratch("counts", (rank_loops.DIGITS, rank_loops.RADIX), torch.int64).numpy(),
    )


def _by_sort(
    sizes: Tensor, words: np.ndarray, limits: np.ndarray, chances: np.ndarray, kept: np.ndarray, factors: Tensor | None
) -> None:
    """`keep_by_rank` without the compiled loops."""
    bits = sizes.numpy().view(np.int32)  # monotone in |x|
    keys = (bits.astype(np.int64) << 32) | np.arange(bits.shape[1], dtype=np.int64)
    keys.sort(axis=1)
    keys &= 0xFFFFFFFF
    stays = np.take_along_axis(words, keys, 1) < limits
    np.put_along_axis(kept, keys, stays, 1)
    if factors is not None:
        np.put_along_axis(factors.numpy(), keys, np.divide(stays, chances).astype(np.float32), 1)
