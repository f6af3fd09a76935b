"""Several merges of the same task tensors at once: what they look at is computed once, tile by tile.

Each result has the bits that `tiled` gives it alone, since the arithmetic is `tiled`'s own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from merge_engine import jit, tiled
from merge_engine.rule import Rule
from merge_engine.tiled import Drop, KeepTile, Source, Tile, Trim

MOST_HELD = 16  # tiles that a thread holds, 512 KiB each: with more adapters, products are made again for each merge


class Ask(NamedTuple):
    """What `tiled.merge_deltas` is asked for, of given sources and at scale 1."""

    weights: tuple[float, ...]
    keeps: tuple[KeepTile, ...]
    rule: Rule
    tied: int = 1


def merge_deltas(sources: Sequence[Source], asks: Sequence[Ask]) -> list[Tensor]:
    """``tiled.merge_deltas(sources, *ask)`` [M, N] float32 of every ask, bit for bit: products are made once a tile.

    Where Numba is installed, what is kept and what agrees with the vote is found once for all asks that differ in their
    weights only, unless the vote is weighted.
    """
    if len(asks) == 1 or len(sources) > MOST_HELD:
        return [tiled.merge_deltas(sources, ask.weights, ask.keeps, ask.rule, tied=ask.tied) for ask in asks]
    outs = [torch.empty(sources[0].rows, sources[0].columns) for _ in asks]
    ballots: dict[Ask, list[int]] = {}  # by an ask without its weights, the asks that share it
    for i, ask in enumerate(asks):
        weighted = ask.rule.elect != "none" and (ask.rule.vote_weighted or ask.rule.divisor == "weight")
        alike = ask if weighted or not jit.loops() else ask._replace(weights=())
        ballots.setdefault(alike, []).append(i)

    def merge(tile: Tile) -> None:
        products = _scratches("held", sources, tile)
        held = [_Held(source, tile, values) for source, values in zip(sources, products, strict=True)]
        for ballot, members in ballots.items():
            if ballot.weights:
                found = [_merged(held, ballot, tile)] * len(members)
            else:
                found = list(_merge_weighted(held, products, ballot, [asks[i].weights for i in members], tile))
            for i, values in zip(members, found, strict=True):
                outs[i][tile.top : tile.bottom, tile.left : tile.right].copy_(values)

    tiled._for_each_tile(sources[0], merge)
    return outs


def _merged(held: Sequence[Source], ask: Ask, tile: Tile) -> Tensor:
    """The tile of one ask, in a scratch of this thread."""
    if ask.rule.elect == "none":
        return tiled._sum_tile(held, ask.weights, ask.keeps, tile, 1.0)
    return tiled._elect_tile(held, ask.weights, ask.keeps, ask.rule, tile, 1.0, ask.tied)


def _merge_weighted(
    held: Sequence[Source], products: Tensor, ballot: Ask, weights: Sequence[tuple[float, ...]], tile: Tile
) -> Tensor:
    """The tile by each of the weights [s, rows, columns], in a scratch of this thread."""
    loops = jit.loops()
    assert loops is not None
    values = products
    if any(isinstance(keep, Drop) for keep in ballot.keeps):
        values = _scratches("kept", held, tile)
        for source, keep, target in zip(held, ballot.keeps, values, strict=True):
            target.copy_(tiled._dropped_only(source, keep, tile))
    below, above, row, column = zip(*(tiled._limits(keep, tile) for keep in ballot.keeps), strict=True)
    out = tiled._scratch("merged", (len(weights), *tiled._shape(tile)))
    loops.merge_weighted(
        *(values.numpy(), np.array(below), np.array(above), np.array(row), np.array(column)),
        *(ballot.rule.elect != "none", ballot.rule.elect == "frequency", ballot.tied > 0),
        *(ballot.rule.elect != "none" and ballot.rule.divisor == "count", np.array(weights, np.float32), out.numpy()),
    )
    return out


class _Held:
    """One tile of a source, computed already, in a scratch of this thread."""

    def __init__(self, source: Source, tile: Tile, values: Tensor) -> None:
        self.rows, self.columns, self.values = source.rows, source.columns, values
        source.fill(tile, values)

    def fill(self, tile: Tile, out: Tensor) -> None:
        out.copy_(self.values)


def _scratches(name: str, sources: Sequence[Source], tile: Tile) -> Tensor:
    """A scratch tile for each source [n, rows, columns]."""
    return tiled._scratch(name, (len(sources), *tiled._shape(tile)))


def trims(source: Source, kept: Sequence[int], ties: str) -> list[Trim]:
    """``tiled.trims([source], k, ties)[0]`` for every k: one sweep of products brackets all thresholds."""
    found = tiled.kths_by_sample(source, kept)
    return [tiled.trims([source], k, ties, kth=kth)[0] for k, kth in zip(kept, found, strict=True)]
