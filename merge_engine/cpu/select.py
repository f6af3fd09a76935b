"""The exact threshold of the k largest magnitudes of task tensors, without a sort and without storing them."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from merge_engine.cpu.keep import EVERY_ROW, Trim
from merge_engine.cpu.merge_tile_by_loops import terms
from merge_engine.cpu.source import Sampled, Source, filled
from merge_engine.cpu.tile_grid import Tile, tiles_of
from merge_engine.loops import door
from merge_engine.runtime.memory import scratch
from merge_engine.runtime.threads import for_each, workers

LOW_BITS = 16  # the coarse histogram counts the upper 15 bits of |x|, the fine one the lower 16 within one coarse bin
# Elements that a sample has of a small tensor; of a large one it has four times as many. A sample of 256 rows by 256
# columns of a delta of rank 32 misses a quantile by 0.5 % (one standard deviation, most of it from rows and columns of
# different norms), and 64 groups of 32 by 32, each of other rows and columns, by 0.2 % (of rank 4, 0.4 %). How much the
# groups differ tells how much: four such deviations to either side hold nearly every k-th.
SAMPLE, GROUPS, LARGEST_SAMPLED = 1 << 14, 64, 1 << 27
_DEVIATIONS = 4
FILLED = 1 << 22  # magnitudes that a bracket may hold of a tensor with many equal ones: 16 MiB
TOGETHER = 4  # thresholds of one sweep: 2 to 5 % of a source are collected for each
COARSE_BINS, FINE_BINS = 1 << (31 - LOW_BITS), 1 << LOW_BITS
_LARGEST = 0x7FFFFFFF  # bits of a magnitude


Bracket = tuple[int, int]  # the least and the largest bits of magnitudes


def trims(
    sources: Sequence[Source],
    k: int,
    ties: str,
    *,
    mine: Sequence[int] | None = None,
    total: Callable[[np.ndarray], np.ndarray] = lambda counts: counts,
) -> list[Trim]:
    """Thresholds that keep exactly the k largest magnitudes of all sources together, one Trim a source.

    Equal magnitudes are taken by lowest position (source, then flat index), or all of them with ties="keep".
    `sources` is indexed afresh in each sweep over the tiles: it may load lazily.

    mine: the sources that this process looks at, the others being looked at by its fellows; all of them if None. The
    result has one Trim for each of mine. total: the sum of what every process counted (int64 arrays of one shape).
    """
    if len(sources) == 1 and mine is None:
        return trims_of_each([sources[0]], [[k]], ties)[0]
    mine = range(len(sources)) if mine is None else mine
    return _trims(sources, k, ties, mine, total, None)


def trims_of_each(sources: Sequence[Source], ks: Sequence[Sequence[int]], ties: str) -> list[list[Trim]]:
    """The thresholds of each source on its own: that keep exactly the ks[i][j] largest magnitudes of sources[i]."""
    found: list[list[Trim]] = [[] for _ in sources]
    for batch in _batches(ks):
        kths = _kths_by_sample([sources[i] for i, _ in batch], [own for _, own in batch])
        for (i, own), known in zip(batch, kths, strict=True):
            for k, kth in zip(own, known, strict=True):
                found[i] += _trims([sources[i]], k, ties, [0], lambda counts: counts, kth)
    return found


def _batches(ks: Sequence[Sequence[int]]) -> Iterator[list[tuple[int, Sequence[int]]]]:
    """(source, some of its ks) of those that are swept together."""
    batch: list[tuple[int, Sequence[int]]] = []
    room = TOGETHER
    for i, own in enumerate(ks):
        for start in range(0, len(own), TOGETHER):
            part = own[start : start + TOGETHER]
            if len(part) > room:
                yield batch
                batch, room = [], TOGETHER
            batch.append((i, part))
            room -= len(part)
    if batch:
        yield batch


def _trims(
    sources: Sequence[Source],
    k: int,
    ties: str,
    mine: Sequence[int],
    total: Callable[[np.ndarray], np.ndarray],
    kth: "Kth | None",
) -> list[Trim]:
    """`trims`; kth: the k-th largest magnitude, where it is known already."""
    if k == 0:
        return [Trim(float("inf"), 0, 0) for _ in mine]
    kth = kth or _kth_by_histogram(sources, k, mine, total)
    value, quota = value_of(kth.bits), kth.quota
    if math.isnan(value):
        raise ValueError("a task tensor overflows float32; wanted smaller factors")
    if ties == "keep" or quota == kth.equal:
        return [Trim(value, EVERY_ROW, 0) for _ in mine]
    tied = {i: tied_rows(sources[i], value, kth.tiles) for i in mine}
    counts = total(np.array([tied[i].sum() if i in tied else 0 for i in range(len(sources))], np.int64))
    left = (quota - (np.cumsum(counts) - counts)).clip(0, counts)
    return [_cut(sources[i], value, tied[i], int(left[i])) for i in mine]


def trim_at(source: Source, ties: str, kth: "Kth") -> Trim:
    """The Trim of a source whose k-th largest magnitude is known."""
    (found,) = _trims([source], kth.quota, ties, [0], lambda counts: counts, kth)
    return found


def value_of(bits: int) -> float:
    """The float32 of these bits."""
    return float(np.int32(bits).view(np.float32))


class Kth(NamedTuple):
    """The k-th largest magnitude: its bits, how many of its equals are among the k, how many there are, and in which
    tiles (None: any)."""

    bits: int
    quota: int
    equal: int
    tiles: Sequence[Tile] | None


def _kth_by_histogram(
    sources: Sequence[Source], k: int, mine: Sequence[int], total: Callable[[np.ndarray], np.ndarray]
) -> Kth:
    """The k-th largest magnitude of all sources together, in two sweeps.

    Exact without a sort: bits(|x|) as an integer is monotone in |x|, so a histogram of its upper 15 bits finds the bin
    that holds the k-th, and one of the lower 16 bits within that bin finds the k-th itself.
    """
    coarse = total(sum((coarse_histogram(sources[i]) for i in mine), start=np.zeros(COARSE_BINS, np.int64)))
    high, inside = locate(coarse, k)
    fine = total(sum((fine_histogram(sources[i], high) for i in mine), start=np.zeros(FINE_BINS, np.int64)))
    low, quota = locate(fine, inside)
    return Kth(high << LOW_BITS | low, quota, int(fine[low]), None)


def _kths_by_sample(sources: Sequence[Source], ks: Sequence[Sequence[int]]) -> list[list[Kth | None]]:
    """The k-th largest of each source for each of its ks, in one sweep: a sample says where each lies, in a bracket.

    The sweep counts what is above a bracket and collects what is inside. None, for a source that cannot be looked at in
    places, for a small or a huge tensor, or where the k-th is outside: the sample costs time, never exactness.
    """
    found: list[list[Kth | None]] = [[None] * len(own) for own in ks]
    fit = [i for i, source in enumerate(sources) if ks[i] and can_be_sampled(source)]
    # All of it on threads that run operators alone: those of several keep cores spinning for a while after them.
    brackets = for_each(fit, lambda i: _brackets(sources[i], ks[i]))  # type: ignore[arg-type]
    looks = {
        i: (_compiled_look if door.loops(sources[i].rows * sources[i].columns) else _look)(sources[i], of)
        for i, of in zip(fit, brackets, strict=True)
    }
    places = [(i, tile) for i in fit for tile in tiles_of(sources[i].rows, sources[i].columns)]
    seen: dict[int, list[list[tuple[int, np.ndarray]]]] = {i: [] for i in fit}
    for (i, _), look in zip(places, for_each(places, lambda place: looks[place[0]](place[1])), strict=True):
        seen[i].append(look)
    wanted = [(i, j) for i in fit for j in range(len(ks[i]))]

    def inside(want: tuple[int, int]) -> Kth | None:
        i, j = want
        return kth_inside(sources[i], ks[i][j], brackets[fit.index(i)][j], [look[j] for look in seen[i]])

    for (i, j), kth in zip(wanted, for_each(wanted, inside), strict=True):
        found[i][j] = kth
    return found


def can_be_sampled(source: Source) -> bool:
    return isinstance(source, Sampled) and 4 * SAMPLE <= source.rows * source.columns <= LARGEST_SAMPLED


def bracket_of(source: Sampled, k: int) -> Bracket | None:
    """Around where a sample has the k-th largest; None where equal magnitudes would fill it."""
    (found,) = _brackets(source, [k])
    return None if found == (_LARGEST, _LARGEST) else found


def _brackets(source: Sampled, ks: Sequence[int]) -> list[Bracket]:
    """(lowest, highest) bits around where a sample has the k-th largest, for every k.

    A bracket that equal magnitudes would fill is one that holds nothing, where it would be large.
    """
    numel = source.rows * source.columns
    groups = _sample(source)
    sample = groups.flatten()
    middles = [max(len(sample) - 1 - k * len(sample) // numel, 0) for k in ks]
    sample.partition(sorted(set(middles)))
    margins = [_margin(groups, sample[middle]) for middle in middles]
    places = [(middle - margin, 2 * margin) for middle, margin in zip(middles, margins, strict=True)]
    ends = [(max(first, 0), min(first + width, len(sample) - 1)) for first, width in places]
    sample.partition(sorted({end for pair in ends for end in pair}))
    brackets = []
    for (first, width), (left, right) in zip(places, ends, strict=True):
        low = int(sample[left]) if left == first else 0
        high = int(sample[right]) if right == first + width else _LARGEST
        inside = int(np.count_nonzero((sample >= low) & (sample <= high)))
        large = low == 0 or inside * numel > FILLED * len(sample)  # as of a delta that is mostly zeros
        many = inside > 2 * width and large
        brackets.append((_LARGEST, _LARGEST) if many else (low, high))
    return brackets


def _sample(source: Sampled) -> np.ndarray:
    """Bits of magnitudes [GROUPS, n]; the rows and columns of each group are spread over all."""
    wanted = min(max(SAMPLE, source.rows * source.columns >> 8), 4 * SAMPLE) // GROUPS
    values = source.part(*_places(source.rows, source.columns, wanted))
    return values.abs().flatten(1).numpy().view(np.int32)


@lru_cache(maxsize=16)  # shapes of a model
def _places(rows: int, columns: int, wanted: int) -> tuple[Tensor, Tensor]:
    """Rows [GROUPS, m] and columns [GROUPS, n] of a matrix [rows, columns], with m n about as many as are wanted."""
    m = min(max(round(wanted**0.5), wanted // columns), rows)
    n = min(wanted // m, columns)
    generator = np.random.default_rng(0)
    return _spread(rows, m, generator), _spread(columns, n, generator)


def _spread(size: int, count: int, generator: np.random.Generator) -> Tensor:
    """`count` indices below `size` for each group [GROUPS, count], one of each of `count` equal parts.

    Within the parts they are drawn, evenly for all groups together: sizes that repeat, as those of heads do, and a
    diagonal are neither missed nor seen by one group alone.
    """
    order, place = generator.random((2, count, GROUPS))
    parts = np.arange(count)[:, None] * GROUPS + order.argsort(axis=1) + place
    return torch.from_numpy((parts * (size / (GROUPS * count))).astype(np.int64).clip(0, size - 1).T.copy())


def _margin(groups: np.ndarray, bits: int) -> int:
    """How many places of the sorted sample the quantile with these bits may be off, estimated from how groups differ.

    At least two standard deviations of a sample of independent elements, and at most an eighth of the sample.
    """
    above = np.count_nonzero(groups > bits, axis=1)
    estimate = _DEVIATIONS * float(above.std()) * GROUPS**0.5
    return round(min(max(estimate, groups.size**0.5), groups.size / 8))


Look = Callable[[Tile], list[tuple[int, np.ndarray]]]


def _look(source: Source, brackets: Sequence[tuple[int, int]]) -> Look:
    """Of a tile and each bracket, (how many magnitudes are above it, those that are inside)."""

    def look(tile: Tile) -> list[tuple[int, np.ndarray]]:
        magnitude = _bits(source, tile).reshape(-1) & np.uint32(_LARGEST)
        found = []
        for low, high in brackets:
            over = magnitude > np.uint32(high)
            found.append((int(np.count_nonzero(over)), magnitude[(magnitude >= np.uint32(low)) ^ over]))
        return found

    return look


def _compiled_look(source: Source, brackets: Sequence[tuple[int, int]]) -> Look:
    """The same, by one loop."""
    loops, known = door.loops(), terms([source])
    assert loops is not None
    lows = np.array([low for low, _ in brackets], np.uint32)
    widths = np.array([high - low for low, high in brackets], np.uint32)

    def look(tile: Tile) -> list[tuple[int, np.ndarray]]:
        term = known
        if not term["rank"]:
            term = known.copy()
            term["b"] = filled(source, tile).data_ptr()
        found = scratch("found", (len(brackets), math.prod(tile.shape) + 1), torch.int32).numpy().view(np.uint32)
        counts = np.empty((len(brackets), 2), np.int64)
        loops.bracket_tile(term, *tile, lows, widths, found, counts)
        return [(int(above), piece[:inside].copy()) for piece, (above, inside) in zip(found, counts, strict=True)]

    return look


def kth_inside(source: Source, k: int, bracket: Bracket, looks: Sequence[tuple[int, np.ndarray]]) -> Kth | None:
    """The k-th largest, of what was counted above a bracket and collected inside it, tile by tile."""
    low, high = bracket
    rank, pieces = k - sum(above for above, _ in looks), [piece for _, piece in looks]
    if not 0 < rank <= sum(map(len, pieces)):
        return None

    def histogram(width: int, shift: int) -> np.ndarray:
        total = np.zeros((width >> shift) + 1, np.int64)
        for piece in pieces:
            _count_bins(piece, low, width, shift, total)
        return total

    shift = (high - low).bit_length() // 2  # of two histograms, neither is large
    place, rank = locate(histogram(high - low, shift), rank)
    low += place << shift
    finest = histogram((1 << shift) - 1, 0)
    place, rank = locate(finest, rank)
    bits = low + place
    looked_at = zip(tiles_of(source.rows, source.columns), looks, strict=True)
    tiles = [tile for tile, (_, piece) in looked_at if (piece == bits).any()]
    return Kth(bits, rank, int(finest[place]), tiles)


def coarse_histogram(source: Source) -> np.ndarray:
    """How many elements have each value of the upper 15 bits of |x|: int64 [COARSE_BINS]."""

    def count(tile: Tile, total: np.ndarray) -> None:
        _count_bins(_bits(source, tile), 0, _LARGEST, LOW_BITS, total)

    return _count_over_tiles(source, count, COARSE_BINS)


def fine_histogram(source: Source, high: int) -> np.ndarray:
    """Of the elements whose upper 15 bits are `high`, how many have each value of the lower 16: int64 [FINE_BINS]."""

    def count(tile: Tile, total: np.ndarray) -> None:
        _count_bins(_bits(source, tile), high << LOW_BITS, FINE_BINS - 1, 0, total)

    return _count_over_tiles(source, count, FINE_BINS)


def _count_bins(bits: np.ndarray, low: int, width: int, shift: int, total: np.ndarray) -> None:
    """total[(|x| - low) >> shift] += 1 for every |x| from low to low + width, all as bits."""
    bits = bits.reshape(-1)
    if loops := door.loops(len(bits)):
        loops.count_bins(bits, np.uint32(low), np.uint32(width), np.uint32(shift), total)
        return
    magnitude = (bits & np.uint32(_LARGEST)).view(np.int32)
    if width < _LARGEST:
        magnitude = magnitude[(magnitude >= low) & (magnitude <= low + width)] - np.int32(low)
    total += torch.bincount(torch.from_numpy(magnitude >> shift), minlength=len(total)).numpy()


def tied_rows(source: Source, value: float, tiles: Sequence[Tile] | None = None) -> np.ndarray:
    """How many elements of each row have |x| = value: int64 [rows]. tiles: where they are, if that is known."""
    target = np.float32(value).view(np.int32)

    def count(tile: Tile, total: np.ndarray) -> None:
        rows = total[tile.top : tile.bottom]
        if loops := door.loops():
            loops.count_equal(_bits(source, tile), np.uint32(target), rows)
            return
        bits = _magnitude_bits(source, tile)
        equal = scratch("mask", bits.shape, torch.bool).numpy()
        np.equal(bits, target, out=equal)
        rows += np.count_nonzero(equal, axis=1)

    return _count_over_tiles(source, count, source.rows, tiles)


def locate(histogram: np.ndarray, k: int) -> tuple[int, int]:
    """(bin of the k-th largest, its rank within the bin), 1 <= k <= histogram.sum()."""
    from_top = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(from_top, k))
    above = int(from_top[place - 1]) if place else 0
    return len(histogram) - 1 - place, k - above


def _cut(source: Source, value: float, tied: np.ndarray, quota: int) -> Trim:
    """The Trim that keeps the first `quota` of the elements with |t| = value, `tied` of them in each row."""
    upto = np.cumsum(tied)
    row = int(np.searchsorted(upto, quota))
    if row == source.rows:
        return Trim(value, source.rows, 0)
    wanted = quota - (int(upto[row - 1]) if row else 0)
    for tile in tiles_of(source.rows, source.columns):
        if tile.top <= row < tile.bottom:
            # Where the others were counted, on one thread: an operator of several has other last bits.
            (equal,) = for_each([tile], lambda tile: filled(source, tile)[row - tile.top].abs() == value)
            places = equal.nonzero().flatten()
            if wanted <= len(places):
                return Trim(value, row, tile.left + (int(places[wanted - 1]) + 1 if wanted else 0))
            wanted -= len(places)
    raise AssertionError(f"row {row} has fewer than {wanted} elements of magnitude {value}")


def _bits(source: Source, tile: Tile) -> np.ndarray:
    """The bits of the tile's values: uint32 [rows, columns]."""
    return filled(source, tile).numpy().view(np.uint32)


def _magnitude_bits(source: Source, tile: Tile) -> np.ndarray:
    """bits(|x|) of the tile, int32 [rows, columns]: monotone in |x|."""
    bits = _bits(source, tile).view(np.int32)
    bits &= np.int32(_LARGEST)
    return bits


def _count_over_tiles(
    source: Source, count: Callable[[Tile, np.ndarray], None], bins: int, tiles: Sequence[Tile] | None = None
) -> np.ndarray:
    """The sum of what `count(tile, total)` adds to a total for every tile; each thread has its own total."""
    threads = torch.get_num_threads()
    tiles = list(tiles_of(source.rows, source.columns)) if tiles is None else tiles

    def count_share(share: Sequence[Tile]) -> np.ndarray:
        total = np.zeros(bins, np.int64)
        for tile in share:
            count(tile, total)
        return total

    return sum(workers(threads).map(count_share, [tiles[i::threads] for i in range(threads)]), np.zeros(bins, np.int64))
