"""Task tensors seen tile by tile.

A task tensor is seen through a `Source`, which fills one tile at a time: of ``scaling * B @ A``, recomputed whenever it
is looked at, or of a plain matrix. Everyone looks at the same fixed tiles, computed by the same call on one thread
each, so that everyone sees the same bits; tiles are shared out over ``torch.get_num_threads()`` threads.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from merge_engine.cpu.tile_grid import Tile, tiles_of
from merge_engine.loops import door
from merge_engine.loops.term import TERM
from merge_engine.runtime.memory import scratch
from merge_engine.runtime.threads import for_each

R = TypeVar("R")
_BLOCK = 1 << 14  # elements: they stay in the L2 cache while the ranks are added


class Source(Protocol):
    """A task tensor [rows, columns] in float32 that can be looked at tile by tile."""

    rows: int
    columns: int

    def fill(self, tile: Tile, out: Tensor) -> None:
        """Write the tile into out [bottom - top, right - left], float32 and contiguous."""
        ...


@runtime_checkable
class Sampled(Source, Protocol):
    """A source that can be looked at in places."""

    def part(self, rows: Tensor, columns: Tensor) -> Tensor:
        """What is at rows [g, m] and columns [g, n] (indices) of g groups: [g, m, n] in float32, to the last bits.

        For an estimate.
        """
        ...


class Product:
    """scaling * B @ A with A [r, N] and B [M, r] of any float dtype, multiplied in float32."""

    def __init__(self, A: Tensor, B: Tensor, scaling: float) -> None:
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or {A.device.type, B.device.type} != {"cpu"}:
            raise ValueError(f"A is {list(A.shape)} and B {list(B.shape)}, wanted [r, N] and [M, r] on the CPU")
        self.rows, self.columns, self.scaling = B.shape[0], A.shape[1], scaling
        self.A, self.B = _whole_eights(A.float(), 0).contiguous(), _whole_eights(B.float(), 1).contiguous()

    def fill(self, tile: Tile, out: Tensor) -> None:
        if loops := door.loops():
            loops.fill_tile(self._terms, *tile, out.data_ptr())
            return
        rows, columns = self.B[tile.top : tile.bottom], self.A[:, tile.left : tile.right]
        if door.installed():
            _add_in_order(rows.numpy(), columns.numpy(), np.float32(self.scaling), out.numpy())
        else:
            out.addmm_(rows, columns, beta=0, alpha=self.scaling)

    def describe(self, term: Any) -> None:
        """Tell the compiled loops where the factors are, in a TERM."""
        term["b"], term["a"], term["rank"] = self.B.data_ptr(), self.A.data_ptr(), len(self.A)
        term["columns"], term["scaling"] = self.columns, self.scaling

    @cached_property
    def _terms(self) -> np.ndarray:
        found = np.zeros(1, TERM)
        self.describe(found[0])
        return found

    def part(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self.B[rows] @ self.A[:, columns].transpose(0, 1) * self.scaling


def _add_in_order(B: np.ndarray, A: np.ndarray, scaling: np.float32, out: np.ndarray) -> None:
    """out = scaling * B @ A with the bits of the loops: terms in the order of the ranks, none fused into another."""
    height = max(1, _BLOCK // out.shape[1])
    for top in range(0, len(out), height):
        for left in range(0, out.shape[1], _BLOCK):
            part, a = out[top : top + height, left : left + _BLOCK], A[:, left : left + _BLOCK]
            b, term = B[top : top + height, :, None], scratch("term", part.shape).numpy()
            np.multiply(b[:, 0], a[0], out=part)
            for k in range(1, len(a)):
                np.add(part, np.multiply(b[:, k], a[k], out=term), out=part)
            np.multiply(part, scaling, out=part)


def _whole_eights(factor: Tensor, ranks: int) -> Tensor:
    """The factor with zeros up to a rank that is a multiple of 8, as `loops` reads it; they change no sum."""
    more = -factor.shape[ranks] % 8 if factor.shape[ranks] else 8
    return torch.nn.functional.pad(factor, (0, 0, 0, more) if ranks == 0 else (0, more)) if more else factor


class Dense:
    """A matrix [M, N] of any float dtype, widened to float32."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.rows, self.columns = matrix.shape

    def fill(self, tile: Tile, out: Tensor) -> None:
        out.copy_(self.matrix[tile.top : tile.bottom, tile.left : tile.right])

    def part(self, rows: Tensor, columns: Tensor) -> Tensor:
        return at(self.matrix, rows, columns)


class Difference:
    """x - base, both [M, N] of any float dtype and any strides, in float32."""

    def __init__(self, x: Tensor, base: Tensor) -> None:
        self.x, self.base = x, base
        self.rows, self.columns = x.shape

    def fill(self, tile: Tile, out: Tensor) -> None:
        part = (slice(tile.top, tile.bottom), slice(tile.left, tile.right))
        base = scratch("base", out.shape)
        out.copy_(self.x[part]).sub_(base.copy_(self.base[part]))

    def part(self, rows: Tensor, columns: Tensor) -> Tensor:
        return at(self.x, rows, columns) - at(self.base, rows, columns)


def at(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """What a matrix has at rows [g, m] and columns [g, n] of each group: [g, m, n] in float32."""
    return matrix[rows[:, :, None], columns[:, None, :]].float()


def filled(source: Source, tile: Tile) -> Tensor:
    values = scratch("values", tile.shape)
    source.fill(tile, values)
    return values


def for_each_tile(source: Source, work: Callable[[Tile], R]) -> list[R]:
    """work(tile) for every tile of the source's shape, in their order."""
    return for_each(list(tiles_of(source.rows, source.columns)), work)
