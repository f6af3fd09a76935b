"""Stacked rows of thin factors, kept as narrow as they came, and multiplied in float64."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from merge_engine.runtime.memory import scratch

_AT_A_TIME = 512  # columns of a block


class StackedRows:
    """X = [X_1; ...; X_n] [R, N] of X_i [r_i, N], any float dtypes: in float32, or in float64 where one of them has it.

    X lies in contiguous blocks [R, 512], the last one narrower. A product reads each block once and widens it to
    float64 in a buffer that stays in the processor's cache: that takes two thirds of the time of reading float64.

    Raises ValueError where a side is empty.
    """

    def __init__(self, rows: Sequence[Tensor]) -> None:
        self.shape = sum(map(len, rows)), rows[0].shape[1]
        if 0 in self.shape:
            raise ValueError(f"the stacked factors are {list(self.shape)}, wanted no empty side")
        dtype = torch.float64 if any(each.dtype == torch.float64 for each in rows) else torch.float32
        self._memory = rows[0].new_empty(self.shape[0] * self.shape[1], dtype=dtype)
        for start, block in self._blocks():
            torch.cat([each[:, start : start + block.shape[1]].to(dtype) for each in rows], out=block)

    @property
    def device(self) -> torch.device:
        """Where X lies."""
        return self._memory.device

    @property
    def nbytes(self) -> int:
        """Bytes of X."""
        return self._memory.nbytes

    def wide(self) -> Tensor:
        """X [R, N] in float64, in new memory."""
        out = self._memory.new_empty(self.shape, dtype=torch.float64)
        for start, block in self._blocks():
            out[:, start : start + block.shape[1]] = block
        return out

    def combined(self, combination: Tensor, dtype: torch.dtype, *, turned: bool = False) -> Tensor:
        """combination [k, R] @ X [k, N], float64, rounded to ``dtype``; or its transpose [N, k] where turned.

        It is transposed after it is made: MKL multiplies two transposed matrices five times as slowly on some machines.
        """
        k, n = len(combination), self.shape[1]
        out = self._memory.new_empty((n, k) if turned else (k, n), dtype=dtype)
        for start, block in self._blocks():
            width = block.shape[1]
            product = torch.mm(combination, _widened(block), out=_buffer("product", (k, width), block))
            if turned:
                out[start : start + width] = product.to(dtype).T
            else:
                out[:, start : start + width] = product
        return out

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        """The first column of each block, and the block."""
        rows, columns = self.shape
        for start in range(0, columns, _AT_A_TIME):
            stop = min(start + _AT_A_TIME, columns)
            yield start, self._memory[rows * start : rows * stop].view(rows, stop - start)


def _widened(block: Tensor) -> Tensor:
    return block if block.dtype == torch.float64 else _buffer("block", block.shape, block).copy_(block)


def _buffer(name: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory in float64 for a moment: this thread's, where it is the CPU's."""
    if like.device.type == "cpu":
        return scratch(f"stacked rows: {name}", shape, torch.float64)
    return like.new_empty(tuple(shape), dtype=torch.float64)
