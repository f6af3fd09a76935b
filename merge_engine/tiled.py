"""The torch backend: `reference`'s arithmetic, tile by tile, on the CPU, in memory that does not grow with adapters.

A task tensor is seen through a `Source`, which fills one tile at a time: of ``scaling * B @ A``, recomputed whenever it
is looked at, or of a plain matrix. Selection and merge both look at the same fixed tiles, computed by the same call on
one thread each, so they see the same bits whoever computes them; tiles are shared out over ``torch.get_num_threads()``
threads. An output element is written once.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from merge_engine import rng
from merge_engine.rule import Rule

TILE_ROWS = 64
TILE_ELEMENTS = 1 << 17  # 512 KiB of float32: a tile and its accumulators stay in the L2 and L3 caches of one core
LOW_BITS = 16  # the coarse histogram counts the upper 15 bits of |x|, the fine one the lower 16 within one coarse bin
EVERY_ROW = 1 << 62  # a position that no row reaches
# A sample of 128 rows by 128 columns of a rank-16 delta misses a quantile by 1 % (one standard deviation, most of it
# from rows and columns of different norms): 1 / BRACKET of the elements to either side holds nearly every k-th.
SAMPLE, BRACKET, LARGEST_SAMPLED = 1 << 14, 32, 1 << 27
COARSE_BINS, FINE_BINS = 1 << (31 - LOW_BITS), 1 << LOW_BITS

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
) -> list[Trim]:
    """Thresholds that keep exactly the k largest magnitudes of all sources together, one Trim a source.

    Equal magnitudes are taken by lowest position (source, then flat index), or all of them with ties="keep".
    `sources` is indexed afresh in each sweep over the tiles: it may load lazily.

    mine: the sources that this process looks at, the others being looked at by its fellows; all of them if None. The
    result has one Trim for each of mine. total: the sum of what every process counted (int64 arrays of one shape).
    """
    mine = range(len(sources)) if mine is None else mine
    if k == 0:
        return [Trim(float("inf"), 0, 0) for _ in mine]
    only = sources[0] if len(sources) == 1 else None
    found = _kth_by_sample(only, k) if isinstance(only, Sampled) else None
    bits, quota, equal = found or _kth_by_histogram(sources, k, mine, total)
    value = float(np.int32(bits).view(np.float32))
    if ties == "keep" or quota == equal:
        return [Trim(value, EVERY_ROW, 0) for _ in mine]
    tied = {i: tied_rows(sources[i], value) for i in mine}
    counts = total(np.array([tied[i].sum() if i in tied else 0 for i in range(len(sources))], np.int64))
    left = (quota - (np.cumsum(counts) - counts)).clip(0, counts)
    return [_cut(sources[i], value, tied[i], int(left[i])) for i in mine]


def _kth_by_histogram(
    sources: Sequence[Source], k: int, mine: Sequence[int], total: Callable[[np.ndarray], np.ndarray]
) -> tuple[int, int, int]:
    """(bits of the k-th largest magnitude, how many of its equals are among the k, how many there are).

    Exact without a sort: bits(|x|) as an integer is monotone in |x|, so a histogram of its upper 15 bits finds the bin
    that holds the k-th, and one of the lower 16 bits within that bin finds the k-th itself. Two sweeps.
    """
    coarse = total(sum((coarse_histogram(sources[i]) for i in mine), start=np.zeros(COARSE_BINS, np.int64)))
    high, inside = locate(coarse, k)
    fine = total(sum((fine_histogram(sources[i], high) for i in mine), start=np.zeros(FINE_BINS, np.int64)))
    low, quota = locate(fine, inside)
    return high << LOW_BITS | low, quota, int(fine[low])


def _kth_by_sample(source: Sampled, k: int) -> tuple[int, int, int] | None:
    """The same in one sweep of cheaper steps: a sample says where the k-th lies, within a bracket.

    The sweep counts what is above the bracket and collects what is inside. None, for a small tensor, one whose bracket
    would not fit in memory, or where the k-th is outside: the sample costs time, never exactness.
    """
    numel = source.rows * source.columns
    if not 4 * SAMPLE <= numel <= LARGEST_SAMPLED:
        return None
    rows = _spread(source.rows, max(round(SAMPLE**0.5), SAMPLE // source.columns))
    columns = _spread(source.columns, SAMPLE // len(rows))
    sample = np.sort(source.part(rows, columns).abs().flatten().numpy())[::-1].copy().view(np.int32)
    place, margin = k * len(sample) // numel, len(sample) // BRACKET
    high = int(sample[place - margin]) if place >= margin else 2**31 - 1
    low = int(sample[place + margin]) if place + margin < len(sample) else 0

    def look(tile: Tile) -> tuple[int, np.ndarray]:
        bits = _magnitude_bits(source, tile)
        above = _scratch("mask", bits.shape, torch.bool).numpy()
        inside = _scratch("other mask", bits.shape, torch.bool).numpy()
        np.greater(bits, np.int32(high), out=above)
        np.greater_equal(bits, np.int32(low), out=inside)
        inside ^= above
        return int(np.count_nonzero(above)), bits.reshape(-1)[np.flatnonzero(inside)]

    counts, pieces = zip(*_for_each_tile(source, look), strict=True)
    rank, collected = k - sum(counts), np.concatenate(pieces)
    if not 0 < rank <= len(collected):
        return None
    bits = np.partition(collected, len(collected) - rank)[len(collected) - rank]
    return int(bits), rank - int((collected > bits).sum()), int((collected == bits).sum())


def _spread(size: int, count: int) -> Tensor:
    """At most `count` of the indices below `size`, evenly."""
    return torch.arange(0, size, max(1, -(-size // count)))


def coarse_histogram(source: Source) -> np.ndarray:
    """How many elements have each value of the upper 15 bits of |x|: int64 [COARSE_BINS]."""

    def count(tile: Tile, bits: np.ndarray, total: np.ndarray) -> None:
        bits >>= LOW_BITS
        total += _bincount(bits, COARSE_BINS)

    return _count_over_tiles(source, count, COARSE_BINS)


def fine_histogram(source: Source, high: int) -> np.ndarray:
    """Of the elements whose upper 15 bits are `high`, how many have each value of the lower 16: int64 [FINE_BINS]."""
    first, last = np.int32(high << LOW_BITS), np.int32((high << LOW_BITS) + FINE_BINS - 1)

    def count(tile: Tile, bits: np.ndarray, total: np.ndarray) -> None:
        inside = _scratch("mask", bits.shape, torch.bool).numpy()
        below = _scratch("other mask", bits.shape, torch.bool).numpy()
        np.greater_equal(bits, first, out=inside)
        np.less_equal(bits, last, out=below)
        inside &= below
        total += _bincount(bits[inside] - first, FINE_BINS)

    return _count_over_tiles(source, count, FINE_BINS)


def tied_rows(source: Source, value: float) -> np.ndarray:
    """How many elements of each row have |x| = value: int64 [rows]."""
    target = np.float32(value).view(np.int32)

    def count(tile: Tile, bits: np.ndarray, total: np.ndarray) -> None:
        equal = _scratch("mask", bits.shape, torch.bool).numpy()
        np.equal(bits, target, out=equal)
        total[tile.top : tile.bottom] += np.count_nonzero(equal, axis=1)

    return _count_over_tiles(source, count, source.rows)


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
            _cast(votes, _kept(source, keep, tile), weight, rule)
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
        total.add_(_kept(source, keep, tile), alpha=weight)
    return total.mul_(scale)


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
    counter = torch.float32 if rule.divisor == "weight" else torch.uint8 if len(sources) < 256 else torch.int32
    votes = _scratch("votes", shape).zero_()
    sums = [_scratch(f"sum {side}", shape).zero_() for side in "+-"]
    shares = [_scratch(f"share {side}", shape, counter).zero_() for side in "+-"]
    part, mask = _scratch("part", shape), _scratch("mask", shape, torch.bool)
    for source, weight, keep in zip(sources, weights, keeps, strict=True):
        values = _kept(source, keep, tile)
        _cast(votes, values, weight, rule)
        gain = 1.0 if rule.vote_weighted else weight
        share = weight if rule.divisor == "weight" else 1
        for side, clamp, compare in ((0, torch.clamp_min, np.greater), (1, torch.clamp_max, np.less)):
            sums[side].add_(clamp(values, 0, out=part), alpha=gain)
            if rule.divisor != "one":
                compare(values.numpy(), np.float32(0), out=mask.numpy())
                shares[side].add_(mask.view(torch.uint8), alpha=share)
    elects_plus = np.greater_equal if tied > 0 else np.greater
    elects_plus(votes.numpy(), np.float32(0), out=mask.numpy())
    numerator = _chosen(mask, sums[0], sums[1], part)
    if rule.divisor != "one":
        divisor = _chosen(mask, shares[0], shares[1], votes)
        if rule.divisor == "count":
            divisor.clamp_min_(1)
        else:
            divisor.masked_fill_(divisor == 0, 1)
        numerator.div_(divisor)
    return numerator.mul_(scale)


def _cast(votes: Tensor, values: Tensor, weight: float, rule: Rule) -> None:
    """Add one adapter's ballot to the votes; values are weighted in place where the convention weighs the vote."""
    if rule.vote_weighted and weight != 1:
        values.mul_(weight)
    votes.add_(torch.sign(values, out=_scratch("part", values.shape)) if rule.elect == "frequency" else values)


def _chosen(mask: Tensor, yes: Tensor, no: Tensor, out: Tensor) -> Tensor:
    """out = yes where mask, else no, as float32: exact, since one of the two products is a zero."""
    chosen = _scratch("chosen", mask.shape).copy_(mask.view(torch.uint8))
    torch.mul(yes, chosen, out=out)
    return out.add_(chosen.neg_().add_(1).mul_(no))


def _kept(source: Source, keep: KeepTile, tile: Tile) -> Tensor:
    """The tile of keep(t), in this thread's scratch."""
    values = _filled(source, tile)
    if isinstance(keep, Drop):
        _dropped(values, keep, tile)
        return values.div_(keep.density) if keep.factor is None else values.mul_(keep.factor)
    return values if keep is None else _trimmed(values, keep, tile)


def _trimmed(values: Tensor, keep: Trim, tile: Tile) -> Tensor:
    """hardshrink at the threshold itself drops equal magnitudes; at the next smaller float it keeps them."""
    keeping = float(np.nextafter(np.float32(keep.value), np.float32(-1)))
    if keeping < 0:
        return values
    above, cut = keep.row - tile.top, keep.column - tile.left
    if above >= len(values):
        return _shrink(values, keeping)
    if above < 0:
        return _shrink(values, keep.value)
    _shrink(values[:above], keeping)
    _shrink(values[above, : max(cut, 0)], keeping)
    _shrink(values[above, max(cut, 0) :], keep.value)
    _shrink(values[above + 1 :], keep.value)
    return values


def _shrink(values: Tensor, threshold: float) -> Tensor:
    """values where |values| > threshold, else 0, in place."""
    return torch.ops.aten.hardshrink.out(values, threshold, out=values)


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


def _magnitude_bits(source: Source, tile: Tile) -> np.ndarray:
    """bits(|x|) of the tile, int32, flat: monotone in |x|."""
    bits = _filled(source, tile).view(torch.int32).numpy()
    bits &= np.int32(0x7FFFFFFF)
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


def _bincount(values: np.ndarray, bins: int) -> np.ndarray:
    return torch.bincount(torch.from_numpy(values.reshape(-1)), minlength=bins).numpy()


def _count_over_tiles(source: Source, count: Callable[[Tile, np.ndarray, np.ndarray], None], bins: int) -> np.ndarray:
    """The sum of what `count(tile, bits(|x|), total)` adds to a total for every tile; each thread has its own total."""
    tiles, threads = list(_tiles(source.rows, source.columns)), torch.get_num_threads()

    def count_share(share: list[Tile]) -> np.ndarray:
        total = np.zeros(bins, np.int64)
        for tile in share:
            count(tile, _magnitude_bits(source, tile), total)
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


def _for_each_tile(source: Source, work: Callable[[Tile], R]) -> list[R]:
    """work(tile) for every tile of the source's shape, in their order, shared out over the threads."""
    return list(_workers(torch.get_num_threads()).map(work, _tiles(source.rows, source.columns)))


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
    rows, columns = shape
    buffer = buffers.get(name)
    if buffer is None or buffer.numel() < rows * columns or buffer.dtype != dtype:
        buffer = buffers[name] = torch.empty(max(rows * columns, TILE_ELEMENTS), dtype=dtype)
    return buffer[: rows * columns].view(rows, columns)
