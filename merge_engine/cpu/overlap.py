"""Counts what task tensors keep in common, and where their signs differ, in one sweep over the tiles."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from merge_engine.cpu.keep import KeepTile
from merge_engine.cpu.merge_tile_by_loops import HELD
from merge_engine.cpu.merge_tile_by_torch import kept
from merge_engine.cpu.source import Source
from merge_engine.cpu.tile_grid import Tile, parts_of, tiles_of
from merge_engine.loops import door
from merge_engine.runtime.threads import for_each


class Overlap(NamedTuple):
    """See `Figures`; arrays by the adapters that have the module."""

    shared: np.ndarray
    opposed: np.ndarray
    kept_squares: np.ndarray
    contested: int
    conflicting: int


def count_overlap(sources: Sequence[Source], keeps: Sequence[KeepTile]) -> Overlap:
    """What is kept of each source, and in which sign: one sweep over the tiles.

    With S [m, elements of a tile] the signs of what is kept, S S^T = agreeing - opposed and |S| |S|^T = shared. In
    float32 both are exact: a tile has less than 2^24 elements.
    """

    def count(tile: Tile) -> Overlap:
        signs = torch.empty(len(sources), (tile.bottom - tile.top) * (tile.right - tile.left))
        squares = np.empty(len(sources))
        for place, (source, keep) in enumerate(zip(sources, keeps, strict=True)):
            values = kept(source, keep, tile).reshape(-1)
            squares[place] = float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
            torch.sign(values, out=signs[place])
        balance, agreeing = signs.sum(0).abs_(), signs @ signs.T
        votes = signs.abs_().sum(0)
        shared = signs @ signs.T
        return Overlap(
            shared=shared.numpy().astype(np.int64),
            opposed=((shared - agreeing) / 2).numpy().astype(np.int64),
            kept_squares=squares,
            contested=int((votes >= 2).sum()),
            conflicting=int((balance < votes).sum()),
        )

    looked_at = list(tiles_of(sources[0].rows, sources[0].columns))
    door.loops(sources[0].rows * sources[0].columns * len(sources))
    if door.installed():  # products do not depend on tiles
        looked_at = [part for tile in looked_at for part in parts_of(tile, HELD // len(sources))]
    shared, opposed, squares, contested, conflicting = zip(*for_each(looked_at, count), strict=True)
    return Overlap(
        shared=np.sum(shared, axis=0),
        opposed=np.sum(opposed, axis=0),
        kept_squares=np.sum(squares, axis=0),
        contested=sum(contested),
        conflicting=sum(conflicting),
    )
