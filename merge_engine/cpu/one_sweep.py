"""A merge of trimmed task tensors whose thresholds are found in the same sweep over the products.

A sample says in which bracket of magnitudes each threshold lies. What is above a bracket stays and what is below goes,
whatever the threshold is; of elements inside any bracket this is open. One sweep merges all that is not open, and lists
the open elements with their values. From these come the exact thresholds, and then their part of the result. So each
product is made once, and the bits are those of `select.trims_of_each` and `merge.merge_deltas`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from merge_engine.cpu.keep import EVERY_ROW, MergeSpec, Trim
from merge_engine.cpu.merge_tile_by_loops import TileMerge, can_combine
from merge_engine.cpu.select import Kth, bracket_of, can_be_sampled, kth_inside, trim_at, value_of
from merge_engine.cpu.source import Product
from merge_engine.cpu.tile_grid import Tile, tiles_of
from merge_engine.loops import door
from merge_engine.runtime.memory import new_tensor, scratch
from merge_engine.runtime.threads import for_each

MOST = 4  # task tensors: of each some 4 % are open, and the open elements are held until the end


class Open(NamedTuple):
    """The open elements of a tile.

    places: where they are in the flat result [e]. values: in each task tensor [n, e]. looks: of each task tensor, how
    many magnitudes of the tile are above its bracket, and those that are inside it.
    """

    tile: Tile
    places: np.ndarray
    values: Tensor
    looks: list[tuple[int, np.ndarray]]


def trim_and_merge(
    sources: Sequence[Product], ks: Sequence[int], ties: str, spec: MergeSpec, scale: float = 1.0
) -> Tensor | None:
    """`merge_deltas` of the ks[i] largest magnitudes of sources[i] [M, N], in place of the keeps of the specification.

    None where that takes two sweeps: without loops, for low ranks, small or huge tensors, ones with many equal
    magnitudes, more than `MOST` task tensors, and where the sample was wrong.
    """
    if not _is_fit(sources, ks, spec):
        return None
    brackets = [each for each in for_each(range(len(ks)), lambda i: bracket_of(sources[i], ks[i])) if each]
    if len(brackets) < len(ks):
        return None
    out = new_tensor((sources[0].rows, sources[0].columns))
    guess = _trimmed(sources, spec, [value_of(low) for low, _ in brackets])
    ends = np.full((2, MOST), 0xFFFFFFFF, np.uint32)
    ends[:, : len(ks)] = np.array(brackets).T
    found = for_each(list(tiles_of(*out.shape)), lambda tile: _merge_tile(guess, out, tile, scale, ends, len(ks)))

    def kth(i: int) -> Kth | None:
        return kth_inside(sources[i], ks[i], brackets[i], [each.looks[i] for each in found])

    kths = [each for each in for_each(range(len(ks)), kth) if each]
    if len(kths) < len(ks):
        return None
    trims = [trim_at(source, ties, each) for source, each in zip(sources, kths, strict=True)]
    exact = _trimmed(sources, spec, [trim.value for trim in trims])

    def finish(each: Open) -> None:
        for trim, known, values in zip(trims, kths, each.values, strict=True):
            if trim.row < EVERY_ROW and each.tile in (known.tiles or ()):  # equal ones go from a place on
                after = each.places >= trim.row * out.shape[1] + trim.column
                values[(values.abs() == trim.value) & torch.from_numpy(after)] = 0
        _put(exact, out, each, scale)

    for_each(found, finish)
    return out


def _is_fit(sources: Sequence[Product], ks: Sequence[int], spec: MergeSpec) -> bool:
    loops = door.loops(sources[0].rows * sources[0].columns * len(sources))
    if loops is None or len(sources) > MOST or sum(len(source.A) for source in sources) < loops.LEAST_RANKS:
        return False
    return can_be_sampled(sources[0]) and all(ks) and can_combine(spec.rule)


def _trimmed(sources: Sequence[Product], spec: MergeSpec, values: Sequence[float]) -> TileMerge:
    """A merge that keeps magnitudes from these on."""
    keeps = tuple(Trim(value, EVERY_ROW, 0) for value in values)
    return TileMerge(sources, spec._replace(keeps=keeps), [spec.weights])


def _merge_tile(guess: TileMerge, out: Tensor, tile: Tile, scale: float, ends: np.ndarray, n: int) -> Open:
    """Merge what is not open of a tile of n task tensors, and list what is; ends: of their brackets, a column each."""
    loops = door.loops()
    assert loops is not None
    room = scratch("open", (1 + MOST, tile.shape[0] * tile.shape[1] + 16), torch.int32).numpy().view(np.uint32)
    counts = np.empty(1 + MOST, np.int64)
    guess.into([out[tile.top : tile.bottom, tile.left : tile.right]], tile, scale, (ends, room, counts))
    bits = room[1 : 1 + n, : counts[0]].copy()
    inside = scratch("found", (n, bits.shape[1] + 1), torch.int32).numpy().view(np.uint32)
    many = np.empty(n, np.int64)
    loops.inside(bits, ends, inside, many)
    looks = [(int(counts[1 + k]), inside[k, : many[k]].copy()) for k in range(n)]
    return Open(tile, room[0, : counts[0]].copy(), torch.from_numpy(bits.view(np.float32)), looks)


def _put(exact: TileMerge, out: Tensor, found: Open, scale: float) -> None:
    """Merge the open elements into their places."""
    loops, count = door.loops(), len(found.places)
    assert loops is not None
    if count:
        merged = scratch("merged", (1, count))
        exact.of_held(found.values[:, None], [merged], Tile(0, 1, 0, count), scale)
        loops.put(merged[0].numpy(), found.places, out.view(-1).numpy())
