"""The torch backend: `reference`'s arithmetic, tile by tile, on the CPU, in memory that does not grow with adapters.

A task tensor is seen through a `Source`, which fills one tile at a time: of ``scaling * B @ A``, recomputed whenever it
is looked at, or of a plain matrix. Selection and merge both look at the same fixed tiles, computed by the same call on
one thread each, so they see the same bits whoever computes them; tiles are shared out over ``torch.get_num_threads()``
threads. An output element is written once.

What is done with a tile is written twice: as operators of torch and numpy, and as one compiled loop (`loops`) for where
Numba is installed. The bits are the same.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from merge_engine import jit, rng
from merge_engine.rule import Rule

TILE_ROWS = 64
TILE_ELEMENTS = 1 << 17  # 512 KiB of float32: a tile and its accumulators stay in the L2 and L3 caches of one core
LOW_BITS = 16  # the coarse histogram counts the upper 15 bits of |x|, the fine one the lower 16 within one coarse bin
EVERY_ROW = 1 << 62  # a position that no row reaches
# A sample of 128 rows by 128 columns of a rank-16 delta misses a quantile by 1 % (one standard deviation, most of it
# from rows and columns of different norms): 1 / BRACKET of the elements to either side holds nearly every k-th.
SAMPLE, BRACKET, LARGEST_SAMPLED = 1 << 14, 32, 1 << 27
COARSE_BINS, FINE_BINS = 1 << (31 - LOW_BITS), 1 << LOW_BITS
_LARGEST = 0x7FFFFFFF  # bits of a magnitude

R = TypeVar("R")


class Tile(NamedTuple):
    """Rows [top, bottom) by columns [left, right) of a task tensor."""

    top: int
    bottom: int
    left: int
    right: int


class Source(Protocol):
    """A task tensor [rows, columns] in float32 that can be looked at tile by tile."""

    rows: int
    columns: int

    def fill(self, tile: Tile, out: Tensor) -> None:
        """Write the tile into out [bottom - top, right - left], float32 and contiguous."""
        ...


@runtime_checkable
class Sampled(Source, Protocol):
    """A source that can be looked at in places."""

    def part(self, rows: Tensor, columns: Tensor) -> Tensor:
        """What is at rows x columns (indices), in float32, to the last bits: for an estimate."""
        ...


class Product:
    """scaling * B @ A with A [r, N] and B [M, r] of any float dtype, multiplied in float32."""

    def __init__(self, A: Tensor, B: Tensor, scaling: float) -> None:
        self.A, self.B, self.scaling = A.float().contiguous(), B.float().contiguous(), scaling
        self.rows, self.columns = B.shape[0], A.shape[1]

    def fill(self, tile: Tile, out: Tensor) -> None:
        rows, columns = self.B[tile.top : tile.bottom], self.A[:, tile.left : tile.right]
        out.addmm_(rows, columns, beta=0, alpha=self.scaling)

    def part(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self.B[rows] @ self.A[:, columns] * self.scaling


class Dense:
    """A matrix [M, N] of any float dtype, widened to float32."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.rows, self.columns = matrix.shape

    def fill(self, tile: Tile, out: Tensor) -> None:
        out.copy_(self.matrix[tile.top : tile.bottom, tile.left : tile.right])

    def part(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self.matrix[rows][:, columns].float()


class Difference:
    """x - base, both [M, N] of any float dtype and any strides, in float32."""

    def __init__(self, x: Tensor, base: Tensor) -> None:
        self.x, self.base = x, base
        self.rows, self.columns = x.shape

    def fill(self, tile: Tile, out: Tensor) -> None:
        part = (slice(tile.top, tile.bottom), slice(tile.left, tile.right))
        base = _scratch("base", out.shape)
        out.copy_(self.x[part]).sub_(base.copy_(self.base[part]))

    def part(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self.x[rows][:, columns].float() - self.base[rows][:, columns].float()


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


def merge_deltas(
    sources: Sequence[Source],
    weights: Sequence[float],
    keeps: Sequence[KeepTile],
    rule: Rule,
    *,
    scale: float = 1.0,
    tied: int = 1,
    base: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """(base +) scale * combine(w_i keep(t_i) where sign(keep(t_i)) is elected) [M, N]: one pass, one store an element.

    sources: task tensors of one shape. keeps: what stays of each (`trims`, `Drop`, or None for all).
    tied: the side that a column with a vote of 0 elects (+1, -1). base: [M, N] of any float dtype to add to.
    out: [M, N] of any float dtype and any strides to write into, by default new and float32; it may be `base` itself,
        if no source looks at it.
    Follows `reference.combine`; sums run in adapter order in float32, the base is added last, and the one rounding is
    the store into out.
    """
    if out is None:
        out = torch.empty(sources[0].rows, sources[0].columns)
    merged = out

    def merge(tile: Tile) -> None:
        view = merged[tile.top : tile.bottom, tile.left : tile.right]
        if rule.elect == "none":
            values = _sum_tile(sources, weights, keeps, tile, scale)
        else:
            values = _elect_tile(sources, weights, keeps, rule, tile, scale, tied)
        if base is not None:
            under = base[tile.top : tile.bottom, tile.left : tile.right]
            values = under + values if base.dtype == torch.float64 else values.add_(under)
        view.copy_(values)

    _for_each_tile(sources[0], merge)
    return merged


def trims(
    sources: Sequence[Source],
    k: int,
    ties: str,
    *,
    mine: Sequence[int] | None = None,
    total: Callable[[np.ndarray], np.ndarray] = lambda counts: counts,
    kth: "Kth | None" = None,
) -> list[Trim]:
    """Thresholds that keep exactly the k largest magnitudes of all sources together, one Trim a source.

    Equal magnitudes are taken by lowest position (source, then flat index), or all of them with ties="keep".
    `sources` is indexed afresh in each sweep over the tiles: it may load lazily.

    mine: the sources that this process looks at, the others being looked at by its fellows; all of them if None. The
    result has one Trim for each of mine. total: the sum of what every process counted (int64 arrays of one shape).
    kth: the k-th largest magnitude, where it is known already (`kths_by_sample`).
    """
    mine = range(len(sources)) if mine is None else mine
    if k == 0:
        return [Trim(float("inf"), 0, 0) for _ in mine]
    if kth is None and len(sources) == 1:
        (kth,) = kths_by_sample(sources[0], [k])
    kth = kth or _kth_by_histogram(sources, k, mine, total)
    value, quota = float(np.int32(kth.bits).view(np.float32)), kth.quota
    if ties == "keep" or quota == kth.equal:
        return [Trim(value, EVERY_ROW, 0) for _ in mine]
    tied = {i: tied_rows(sources[i], value, kth.tiles) for i in mine}
    counts = total(np.array([tied[i].sum() if i in tied else 0 for i in range(len(sources))], np.int64))
    left = (quota - (np.cumsum(counts) - counts)).clip(0, counts)
    return [_cut(sources[i], value, tied[i], int(left[i])) for i in mine]


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


def kths_by_sample(source: Source, ks: Sequence[int]) -> list[Kth | None]:
    """The same of one source for every k, in one sweep of cheaper steps: a sample says where each lies, in a bracket.

    The sweep counts what is above a bracket and collects what is inside. None, for a source that cannot be looked at in
    places, a small tensor, one whose brackets would not fit in memory, or where the k-th is outside: the sample costs
    time, never exactness.
    """
    numel = source.rows * source.columns
    if not (isinstance(source, Sampled) and 4 * SAMPLE <= numel <= LARGEST_SAMPLED):
        return [None] * len(ks)
    rows = _spread(source.rows, max(round(SAMPLE**0.5), SAMPLE // source.columns))
    columns = _spread(source.columns, SAMPLE // len(rows))
    sample = np.sort(source.part(rows, columns).abs().flatten().numpy())[::-1].copy().view(np.int32)
    brackets = [_bracket(sample, k * len(sample) // numel) for k in ks]

    def look(tile: Tile) -> list[tuple[int, np.ndarray]]:
        bits = _bits(source, tile).reshape(-1)
        return [_inside(bits, low, high) for low, high in brackets]

    looks = _for_each_tile(source, look)
    return [
        _kth_inside(source, k, low, high, [tile[i] for tile in looks])
        for i, (k, (low, high)) in enumerate(zip(ks, brackets, strict=True))
    ]


def _bracket(sample: np.ndarray, place: int) -> tuple[int, int]:
    """(lowest, highest) bits around a place of the sample, which falls."""
    margin = len(sample) // BRACKET
    high = int(sample[place - margin]) if place >= margin else _LARGEST
    low = int(sample[place + margin]) if place + margin < len(sample) else 0
    return low, high


def _inside(bits: np.ndarray, low: int, high: int) -> tuple[int, np.ndarray]:
    """(how many magnitudes are above high, those from low to high), of float32 values as uint32 [n]."""
    if loops := jit.loops():
        found = _scratch("found", (len(bits) + 1,), torch.int32).numpy().view(np.uint32)
        above, inside = loops.bracket(bits, np.uint32(low), np.uint32(high - low), found)
        return int(above), found[: int(inside)].copy()
    magnitude = bits & np.uint32(_LARGEST)
    over = magnitude > np.uint32(high)
    return int(np.count_nonzero(over)), magnitude[(magnitude >= np.uint32(low)) ^ over]


def _kth_inside(source: Source, k: int, low: int, high: int, looks: Sequence[tuple[int, np.ndarray]]) -> Kth | None:
    """The k-th largest, of what was counted above a bracket and collected inside it, tile by tile."""
    rank, inside = k - sum(above for above, _ in looks), np.concatenate([piece for _, piece in looks])
    if not 0 < rank <= len(inside):
        return None
    shift = max(0, (high - low).bit_length() - LOW_BITS)
    place, rank = locate(_count_bins(inside, low, high - low, shift), rank)
    low += place << shift
    finest = _count_bins(inside, low, (1 << shift) - 1, 0)
    place, rank = locate(finest, rank)
    bits = low + place
    tiles = [tile for tile, (_, piece) in zip(_tiles_of(source), looks, strict=True) if (piece == bits).any()]
    return Kth(bits, rank, int(finest[place]), tiles)


def _spread(size: int, count: int) -> Tensor:
    """At most `count` of the indices below `size`, evenly."""
    return torch.arange(0, size, max(1, -(-size // count)))


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


def _count_bins(bits: np.ndarray, low: int, width: int, shift: int, total: np.ndarray | None = None) -> np.ndarray:
    """total[(|x| - low) >> shift] += 1 for every |x| from low to low + width, all as bits; total is new if None."""
    bits = bits.reshape(-1)
    if total is None:
        total = np.zeros((width >> shift) + 1, np.int64)
    if loops := jit.loops():
        loops.count_bins(bits, np.uint32(low), np.uint32(width), np.uint32(shift), total)
        return total
    magnitude = (bits & np.uint32(_LARGEST)).view(np.int32)
    if width < _LARGEST:
        magnitude = magnitude[(magnitude >= low) & (magnitude <= low + width)] - np.int32(low)
    total += torch.bincount(torch.from_numpy(magnitude >> shift), minlength=len(total)).numpy()
    return total


def tied_rows(source: Source, value: float, tiles: Sequence[Tile] | None = None) -> np.ndarray:
    """How many elements of each row have |x| = value: int64 [rows]. tiles: where they are, if that is known."""
    target = np.float32(value).view(np.int32)

    def count(tile: Tile, total: np.ndarray) -> None:
        rows = total[tile.top : tile.bottom]
        if loops := jit.loops():
            loops.count_equal(_bits(source, tile), np.uint32(target), rows)
            return
        bits = _magnitude_bits(source, tile)
        equal = _scratch("mask", bits.shape, torch.bool).numpy()
        np.equal(bits, target, out=equal)
        rows += np.count_nonzero(equal, axis=1)

    return _count_over_tiles(source, count, source.rows, tiles)


def locate(histogram: np.ndarray, k: int) -> tuple[int, int]:
    """(bin of the k-th largest, its rank within the bin), 1 <= k <= histogram.sum()."""
    from_top = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(from_top, k))
    above = int(from_top[place - 1]) if place else 0
    return len(histogram) - 1 - place, k - above


def l1_norms(source: Source, drop: Drop) -> tuple[float, float]:
    """(sum |t|, sum |t| over what `drop` keeps), each tile summed in float32, tiles in float64 and in order."""

    def norms(tile: Tile) -> tuple[float, float]:
        values = _filled(source, tile)
        before = values.abs().sum().item()
        return before, _dropped(values, drop, tile).abs().sum().item()

    pairs = _for_each_tile(source, norms)
    return sum(before for before, _ in pairs), sum(after for _, after in pairs)


def l1_factor(source: Source, drop: Drop) -> float:
    """|t|_1 / |keep(t)|_1, and 1 where either norm is below 1e-7 or everything is kept (mergekit's rescale)."""
    before, after = l1_norms(source, drop)
    return 1.0 if drop.density >= 1 or min(before, after) < 1e-7 else before / after


def vote_balance(sources: Sequence[Source], weights: Sequence[float], keeps: Sequence[KeepTile], rule: Rule) -> int:
    """How many columns vote + less how many vote -: its sign, over all modules, is the model's majority sign."""

    def balance(tile: Tile) -> int:
        votes = _scratch("votes", _shape(tile)).zero_()
        for source, weight, keep in zip(sources, weights, keeps, strict=True):
            values = _times(_kept(source, keep, tile), weight if rule.vote_weighted else 1.0)
            votes.add_(values.sign_() if rule.elect == "frequency" else values)
        return int(votes.sign_().sum(dtype=torch.float64).item())

    return sum(_for_each_tile(sources[0], balance))


def _sum_tile(
    sources: Sequence[Source],
    weights: Sequence[float],
    keeps: Sequence[KeepTile],
    tile: Tile,
    scale: float,
) -> Tensor:
    """scale * sum_i w_i keep(t_i), in this thread's scratch."""
    total = _scratch("votes", _shape(tile)).zero_()
    for source, weight, keep in zip(sources, weights, keeps, strict=True):
        if loops := jit.loops():
            values = _dropped_only(source, keep, tile)
            loops.add_kept(values.numpy(), *_limits(keep, tile), np.float32(weight), total.numpy())
        else:
            total.add_(_times(_kept(source, keep, tile), weight))
    return _times(total, scale)


def _elect_tile(
    sources: Sequence[Source],
    weights: Sequence[float],
    keeps: Sequence[KeepTile],
    rule: Rule,
    tile: Tile,
    scale: float,
    tied: int,
) -> Tensor:
    """scale * sum of the elected side / divisor, in this thread's scratch.

    Both sides are carried along, and one is chosen at the end.
    """
    shape = _shape(tile)
    counter = torch.uint8 if rule.divisor == "count" and len(sources) < 256 else torch.float32
    votes = _scratch("votes", shape).zero_()
    sums = _scratch("sums", (2, *shape)).zero_()
    shares = _scratch("shares", (2, 0, 0) if rule.divisor == "one" else (2, *shape), counter).zero_()
    for source, weight, keep in zip(sources, weights, keeps, strict=True):
        ballot, gain = (weight, 1.0) if rule.vote_weighted else (1.0, weight)
        share = weight if rule.divisor == "weight" else 1
        if loops := jit.loops():
            loops.cast_kept(
                _dropped_only(source, keep, tile).numpy(),
                *_limits(keep, tile),
                np.float32(ballot),
                np.float32(gain),
                rule.elect == "frequency",
                shares.numpy().dtype.type(share),
                *(votes.numpy(), sums.numpy(), shares.numpy()),
            )
        else:
            values = _times(_kept(source, keep, tile), ballot)
            _cast(values, gain, rule.elect == "frequency", share, votes, sums, shares)
    part = _scratch("part", shape)
    if loops := jit.loops():
        loops.elected(votes.numpy(), sums.numpy(), shares.numpy(), tied > 0, np.float32(scale), part.numpy())
        return part
    return _times(_elected(votes, sums, shares, tied, part), scale)


def _cast(
    values: Tensor, gain: float, by_sign: bool, share: float, votes: Tensor, sums: Tensor, shares: Tensor
) -> None:
    """votes += values, or their signs; sums[side] += gain * values and shares[side] += share, where these are on it."""
    part, mask = _scratch("part", values.shape), _scratch("mask", values.shape, torch.bool)
    votes.add_(torch.sign(values, out=part) if by_sign else values)
    for side, clamp, compare in ((0, torch.clamp_min, np.greater), (1, torch.clamp_max, np.less)):
        sums[side].add_(_times(clamp(values, 0, out=part), gain))
        if shares.shape[1]:
            compare(values.numpy(), np.float32(0), out=mask.numpy())
            shares[side].add_(mask.view(torch.uint8), alpha=share)


def _elected(votes: Tensor, sums: Tensor, shares: Tensor, tied: int, out: Tensor) -> Tensor:
    """out = the sum of the side that is elected / its share, or 1 where that is 0."""
    mask = _scratch("mask", votes.shape, torch.bool)
    elects_plus = np.greater_equal if tied > 0 else np.greater
    elects_plus(votes.numpy(), np.float32(0), out=mask.numpy())
    _chosen(mask, sums[0], sums[1], out)
    if shares.shape[1]:
        divisor = _chosen(mask, shares[0], shares[1], votes)
        out.div_(divisor.masked_fill_(divisor == 0, 1))
    return out


def _times(values: Tensor, factor: float) -> Tensor:
    """values * factor in place."""
    return values if factor == 1 else values.mul_(factor)


def _chosen(mask: Tensor, yes: Tensor, no: Tensor, out: Tensor) -> Tensor:
    """out = yes where mask, else no, as float32: exact, since one of the two products is a zero."""
    chosen = _scratch("chosen", mask.shape).copy_(mask.view(torch.uint8))
    torch.mul(yes, chosen, out=out)
    return out.add_(chosen.neg_().add_(1).mul_(no))


def _kept(source: Source, keep: KeepTile, tile: Tile) -> Tensor:
    """The tile of keep(t), in this thread's scratch."""
    values = _dropped_only(source, keep, tile)
    return _trimmed(values, keep, tile) if isinstance(keep, Trim) else values


def _dropped_only(source: Source, keep: KeepTile, tile: Tile) -> Tensor:
    """The tile of keep(t), but for a trim, which is still to be done; in this thread's scratch."""
    values = _filled(source, tile)
    if isinstance(keep, Drop):
        _dropped(values, keep, tile)
        return values.div_(keep.density) if keep.factor is None else values.mul_(keep.factor)
    return values


def _limits(keep: KeepTile, tile: Tile) -> tuple[np.float32, np.float32, int, int]:
    """(below, above, row, column): a trim keeps |t| > below before that place of the tile, |t| > above from there on.

    A smaller float than the threshold keeps equal magnitudes too; what is less than zero keeps everything.
    """
    if not isinstance(keep, Trim):
        return np.float32(-1), np.float32(-1), 0, 0
    value = np.float32(keep.value)
    column = min(max(keep.column - tile.left, 0), tile.right - tile.left)
    return np.nextafter(value, np.float32(-1)), value, keep.row - tile.top, column


def _trimmed(values: Tensor, keep: Trim, tile: Tile) -> Tensor:
    """values where `_limits` keeps them, else 0, in place."""
    below, above, row, column = _limits(keep, tile)
    if row >= len(values):
        return _shrink(values, below)
    if row < 0:
        return _shrink(values, above)
    _shrink(values[:row], below)
    _shrink(values[row, :column], below)
    _shrink(values[row, column:], above)
    _shrink(values[row + 1 :], above)
    return values


def _shrink(values: Tensor, limit: np.float32) -> Tensor:
    """values where |values| > limit, else 0, in place."""
    return values if limit < 0 else torch.ops.aten.hardshrink.out(values, float(limit), out=values)


def _cut(source: Source, value: float, tied: np.ndarray, quota: int) -> Trim:
    """The Trim that keeps the first `quota` of the elements with |t| = value, `tied` of them in each row."""
    upto = np.cumsum(tied)
    row = int(np.searchsorted(upto, quota))
    if row == source.rows:
        return Trim(value, source.rows, 0)
    wanted = quota - (int(upto[row - 1]) if row else 0)
    for tile in _tiles(source.rows, source.columns):
        if tile.top <= row < tile.bottom:
            equal = _filled(source, tile)[row - tile.top].abs_() == value
            places = equal.nonzero().flatten()
            if wanted <= len(places):
                return Trim(value, row, tile.left + (int(places[wanted - 1]) + 1 if wanted else 0))
            wanted -= len(places)
    raise AssertionError(f"row {row} has fewer than {wanted} elements of magnitude {value}")


def _filled(source: Source, tile: Tile) -> Tensor:
    values = _scratch("values", _shape(tile))
    source.fill(tile, values)
    return values


def _bits(source: Source, tile: Tile) -> np.ndarray:
    """The bits of the tile's values: uint32 [rows, columns]."""
    return _filled(source, tile).numpy().view(np.uint32)


def _magnitude_bits(source: Source, tile: Tile) -> np.ndarray:
    """bits(|x|) of the tile, int32 [rows, columns]: monotone in |x|."""
    bits = _bits(source, tile).view(np.int32)
    bits &= np.int32(_LARGEST)
    return bits


def _dropped(values: Tensor, drop: Drop, tile: Tile) -> Tensor:
    """values where the mask keeps them, else 0, in place and not rescaled."""
    mask = rng.keep_mask(
        drop.density,
        seed=drop.seed,
        stream=drop.stream,
        adapter=drop.adapter,
        rows=range(tile.top, tile.bottom),
        columns=range(tile.left, tile.right),
        out=_scratch("mask", values.shape, torch.bool),
    )
    return values.mul_(_scratch("part", values.shape).copy_(mask.view(torch.uint8)))


def _count_over_tiles(
    source: Source, count: Callable[[Tile, np.ndarray], None], bins: int, tiles: Sequence[Tile] | None = None
) -> np.ndarray:
    """The sum of what `count(tile, total)` adds to a total for every tile; each thread has its own total."""
    threads = torch.get_num_threads()
    tiles = list(_tiles_of(source)) if tiles is None else tiles

    def count_share(share: Sequence[Tile]) -> np.ndarray:
        total = np.zeros(bins, np.int64)
        for tile in share:
            count(tile, total)
        return total

    return sum(
        _workers(threads).map(count_share, [tiles[i::threads] for i in range(threads)]), np.zeros(bins, np.int64)
    )


def _shape(tile: Tile) -> tuple[int, int]:
    return tile.bottom - tile.top, tile.right - tile.left


def _tiles(rows: int, columns: int) -> Iterator[Tile]:
    """The fixed tiles of a [rows, columns] tensor, row-major: a function of its shape alone."""
    if rows == 0 or columns == 0:
        return
    width = max(1, min(columns, TILE_ELEMENTS // min(rows, TILE_ROWS)))
    height = max(1, min(rows, TILE_ELEMENTS // width))
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield Tile(top, min(top + height, rows), left, min(left + width, columns))


def _tiles_of(source: Source) -> Iterator[Tile]:
    return _tiles(source.rows, source.columns)


def _for_each_tile(source: Source, work: Callable[[Tile], R]) -> list[R]:
    """work(tile) for every tile of the source's shape, in their order, shared out over the threads."""
    tiles, threads = list(_tiles_of(source)), torch.get_num_threads()
    left = iter(range(len(tiles)))  # each thread takes the next as it gets to it: one hand-over a thread, not a tile

    def share(_: int) -> list[tuple[int, R]]:
        return [(i, work(tiles[i])) for i in left]

    done = [pair for pairs in _workers(threads).map(share, range(min(threads, len(tiles)))) for pair in pairs]
    return [result for _, result in sorted(done, key=itemgetter(0))]


@lru_cache(maxsize=1)
def _workers(threads: int) -> ThreadPoolExecutor:
    """Threads that each run torch's operators on one thread: the tiles are what runs in parallel."""
    ready = threading.Barrier(threads + 1)

    def start() -> None:
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="merge_engine")
    for _ in range(threads):
        pool.submit(start)
    ready.wait()
    torch.set_num_threads(threads)  # the setting is each thread's own, but new threads copy the latest
    return pool


_local = threading.local()


def _scratch(name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """This thread's buffer of that name, seen as [shape]: what it holds is undefined."""
    buffers: dict[str, Tensor] = _local.__dict__
    size = math.prod(shape)
    buffer = buffers.get(name)
    if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
        buffer = buffers[name] = torch.empty(max(size, TILE_ELEMENTS), dtype=dtype)
    return buffer[:size].view(shape)
