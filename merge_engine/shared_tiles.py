"""Several merges of the same task tensors at once: what they look at is computed once, tile by tile.

Each result has the bits that `tiled` gives it alone, since the arithmetic is `tiled`'s own.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from merge_engine import compiled, jit, operators, tiled
from merge_engine.memory import new_tensor
from merge_engine.tiles import Ask, Source, Tile, for_each_tile, scratch

MOST_HELD = 16  # sources whose tiles a thread holds: with more, products are made again for each merge


def merge_deltas(sources: Sequence[Source], asks: Sequence[Ask]) -> list[Tensor]:
    """``tiled.merge_deltas(sources, *ask)`` [M, N] float32 of every ask, bit for bit: products are made once a tile.

    Where Numba is installed, what is kept and what agrees with the vote is found once for all asks that differ in their
    weights only, unless the vote is weighted.
    """
    if len(asks) == 1 or len(sources) > MOST_HELD:
        return [tiled.merge_deltas(sources, ask.weights, ask.keeps, ask.rule, tied=ask.tied) for ask in asks]
    outs = [new_tensor((sources[0].rows, sources[0].columns)) for _ in asks]
    merge = _by_loops(sources, asks, outs) if jit.loops() else _by_operators(sources, asks, outs)
    for_each_tile(sources[0], merge)
    return outs


def _by_loops(sources: Sequence[Source], asks: Sequence[Ask], outs: Sequence[Tensor]) -> Callable[[Tile], None]:
    """Merges a tile into the result of every ask."""
    alike: dict[Ask, list[int]] = {}  # by an ask without its weights, unless they count in the vote
    for i, ask in enumerate(asks):
        weighted = ask.rule.elect != "none" and (ask.rule.vote_weighted or ask.rule.divisor == "weight")
        alike.setdefault(ask if weighted else ask._replace(weights=()), []).append(i)
    merges = [
        (compiled.Merge(sources, asks[numbers[0]], [asks[i].weights for i in numbers]), numbers)
        for numbers in alike.values()
    ]

    def merge(tile: Tile) -> None:
        for part in compiled.parts_of(tile, compiled.HELD // len(sources)):
            products = _filled(sources, part)
            for one, numbers in merges:
                one.of_held(products, [_of(outs[i], part) for i in numbers], part, 1.0)

    return merge


def _by_operators(sources: Sequence[Source], asks: Sequence[Ask], outs: Sequence[Tensor]) -> Callable[[Tile], None]:
    """The same, by whole tiles: the bits of a product depend on them."""

    def merge(tile: Tile) -> None:
        held = [_Held(source, values) for source, values in zip(sources, _filled(sources, tile), strict=True)]
        for ask, out in zip(asks, outs, strict=True):
            _of(out, tile).copy_(operators.merge_tile(held, ask, tile, 1.0))

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
