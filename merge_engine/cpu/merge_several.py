"""Several merges of the same task tensors at once: what they look at is computed once, tile by tile.

Each result has the bits that `merge_deltas` gives it alone, since the arithmetic is the same.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from merge_engine.cpu.keep import MergeSpec
from merge_engine.cpu.merge import merge_deltas
from merge_engine.cpu.merge_tile_by_loops import HELD, TileMerge, can_combine
from merge_engine.cpu.merge_tile_by_torch import merge_tile
from merge_engine.cpu.source import Source, for_each_tile
from merge_engine.cpu.tile_grid import TILE_ELEMENTS, Tile, parts_of
from merge_engine.loops import door
from merge_engine.runtime.memory import new_tensor, scratch

MOST_HELD = 16  # sources whose tiles a thread holds: with more, products are made again for each merge
_SCRATCHES = 12  # tiles that `merge_tile_by_torch` works with on each thread; `merge_tile_by_loops` needs fewer


def working_bytes(sources: int, results: int = 1) -> int:
    """Bytes beside sources and results that merging so many sources into so many results takes."""
    tile = torch.get_num_threads() * 4 * TILE_ELEMENTS
    held = torch.get_num_threads() * 4 * HELD if door.installed() else tile * min(sources, MOST_HELD)
    return held + (_SCRATCHES + results - 1) * tile


def merge_several(sources: Sequence[Source], specs: Sequence[MergeSpec]) -> list[Tensor]:
    """``merge_deltas(sources, *spec)`` [M, N] float32 of every spec, bit for bit: products are made once a tile.

    Where Numba is installed, what is kept and what agrees with the vote is found once for all specifications that
    differ in their weights only, unless the vote is weighted.
    """
    if len(specs) == 1 or len(sources) > MOST_HELD:
        return [merge_deltas(sources, spec.weights, spec.keeps, spec.rule, tied=spec.tied) for spec in specs]
    shape = sources[0].rows, sources[0].columns
    outs = [new_tensor(shape) for _ in specs]
    compiled = door.loops(shape[0] * shape[1] * len(sources))
    looped = [i for i, spec in enumerate(specs) if compiled and can_combine(spec.rule)]
    others = [i for i in range(len(specs)) if i not in looped]
    merges = [
        make(sources, [specs[i] for i in part], [outs[i] for i in part])
        for make, part in ((_by_loops, looped), (_by_operators, others))
        if part
    ]

    def merge(tile: Tile) -> None:
        # The bits of a product depend on its tile only where Numba is not installed.
        for part in parts_of(tile, HELD // len(sources)) if door.installed() else [tile]:
            products = _filled(sources, part)
            for each in merges:
                each(products, part)

    for_each_tile(sources[0], merge)
    return outs


Merge = Callable[[Tensor, Tile], None]  # of what all sources have in a tile [n, rows, columns], which stays as it is


def _by_loops(sources: Sequence[Source], specs: Sequence[MergeSpec], outs: Sequence[Tensor]) -> Merge:
    """Merges a tile into the result of every spec."""
    alike: dict[MergeSpec, list[int]] = {}  # by an spec without its weights, unless they count in the vote
    for i, spec in enumerate(specs):
        weighted = spec.rule.elect != "none" and (spec.rule.vote_weighted or spec.rule.divisor == "weight")
        alike.setdefault(spec if weighted else spec._replace(weights=()), []).append(i)
    merges = [
        (TileMerge(sources, specs[numbers[0]], [specs[i].weights for i in numbers]), numbers)
        for numbers in alike.values()
    ]

    def merge(products: Tensor, tile: Tile) -> None:
        for one, numbers in merges:
            one.of_held(products, [_of(outs[i], tile) for i in numbers], tile, 1.0)

    return merge


def _by_operators(sources: Sequence[Source], specs: Sequence[MergeSpec], outs: Sequence[Tensor]) -> Merge:
    """The same."""

    def merge(products: Tensor, tile: Tile) -> None:
        held = [_Held(source, values) for source, values in zip(sources, products, strict=True)]
        for spec, out in zip(specs, outs, strict=True):
            _of(out, tile).copy_(merge_tile(held, spec, tile, 1.0))

    return merge


def _filled(sources: Sequence[Source], tile: Tile) -> Tensor:
    """The tile of each source [n, rows, columns], in a scratch of this thread."""
    products = scratch("held", (len(sources), *tile.shape))
    for source, values in zip(sources, products, strict=True):
        source.fill(tile, values)
    return products


def _of(out: Tensor, tile: Tile) -> Tensor:
    return out[tile.top : tile.bottom, tile.left : tile.right]


class _Held:
    """One tile of a source, computed already."""

    def __init__(self, source: Source, values: Tensor) -> None:
        self.rows, self.columns, self.values = source.rows, source.columns, values

    def fill(self, tile: Tile, out: Tensor) -> None:
        out.copy_(self.values)
