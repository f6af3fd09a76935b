"""What is kept of a task tensor, as its tiles see it; and the specification of one merge."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from merge_engine.cpu.mask import keep_mask
from merge_engine.cpu.tile import Tile
from merge_engine.rules.rule import Rule
from merge_engine.runtime.memory import scratch

EVERY_ROW = 1 << 62  # a position that no row reaches


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


class MergeSpec(NamedTuple):
    """What a merge of given sources is asked for, but for its scale."""

    weights: tuple[float, ...]
    keeps: tuple[KeepTile, ...]
    rule: Rule
    tied: int = 1  # the side that a column with a vote of 0 elects


def limits(keep: KeepTile) -> tuple[np.float32, np.float32, int, int]:
    """(below, above, row, column): a trim keeps |t| > below before that place, and |t| > above from there on.

    A smaller float than the threshold keeps equal magnitudes too; what is less than zero keeps everything.
    """
    if not isinstance(keep, Trim):
        return np.float32(-1), np.float32(-1), 0, 0
    value = np.float32(keep.value)
    return np.nextafter(value, np.float32(-1)), value, keep.row, keep.column


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
