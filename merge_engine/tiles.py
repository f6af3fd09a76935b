"""Task tensors seen tile by tile, what is kept of them, and the threads that share the tiles out.

A task tensor is seen through a `Source`, which fills one tile at a time: of ``scaling * B @ A``, recomputed whenever it
is looked at, or of a plain matrix. Everyone looks at the same fixed tiles, computed by the same call on one thread
each, so that everyone sees the same bits; tiles are shared out over ``torch.get_num_threads()`` threads.
"""

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import itemgetter
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from merge_engine import jit, rng
from merge_engine.pipeline import one_thread
from merge_engine.rule import Rule
from merge_engine.terms import TERM

TILE_ROWS = 64
TILE_ELEMENTS = 1 << 19  # 2 MiB of float32 at most: threads hand over seldom, and caches of 2 MiB hold a tile
LEAST_TILES, LEAST_ELEMENTS = 8, 1 << 16  # of a tensor, so that threads end together, and of a tile
EVERY_ROW = 1 << 62  # a position that no row reaches

R = TypeVar("R")
T = TypeVar("T")


class Tile(NamedTuple):
    """Rows [top, bottom) by columns [left, right) of a task tensor."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left


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
        """What is at rows x columns (indices), in float32, to the last bits: for an estimate."""
        ...


class Product:
    """scaling * B @ A with A [r, N] and B [M, r] of any float dtype, multiplied in float32."""

    def __init__(self, A: Tensor, B: Tensor, scaling: float) -> None:
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or {A.device.type, B.device.type} != {"cpu"}:
            raise ValueError(f"A is {list(A.shape)} and B {list(B.shape)}, wanted [r, N] and [M, r] on the CPU")
        self.rows, self.columns, self.scaling = B.shape[0], A.shape[1], scaling
        self.A, self.B = _whole_eights(A.float(), 0).contiguous(), _whole_eights(B.float(), 1).contiguous()

    def fill(self, tile: Tile, out: Tensor) -> None:
        if loops := jit.loops():
            loops.fill_tile(self._terms, *tile, out.data_ptr())
        else:
            rows, columns = self.B[tile.top : tile.bottom], self.A[:, tile.left : tile.right]
            out.addmm_(rows, columns, beta=0, alpha=self.scaling)

    @cached_property
    def _terms(self) -> np.ndarray:
        return terms([self])

    def part(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self.B[rows] @ self.A[:, columns] * self.scaling


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
        return self.matrix[rows][:, columns].float()


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
        return self.x[rows][:, columns].float() - self.base[rows][:, columns].float()


@dataclass(frozen=True)
class Trim:
    """Keep |t| > value, and of the elements with |t| = value those before flat position (row, column)."""

    value: float
    row: int
    column: int


@dataclass(frozen=True)
class Drop:
    """Keep at random with probability density, then multiply by `factor`, or divide by density where it is None."""

    density: float
    seed: int
    stream: int
    adapter: int
    factor: float | None = None


KeepTile = Trim | Drop | None


class Ask(NamedTuple):
    """What a merge of given sources is asked for, but for its scale."""

    weights: tuple[float, ...]
    keeps: tuple[KeepTile, ...]
    rule: Rule
    tied: int = 1  # the side that a column with a vote of 0 elects


def terms(sources: Sequence[Source], keeps: Sequence[KeepTile] = (None,)) -> np.ndarray:
    """What `loops` reads of each source that is a `Product`, and of what is kept of each: TERM [n]."""
    found = np.zeros(len(sources), TERM)
    found["ballot"], found["share"] = 1, 1
    for term, source, keep in zip(found, sources, keeps, strict=True):
        if isinstance(source, Product):
            term["b"], term["a"], term["rank"] = source.B.data_ptr(), source.A.data_ptr(), len(source.A)
            term["columns"], term["scaling"] = source.columns, source.scaling
        term["below"], term["above"], term["row"], term["column"] = limits(keep)
        if isinstance(keep, Drop):
            term["drops"], term["threshold"], term["stream"] = 1, rng.keep_threshold(keep.density), keep.stream
            term["adapter"], term["key0"], term["key1"] = keep.adapter, keep.seed & 0xFFFFFFFF, keep.seed >> 32
            term["divisor"], term["factor"] = (keep.density, 1) if keep.factor is None else (1, keep.factor)
    return found


def limits(keep: KeepTile) -> tuple[np.float32, np.float32, int, int]:
    """(below, above, row, column): a trim keeps |t| > below before that place, and |t| > above from there on.

    A smaller float than the threshold keeps equal magnitudes too; what is less than zero keeps everything.
    """
    if not isinstance(keep, Trim):
        return np.float32(-1), np.float32(-1), 0, 0
    value = np.float32(keep.value)
    return np.nextafter(value, np.float32(-1)), value, keep.row, keep.column


def filled(source: Source, tile: Tile) -> Tensor:
    values = scratch("values", tile.shape)
    source.fill(tile, values)
    return values


def dropped(values: Tensor, drop: Drop, tile: Tile) -> Tensor:
    """values where the mask keeps them, else 0, in place and not rescaled."""
    mask = rng.keep_mask(
        drop.density,
        seed=drop.seed,
        stream=drop.stream,
        adapter=drop.adapter,
        rows=range(tile.top, tile.bottom),
        columns=range(tile.left, tile.right),
        out=scratch("mask", values.shape, torch.bool),
    )
    return values.mul_(scratch("part", values.shape).copy_(mask.view(torch.uint8)))


def tiles_of(rows: int, columns: int) -> Iterator[Tile]:
    """The fixed tiles of a [rows, columns] tensor, row-major: a function of its shape alone."""
    if rows == 0 or columns == 0:
        return
    elements = min(TILE_ELEMENTS, max(rows * columns // LEAST_TILES, LEAST_ELEMENTS))
    width = max(1, min(columns, elements // min(rows, TILE_ROWS)))
    height = max(1, min(rows, elements // width))
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield Tile(top, min(top + height, rows), left, min(left + width, columns))


def for_each_tile(source: Source, work: Callable[[Tile], R]) -> list[R]:
    """work(tile) for every tile of the source's shape, in their order."""
    return for_each(list(tiles_of(source.rows, source.columns)), work)


def for_each(items: Sequence[T], work: Callable[[T], R]) -> list[R]:
    """work(item) for every item, in their order, shared out over the threads; not from within work, which would wait.

    When work fails for an item, those that are not begun are left.
    """
    threads, left = torch.get_num_threads(), iter(range(len(items)))

    def share(_: int) -> list[tuple[int, R]]:  # each thread takes the next as it gets to it: one hand-over a thread
        try:
            return [(i, work(items[i])) for i in left]
        except BaseException:
            deque(left, maxlen=0)
            raise

    done = [pair for pairs in workers(threads).map(share, range(min(threads, len(items)))) for pair in pairs]
    return [result for _, result in sorted(done, key=itemgetter(0))]


@lru_cache(maxsize=4)
def workers(threads: int) -> ThreadPoolExecutor:
    """Threads that each run torch's operators on one thread: the tiles are what runs in parallel."""
    ready = threading.Barrier(threads + 1)

    def start() -> None:
        one_thread()
        ready.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="merge_engine")
    for _ in range(threads):
        pool.submit(start)
    ready.wait()
    torch.set_num_threads(threads)  # the setting is each thread's own, but new threads copy the latest
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=workers.cache_clear)  # a child has none of its parent's threads

_local = threading.local()


def scratch(name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """This thread's buffer of that name, seen as [shape]: what it holds is undefined."""
    buffers: dict[str, Tensor] = _local.__dict__
    size = math.prod(shape)
    buffer = buffers.get(name)
    if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
        buffer = buffers[name] = torch.empty(max(size, TILE_ELEMENTS), dtype=dtype)
    return buffer[:size].view(shape)
