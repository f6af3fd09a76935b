"""What is kept of a task tensor, as its tiles see it; and the specification of one merge.

A new keep is a class here with `apply`; one that the compiled loops can do themselves has `describe` too.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from merge_engine.cpu.mask import keep_mask
from merge_engine.cpu.tile_grid import Tile
from merge_engine.rules.philox import keep_threshold
from merge_engine.rules.rule import Rule
from merge_engine.runtime.memory import scratch

EVERY_ROW = 1 << 62  # a position that no row reaches


class Keep(Protocol):
    """What stays of a task tensor t: keep(t)."""

    def apply(self, values: Tensor, tile: Tile) -> Tensor:
        """A tile of t -> that of keep(t), in place."""
        ...


@runtime_checkable
class LoopKeep(Keep, Protocol):
    """A keep that the compiled loops can do themselves; of others they are given tiles of keep(t)."""

    def describe(self, term: Any) -> None:
        """Tell them what stays, in a TERM."""
        ...


@dataclass(frozen=True)
class Trim:
    """Keep |t| > value, and of the elements with |t| = value those before flat position (row, column)."""

    value: float
    row: int
    column: int

    def apply(self, values: Tensor, tile: Tile) -> Tensor:
        below, above = self._limits()
        row, column = self.row - tile.top, min(max(self.column - tile.left, 0), tile.right - tile.left)
        if row >= len(values):
            return _shrink(values, below)
        if row < 0:
            return _shrink(values, above)
        _shrink(values[:row], below)
        _shrink(values[row, :column], below)
        _shrink(values[row, column:], above)
        _shrink(values[row + 1 :], above)
        return values

    def describe(self, term: Any) -> None:
        term["below"], term["above"] = self._limits()
        term["row"], term["column"] = self.row, self.column

    def _limits(self) -> tuple[np.float32, np.float32]:
        """(below, above): |t| > below stays before the position, and |t| > above from there on.

        The next smaller float than the threshold keeps equal magnitudes too.
        """
        value = np.float32(self.value)
        return np.nextafter(value, np.float32(-1)), value


@dataclass(frozen=True)
class Band:
    """Keep what `wide` keeps and `top` does not: of the largest magnitudes all, and of these the very largest."""

    wide: Trim
    top: Trim

    def apply(self, values: Tensor, tile: Tile) -> Tensor:
        top = self.top.apply(scratch("top", values.shape).copy_(values), tile)
        return self.wide.apply(values, tile).sub_(top)


@dataclass(frozen=True)
class Drop:
    """Keep at random with probability density, then multiply by `factor`, or divide by density where it is None."""

    density: float
    seed: int
    stream: int
    adapter: int
    factor: float | None = None

    def apply(self, values: Tensor, tile: Tile) -> Tensor:
        dropped(values, self, tile)
        return values.div_(self.density) if self.factor is None else values.mul_(self.factor)

    def describe(self, term: Any) -> None:
        term["drops"], term["threshold"], term["stream"] = 1, keep_threshold(self.density), self.stream
        term["adapter"], term["key0"], term["key1"] = self.adapter, self.seed & 0xFFFFFFFF, self.seed >> 32
        term["divisor"], term["factor"] = (self.density, 1) if self.factor is None else (1, self.factor)


KeepTile = Keep | None  # None keeps everything


class MergeSpec(NamedTuple):
    """Weights, keeps, rule and tie side of one merge; the scale comes last."""

    weights: tuple[float, ...]
    keeps: tuple[KeepTile, ...]
    rule: Rule
    tied: int = 1  # the side that a column with a vote of 0 elects


def dropped(values: Tensor, drop: Drop, tile: Tile) -> Tensor:
    """values where the mask keeps them, else 0, in place and not rescaled."""
    mask = keep_mask(
        drop.density,
        seed=drop.seed,
        stream=drop.stream,
        adapter=drop.adapter,
        rows=range(tile.top, tile.bottom),
        columns=range(tile.left, tile.right),
        out=scratch("mask", values.shape, torch.bool),
    )
    return values.mul_(scratch("part", values.shape).copy_(mask.view(torch.uint8)))


def _shrink(values: Tensor, limit: np.float32) -> Tensor:
    """values where |values| > limit, else 0, in place."""
    return values if limit < 0 else torch.ops.aten.hardshrink.out(values, float(limit), out=values)
