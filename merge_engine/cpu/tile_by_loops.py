"""One tile of a merge, by the compiled loops."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from merge_engine.cpu.keep import EVERY_ROW, Drop, KeepTile, MergeSpec, limits
from merge_engine.cpu.source import Product, Source
from merge_engine.cpu.tile import Tile, parts_of
from merge_engine.cpu.tile_by_torch import kept_but_for_trim
from merge_engine.loops import door
from merge_engine.loops.term import TERM
from merge_engine.rules.philox import keep_threshold
from merge_engine.rules.rule import require
from merge_engine.runtime.memory import scratch

HELD = 1 << 19  # elements that are held at once of sources that are no products: 2 MiB


def terms(sources: Sequence[Source], keeps: Sequence[KeepTile] = (None,)) -> np.ndarray:
    """What `loops` reads of each source that is a `Product`, and of what is kept of each: TERM [n]."""
    found = np.zeros(len(sources), TERM)
    found["ballot"], found["share"] = 1, 1
    for term, source, keep in zip(found, sources, keeps, strict=True):
        if isinstance(source, Product):
            source.describe(term)
        term["below"], term["above"], term["row"], term["column"] = limits(keep)
        if isinstance(keep, Drop):
            term["drops"], term["threshold"], term["stream"] = 1, keep_threshold(keep.density), keep.stream
            term["adapter"], term["key0"], term["key1"] = keep.adapter, keep.seed & 0xFFFFFFFF, keep.seed >> 32
            term["divisor"], term["factor"] = (keep.density, 1) if keep.factor is None else (1, keep.factor)
    return found


class TileMerge:
    """The merge of some sources as asked, by each of some weights in place of those of the spec."""

    def __init__(self, sources: Sequence[Source], spec: MergeSpec, weights: Sequence[tuple[float, ...]]) -> None:
        rule, shapes = spec.rule, {(source.rows, source.columns) for source in sources}
        if len(shapes) != 1 or {len(spec.keeps), *map(len, weights)} != {len(sources)}:
            raise ValueError(f"sources are {sorted(shapes)}, wanted one shape, and {len(sources)} weights and keeps")
        self._sources, self._keeps, self._terms = sources, spec.keeps, terms(sources, spec.keeps)
        self._weights = np.array(weights, np.float32)
        require(rule, "the loops", combine=("sum",), elect=("none", "total", "frequency"))
        require(rule, "the loops", divisor=("count", "weight", "one"))
        elects = rule.elect != "none"
        if elects and rule.vote_weighted:
            self._terms["ballot"], self._weights = spec.weights, np.ones_like(self._weights)
        if elects and rule.divisor == "weight":
            self._terms["share"] = spec.weights
        self._flags = elects, rule.elect == "frequency", spec.tied > 0, rule.divisor != "one"
        self._others = [i for i, source in enumerate(sources) if not isinstance(source, Product)]

    def into(self, outs: Sequence[Tensor], tile: Tile, scale: float) -> None:
        """Write scale times the tile into each of outs [rows, columns], float32 with contiguous rows."""
        if not self._others:
            self._run(self._terms, outs, tile, scale)
            return
        for part in parts_of(tile, HELD // len(self._others)):
            found, held = self._terms.copy(), scratch("held", (len(self._others), *part.shape))
            for i, values in zip(self._others, held, strict=True):
                values.copy_(kept_but_for_trim(self._sources[i], self._keeps[i], part))
                found[i]["b"], found[i]["drops"] = values.data_ptr(), 0
            rows = slice(part.top - tile.top, part.bottom - tile.top)
            columns = slice(part.left - tile.left, part.right - tile.left)
            self._run(found, [out[rows, columns] for out in outs], part, scale)

    def of_held(self, held: Tensor, outs: Sequence[Tensor], tile: Tile, scale: float) -> None:
        """The same, of what all sources have in the tile [n, rows, columns]."""
        found = self._terms.copy()
        found["rank"], found["b"] = 0, [values.data_ptr() for values in held]
        self._run(found, outs, tile, scale)

    def _run(self, found: np.ndarray, outs: Sequence[Tensor], tile: Tile, scale: float) -> None:
        width = tile.right - tile.left
        if tile.shape[0] > 1 and width == self._sources[0].columns and all(out.is_contiguous() for out in outs):
            found, tile = _in_one_row(found, tile)
        addresses, stride = np.array([out.data_ptr() for out in outs], np.int64), outs[0].stride(0)
        loops = door.loops()
        assert loops is not None
        room = scratch("room", (loops.tile.room_for(len(found)),)).numpy()
        loops.tile.merge_tile(found, *tile, self._weights, *self._flags, np.float32(scale), addresses, stride, room)


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
