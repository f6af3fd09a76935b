"""Stacked rows of thin factors, kept as narrow as they came, and multiplied in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor

from merge_engine.runtime.memory import scratch

_AT_A_TIME = 1 << 20  # elements that are widened at once


def owners(counts: Sequence[int]) -> Tensor:
    """The number of its adapter for each of the stacked rows of all adapters, of which they have so many each."""
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))


class StackedRows:
    """X = [X_1; ...; X_n] [R, N] of X_i [r_i, N], any float dtypes: in float32, or in float64 where one of them has it.

    A product widens X into a buffer of the thread, which it finds in the processor's cache the next time: so it takes
    less time than to read X in float64.

    Raises ValueError where a side is empty.
    """

    def __init__(self, rows: Sequence[Tensor]) -> None:
        stacked = torch.cat(list(rows))
        if 0 in stacked.shape:
            raise ValueError(f"the stacked factors are {list(stacked.shape)}, wanted no empty side")
        self._rows = stacked.to(torch.promote_types(stacked.dtype, torch.float32))

    @property
    def shape(self) -> tuple[int, int]:
        """[R, N]."""
        return len(self._rows), self._rows.shape[1]

    @property
    def device(self) -> torch.device:
        """Where X lies."""
        return self._rows.device

    @property
    def nbytes(self) -> int:
        """Bytes of X."""
        return self._rows.nbytes

    def wide(self) -> Tensor:
        """X [R, N] in float64."""
        return self._rows.double()

    def combined(self, combination: Tensor, dtype: torch.dtype, *, turned: bool = False) -> Tensor:
        """combination [k, R] @ X [k, N], float64, rounded to ``dtype``; or its transpose [N, k] where turned.

        It is transposed after it is made: MKL multiplies two transposed matrices five times as slowly on some machines.
        """
        k, (rows, columns) = len(combination), self.shape
        out = self._rows.new_empty((columns, k) if turned else (k, columns), dtype=dtype)
        step = max(_AT_A_TIME // rows, 1)
        for start in range(0, columns, step):
            some = _widened(self._rows[:, start : start + step])
            stop = start + some.shape[1]
            product = torch.mm(combination, some, out=_buffer("product", (k, stop - start), some))
            if turned:
                out[start:stop] = product.to(dtype).T
            else:
                out[:, start:stop] = product
        return out


def _widened(block: Tensor) -> Tensor:
    return block if block.dtype == torch.float64 else _buffer("block", block.shape, block).copy_(block)


def _buffer(name: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory in float64 for a moment: this thread's, where it is the CPU's."""
    if like.device.type == "cpu":
        return scratch(f"stacked rows: {name}", shape, torch.float64)
    return like.new_empty(tuple(shape), dtype=torch.float64)
