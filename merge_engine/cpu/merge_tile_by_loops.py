"""One tile of a merge, by the compiled loops."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from merge_engine.cpu.keep import EVERY_ROW, KeepTile, LoopKeep, MergeSpec
from merge_engine.cpu.source import Product, Source
from merge_engine.cpu.tile_grid import Tile, parts_of
from merge_engine.loops import door
from merge_engine.loops.term import TERM
from merge_engine.rules.rule import Rule, require
from merge_engine.runtime.memory import scratch

Opened = tuple[np.ndarray, np.ndarray, np.ndarray]  # brackets, room and counts
NOTHING_OPEN: Opened = (np.empty((2, 0), np.uint32), np.empty((1, 0), np.uint32), np.empty(1, np.int64))
HELD = 1 << 19  # elements that are held at once of sources that are no products: 2 MiB


def terms(sources: Sequence[Source], keeps: Sequence[KeepTile] = (None,)) -> np.ndarray:
    """What the loops read of each source that is a `Product`, and of what is kept of each: TERM [n].

    A limit of less than 0 keeps everything.
    """
    found = np.zeros(len(sources), TERM)
    found["ballot"], found["share"], found["below"], found["above"] = 1, 1, -1, -1
    for term, source, keep in zip(found, sources, keeps, strict=True):
        if isinstance(source, Product):
            source.describe(term)
        if isinstance(keep, LoopKeep):
            keep.describe(term)
    return found


def can_combine(rule: Rule) -> bool:
    """Whether the loops know how this rule combines; `tile_by_torch` knows all."""
    return rule.combine == "sum"


class TileMerge:
    """Merges one tile of several sources, once per row of weights.

    weights: [results, sources], in place of those of the specification.
    """

    def __init__(self, sources: Sequence[Source], spec: MergeSpec, weights: Sequence[tuple[float, ...]]) -> None:
        rule, shapes = spec.rule, {(source.rows, source.columns) for source in sources}
        if len(shapes) != 1 or {len(spec.keeps), *map(len, weights)} != {len(sources)}:
            raise ValueError(f"sources are {sorted(shapes)}, wanted one shape, and {len(sources)} weights and keeps")
        require(rule, "the loops", combine=("sum",), elect=("none", "total", "frequency"))
        require(rule, "the loops", divisor=("count", "weight", "one"))
        self._sources, self._keeps = sources, spec.keeps
        self._terms = terms(sources, spec.keeps)
        self._known = [keep is None or isinstance(keep, LoopKeep) for keep in spec.keeps]
        self._weights = np.array(weights, np.float32)
        elects = rule.elect != "none"
        if elects and rule.vote_weighted:
            self._terms["ballot"], self._weights = spec.weights, np.ones_like(self._weights)
        if elects and rule.divisor == "weight":
            self._terms["share"] = spec.weights
        self._flags = elects, rule.elect == "frequency", spec.tied > 0, rule.divisor != "one"
        self._held = [
            i for i, source in enumerate(sources) if not (isinstance(source, Product) and self._known[i])
        ]  # whose tiles the loops are given

    def into(self, outs: Sequence[Tensor], tile: Tile, scale: float, opened: Opened = NOTHING_OPEN) -> None:
        """Write scale times the tile into each of outs [rows, columns], float32 with contiguous rows.

        opened: where all sources are products, brackets of magnitudes and room for the elements inside them: see
        `tile_loops.merge_tile`.
        """
        if not self._held:
            self._run(self._terms, outs, tile, scale, opened)
            return
        for part in parts_of(tile, HELD // len(self._held)):
            found, held = self._terms.copy(), scratch("held", (len(self._held), *part.shape))
            for i, values in zip(self._held, held, strict=True):
                self._sources[i].fill(part, values)
                self._hold(found[i], i, values, part, drop=True)
            rows = slice(part.top - tile.top, part.bottom - tile.top)
            columns = slice(part.left - tile.left, part.right - tile.left)
            self._run(found, [out[rows, columns] for out in outs], part, scale)

    def of_held(self, held: Tensor, outs: Sequence[Tensor], tile: Tile, scale: float) -> None:
        """The same, of what all sources have in the tile [n, rows, columns], which stays as it is."""
        found = self._terms.copy()
        kept = scratch("kept", (self._known.count(False), *tile.shape))
        places = iter(kept)
        for i, values in enumerate(held):
            own = values if self._known[i] else next(places).copy_(values)
            self._hold(found[i], i, own, tile, drop=False)
        self._run(found, outs, tile, scale)

    def _hold(self, term: Any, i: int, values: Tensor, tile: Tile, *, drop: bool) -> None:
        """Give the loops a tile of a source. What they cannot keep is kept here; so are random drops, if drop."""
        keep = self._keeps[i]
        if keep is not None and (not self._known[i] or (drop and term["drops"])):
            keep.apply(values, tile)
            term["drops"] = 0
        term["rank"], term["b"] = 0, values.data_ptr()

    def _run(
        self, found: np.ndarray, outs: Sequence[Tensor], tile: Tile, scale: float, opened: Opened = NOTHING_OPEN
    ) -> None:
        width = tile.right - tile.left
        if tile.shape[0] > 1 and width == self._sources[0].columns and all(out.is_contiguous() for out in outs):
            found, tile = _in_one_row(found, tile)
        addresses, stride = np.array([out.data_ptr() for out in outs], np.int64), outs[0].stride(0)
        loops = door.loops()
        assert loops is not None
        room = scratch("room", (loops.room_for(found),)).numpy()
        how = self._weights, *self._flags, np.float32(scale), addresses, stride, room
        loops.merge_tile(found, *tile, *how, *opened)


def _in_one_row(found: np.ndarray, tile: Tile) -> tuple[np.ndarray, Tile]:
    """Whole rows that are held, as one, since short ones are slow; products and what is to be dropped stay."""
    if found["rank"].any() or found["drops"].any():
        return found, tile
    height, width = tile.shape
    flat = found.copy()
    place = (found["row"].clip(tile.top, tile.bottom) - tile.top) * width + found["column"].clip(0, width)
    flat["row"] = np.where(found["row"] < tile.top, -1, np.where(found["row"] >= tile.bottom, EVERY_ROW, 0))
    flat["column"] = place
    return flat, Tile(0, 1, 0, height * width)
