"""The k-th largest magnitude, exactly: histograms of bits(|t|), a monotone integer, over recomputed tiles.

A coarse histogram of all elements finds a narrow interval that holds the k-th; finer histograms of the elements in the
interval narrow it down to a single value. Counts are integers, so the result does not depend on their order. The coarse
histogram is made in registers (`tl.histogram`), the fine ones by atomics, which few elements need.

Why 128 coarse bins and not 2048: `tl.histogram` uses ballots, so its cost grows with the number of bins. In the SASS
for sm_90 an element takes 37 instructions at 128 bins, 54 at 256 and 222 (with 255 registers) at 2048. And with one
atomic per element into a global histogram, threads would queue at the few bins that hold most of a bell curve. 128 bins
of a quarter octave each cover 2**-30 to 2**2. Only the two outermost are wide: a k-th there takes one more fine pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, arch_of, search_launch
from .source import Drop, Source, Trim, check_tensor, launch_of, task_arguments, tiles_of
from .task_tile import TERMS, kept, task_tile, tile_place
from .terms import terms_of

COARSE_BINS: tl.constexpr = tl.constexpr(128)
COARSE_SHIFT: tl.constexpr = tl.constexpr(21)  # the exponent and two bits of the fraction
COARSE_FIRST: tl.constexpr = tl.constexpr(((127 + 2) << 2) - 128)  # the last bin starts a quarter octave below 2**2
FINE_BINS: tl.constexpr = tl.constexpr(2048)
FINE_PASSES = 3  # an outermost bin is at most 2**31 wide: 11 + 11 + 9 bits; the others are done after two

TILES_A_PROGRAM = 16  # a program adds its coarse counts to memory once for so many tiles

# int32 words of an interval of bits(|t|), one for each recipe, module and adapter: (first, width, shift).
INTERVAL: tl.constexpr = tl.constexpr(3)

Total = Callable[[Tensor], Tensor]  # what this process counted -> the sum over all processes


def _alone(counts: Tensor) -> Tensor:
    """The `Total` of a single process."""
    return counts


@triton.jit
def _magnitude_bits(
    task,
    scaling_ptr,
    place,
    adapter,
    RANK: tl.constexpr,
    SUBTRACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """bits(|scaling * product|) of a tile: int32, monotone in the magnitude, 0 outside the tensor."""
    module, _, _ = place
    _, _, _, _, _, _, _, adapters, _, _ = task
    product = task_tile(task, place, adapter, RANK, SUBTRACT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R)
    t = product * tl.load(scaling_ptr + module * adapters + adapter)
    return t.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _share(program, adapters, M, N, TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(module * adapters + adapter, first tile, end tile) of a program: a run of tiles of one task tensor."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    runs = tl.cdiv(tiles, TILES)
    first = program % runs * TILES
    return tl.cast(program // runs, tl.int64), first, tl.minimum(first + TILES, tiles)


@triton.jit(do_not_specialize=["modules", "adapters"])
def _coarse_histogram_kernel(
    counts_ptr,  # int32 [modules, adapters, COARSE_BINS], added to
    scaling_ptr,  # float32 [modules, adapters]
    x_ptr,  # this and the following as in merge._merge_deltas_kernel
    stride_xm,
    stride_xa,
    stride_xr,
    a_ptr,
    minus_ptr,
    modules,
    adapters,
    M,
    N,
    TILES: tl.constexpr,  # tiles a program
    RANK: tl.constexpr,
    SUBTRACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """counts[module, adapter, bin] += how many elements have clamp((bits(|t|) >> 21) - COARSE_FIRST) = bin.

    Elements outside the tensor are 0 and count in the first bin, which changes no rank: ranks count from the top.
    """
    task = (x_ptr, stride_xm, stride_xa, stride_xr, a_ptr, minus_ptr, modules, adapters, M, N)
    tensor, first, end = _share(tl.program_id(0), adapters, M, N, TILES, BLOCK_M, BLOCK_N)
    offs_bin = tl.arange(0, COARSE_BINS)
    counts = tl.zeros([COARSE_BINS], tl.int32)
    for tile in range(first, end):
        _, row, column = tile_place(tile, M, N, BLOCK_M, BLOCK_N)
        place = (tensor // adapters, row, column)
        bits = _magnitude_bits(
            task, scaling_ptr, place, tensor % adapters, RANK, SUBTRACT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R
        )
        bins = tl.minimum(tl.maximum((bits >> COARSE_SHIFT) - COARSE_FIRST, 0), COARSE_BINS - 1)
        counts += tl.histogram(tl.ravel(bins), COARSE_BINS)
    tl.atomic_add(counts_ptr + tensor * COARSE_BINS + offs_bin, counts, mask=counts != 0, sem="relaxed")


@triton.jit(do_not_specialize=["modules", "adapters", "recipes"])
def _fine_histogram_kernel(
    counts_ptr,  # int32 [recipes, modules, adapters, FINE_BINS], added to
    interval_ptr,  # int32 [recipes, modules, adapters, INTERVAL]
    scaling_ptr,  # float32 [modules, adapters]
    x_ptr,  # this and the following as in merge._merge_deltas_kernel
    stride_xm,
    stride_xa,
    stride_xr,
    a_ptr,
    minus_ptr,
    modules,
    adapters,
    M,
    N,
    recipes,
    TILES: tl.constexpr,
    RANK: tl.constexpr,
    SUBTRACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """counts[.., bin] += how many elements within the interval have (bits(|t|) - first) >> shift = bin."""
    task = (x_ptr, stride_xm, stride_xa, stride_xr, a_ptr, minus_ptr, modules, adapters, M, N)
    tensor, first, end = _share(tl.program_id(0), adapters, M, N, TILES, BLOCK_M, BLOCK_N)
    open_intervals = 0
    for recipe in range(recipes):
        interval = interval_ptr + (recipe * modules * adapters + tensor) * INTERVAL
        open_intervals += (tl.load(interval + 1) > 1).to(tl.int32)
    if open_intervals == 0:
        end = first
    for tile in range(first, end):
        _, row, column = tile_place(tile, M, N, BLOCK_M, BLOCK_N)
        place = (tensor // adapters, row, column)
        bits = _magnitude_bits(
            task, scaling_ptr, place, tensor % adapters, RANK, SUBTRACT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R
        )
        mask = (row + tl.arange(0, BLOCK_M) < M)[:, None] & (column + tl.arange(0, BLOCK_N) < N)[None, :]
        for recipe in range(recipes):
            slot = recipe * modules * adapters + tensor
            lowest = tl.load(interval_ptr + slot * INTERVAL)
            width = tl.load(interval_ptr + slot * INTERVAL + 1)
            shift = tl.load(interval_ptr + slot * INTERVAL + 2)
            above = bits - lowest
            # Compared once more, since to Triton 3.9's interpreter what `&` makes is no mask of an atomic.
            inside = (mask & (above >= 0) & (above < width) & (width > 1)) != 0
            tl.atomic_add(counts_ptr + slot * FINE_BINS + (above >> shift), 1, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["modules", "adapters", "recipes"])
def _tied_rows_kernel(
    counts_ptr,  # int32 [recipes, modules, adapters, M], added to
    value_ptr,  # int32 [recipes, modules, adapters]: bits of the threshold, -1 where ties need no count
    scaling_ptr,  # float32 [modules, adapters]
    x_ptr,  # this and the following as in merge._merge_deltas_kernel
    stride_xm,
    stride_xa,
    stride_xr,
    a_ptr,
    minus_ptr,
    modules,
    adapters,
    M,
    N,
    recipes,
    TILES: tl.constexpr,
    RANK: tl.constexpr,
    SUBTRACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """counts[.., row] += how many elements of the row have |t| = value."""
    task = (x_ptr, stride_xm, stride_xa, stride_xr, a_ptr, minus_ptr, modules, adapters, M, N)
    tensor, first, end = _share(tl.program_id(0), adapters, M, N, TILES, BLOCK_M, BLOCK_N)
    wanted = -1
    for recipe in range(recipes):
        wanted = tl.maximum(wanted, tl.load(value_ptr + recipe * modules * adapters + tensor))
    if wanted < 0:
        end = first
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    for tile in range(first, end):
        _, row, column = tile_place(tile, M, N, BLOCK_M, BLOCK_N)
        place = (tensor // adapters, row, column)
        bits = _magnitude_bits(
            task, scaling_ptr, place, tensor % adapters, RANK, SUBTRACT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R
        )
        for recipe in range(recipes):
            slot = recipe * modules * adapters + tensor
            equal = (bits == tl.load(value_ptr + slot)) & (column + offs_n < N)[None, :]
            counts = tl.sum(equal.to(tl.int32), axis=1)
            mask = ((row + offs_m < M) & (counts > 0)) != 0
            tl.atomic_add(counts_ptr + slot * M + row + offs_m, counts, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["modules", "adapters"])
def _tied_columns_kernel(
    flags_ptr,  # int8 [recipes, modules, adapters, N], zeroed
    row_ptr,  # int32 [recipes, modules, adapters]: the row to look at, -1 for none
    value_ptr,  # int32 [recipes, modules, adapters]: bits of the threshold
    scaling_ptr,  # float32 [modules, adapters]
    x_ptr,  # this and the following as in merge._merge_deltas_kernel
    stride_xm,
    stride_xa,
    stride_xr,
    a_ptr,
    minus_ptr,
    modules,
    adapters,
    M,
    N,
    RANK: tl.constexpr,
    SUBTRACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """flags[.., column] = 1 where the element of the row has |t| = value: one program a tile of columns."""
    task = (x_ptr, stride_xm, stride_xa, stride_xr, a_ptr, minus_ptr, modules, adapters, M, N)
    across = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    slot = tl.cast(program // across, tl.int64)
    tensor = slot % (modules * adapters)
    wanted = tl.load(row_ptr + slot)
    if wanted >= 0:
        row = tl.cast(wanted // BLOCK_M * BLOCK_M, tl.int64)
        column = tl.cast(program % across, tl.int64) * BLOCK_N
        place = (tensor // adapters, row, column)
        bits = _magnitude_bits(
            task, scaling_ptr, place, tensor % adapters, RANK, SUBTRACT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R
        )
        columns = column + tl.arange(0, BLOCK_N)
        mask = (row + tl.arange(0, BLOCK_M) == wanted)[:, None] & (columns < N)[None, :]
        mask &= bits == tl.load(value_ptr + slot)
        tl.store(flags_ptr + slot * N + tl.broadcast_to(columns[None, :], BLOCK_M, BLOCK_N), 1, mask=mask)


@triton.jit(do_not_specialize=["modules", "adapters", "recipes"])
def _l1_norms_kernel(
    norms_ptr,  # float32 [recipes, modules, tiles, adapters, 2]
    terms_ptr,  # int32 [recipes, modules, adapters, TERMS], see tile.py
    x_ptr,  # this and the following as in merge._merge_deltas_kernel
    stride_xm,
    stride_xa,
    stride_xr,
    a_ptr,
    minus_ptr,
    modules,
    adapters,
    M,
    N,
    recipes,
    RANK: tl.constexpr,
    SUBTRACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """norms = (sum |t|, sum |t| over what a random drop keeps) of each tile: added up outside, in a fixed order."""
    task = (x_ptr, stride_xm, stride_xa, stride_xr, a_ptr, minus_ptr, modules, adapters, M, N)
    program = tl.program_id(0)
    adapter = tl.cast(program % adapters, tl.int64)
    place = tile_place(program // adapters, M, N, BLOCK_M, BLOCK_N)
    module, _, _ = place
    product = task_tile(task, place, adapter, RANK, SUBTRACT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R)
    for recipe in range(recipes):
        terms = terms_ptr + ((recipe * modules + module) * adapters + adapter) * TERMS
        t, keep = kept(product, terms, place, "bernoulli", BLOCK_M, BLOCK_N)
        sizes = tl.abs(t)
        norms = norms_ptr + 2 * (recipe * tl.cast(tl.num_programs(0), tl.int64) + program)
        tl.store(norms, tl.sum(tl.sum(sizes, axis=1), axis=0))
        tl.store(norms + 1, tl.sum(tl.sum(tl.where(keep, sizes, 0.0), axis=1), axis=0))


def model_trims(
    sources: Sequence[Source],
    kept: Tensor,
    *,
    ties: str = "exact",
    adapters: Sequence[Sequence[int]] | None = None,
    order: Sequence[int] | None = None,
    modules: int | None = None,
    total: Total = _alone,
    precision: str = "ieee",
    launches: Sequence[Launch] | None = None,
) -> list[Trim]:
    """What keeps the `kept` largest magnitudes of each adapter over all modules of all groups: one Trim a group.

    sources: groups on one device. kept: int64 [recipes, adapters].
    adapters: which of these each group has, by default all.
    order: the place in the model of every module, groups one after another; of equal magnitudes in different modules,
    the one in the lowest place stays. By default modules are in the order of the groups.
    modules: how many the model has, by default those of the groups. total: if other processes have further modules, a
    function that sums the int64 counts of all processes, of one shape. Every process calls it equally often, also one
    that has no group. Other arguments as in `trims`.
    """
    recipes, known = len(kept), kept.shape[-1]
    check_tensor("kept", kept, (recipes, known), kept.device, (torch.int64,), contiguous=False)
    if launches is not None and len(launches) != len(sources):
        raise ValueError(f"got {len(launches)} launches for {len(sources)} groups")
    sizes = [source.shape[0] for source in sources]
    modules = sum(sizes) if modules is None else modules
    order = range(sum(sizes)) if order is None else order
    _check_numbers("order", order, sum(sizes), modules)
    adapters = [range(known)] * len(sources) if adapters is None else adapters
    selections = []
    for i, (source, slots) in enumerate(zip(sources, adapters, strict=True)):
        _check_numbers("adapters", slots, source.shape[1], known)
        places = torch.tensor(order[sum(sizes[:i]) :][: sizes[i]], dtype=torch.int64)
        numbers = torch.broadcast_tensors(torch.tensor(slots, dtype=torch.int64), places[:, None])
        selections.append(_Selection(source, recipes, precision, launches[i] if launches else None, *numbers))
    kept = kept.to(sources[0].x.device) if sources else kept
    return _select(selections, kept, ties, places=modules, total=total)


def _check_numbers(name: str, numbers: Sequence[int], count: int, below: int) -> None:
    if len(numbers) != count or len({*numbers} & {*range(below)}) != count:
        raise ValueError(f"{name} is {list(numbers)}, wanted {count} different numbers below {below}")


def l1_factors(source: Source, drop: Drop, *, precision: str = "ieee", launch: Launch | None = None) -> Tensor:
    """|t|_1 / |keep(t)|_1, and 1 where either is below 1e-7 or density is 1: float32 [recipes, modules, adapters].

    For `Drop.factor`, instead of 1 / density. Each tile is summed in float32, tiles in float64 and in order.
    """
    modules, adapters, _, _ = source.shape
    recipes, device = len(drop.seeds), source.x.device
    launch = launch or launch_of(source, keep=drop)  # as of one recipe: the order of a sum depends on its tile
    unscaled = replace(drop, factor=torch.ones(drop.density.shape))
    tiles = tiles_of(source, launch)
    norms = torch.zeros(recipes, modules, tiles, adapters, 2, device=device)
    if norms.numel():
        with torch.cuda.device_of(norms):
            _l1_norms_kernel[(modules * tiles * adapters,)](
                norms_ptr=norms,
                terms_ptr=terms_of(source, unscaled, torch.zeros(recipes, adapters, device=device)),
                recipes=recipes,
                **task_arguments(source, precision, launch),
            )
    before, after = norms.double().sum(2).unbind(-1)
    rescaled = (drop.density.to(device) < 1) & (torch.minimum(before, after) >= 1e-7)
    return torch.where(rescaled, before / after.clamp_min(1e-30), 1.0).float()


class _Selection:
    """The passes over one group; counts are int64. Between passes the interval of each task tensor is narrowed.

    slots, places: int64 [modules, adapters]. Task tensors with the same slot share a threshold; of equal magnitudes,
    the one in the lowest place stays first.
    """

    def __init__(
        self, source: Source, recipes: int, precision: str, launch: Launch | None, slots: Tensor, places: Tensor
    ) -> None:
        self.modules, self.adapters, self.rows, self.columns = source.shape
        self.recipes, self.device = recipes, source.x.device
        self.slots, self.places = slots.to(self.device), places.to(self.device)
        launch = search_launch(launch or launch_of(source, recipes=recipes), arch_of(self.device))
        self._task: dict[str, Any] = {
            "scaling_ptr": source.scaling.contiguous(),
            **task_arguments(source, precision, launch),
        }
        self._programs = self.modules * self.adapters * -(-tiles_of(source, launch) // TILES_A_PROGRAM)

    def coarse(self) -> Tensor:
        """[1, modules, adapters, COARSE_BINS]."""
        counts = self._zeros(1, COARSE_BINS.value)
        self._run(_coarse_histogram_kernel, counts_ptr=counts, TILES=TILES_A_PROGRAM)
        return counts.long()

    def fine(self, interval: Tensor) -> Tensor:
        """[recipes, modules, adapters, FINE_BINS] within int32 intervals [recipes, modules, adapters, INTERVAL]."""
        counts = self._zeros(self.recipes, FINE_BINS.value)
        self._run(
            _fine_histogram_kernel,
            counts_ptr=counts,
            interval_ptr=interval,
            recipes=self.recipes,
            TILES=TILES_A_PROGRAM,
        )
        return counts.long()

    def tied_rows(self, value: Tensor) -> Tensor:
        """[recipes, modules, adapters, M]: elements of each row that equal `value` (bits, -1: do not count)."""
        counts = self._zeros(self.recipes, self.rows)
        self._run(_tied_rows_kernel, counts_ptr=counts, value_ptr=value, recipes=self.recipes, TILES=TILES_A_PROGRAM)
        return counts.long()

    def cut(self, value: Tensor, rows: Tensor, quota: Tensor) -> tuple[Tensor, Tensor]:
        """(row, column) that keep the first `quota` of the tied elements, `rows` of them in each row."""
        upto = rows.cumsum(-1)
        total = rows.sum(-1)
        row = torch.searchsorted(upto, quota.clamp_min(1)[..., None]).squeeze(-1)
        before = _at(torch.nn.functional.pad(upto, (1, 0)), row)
        partial = (quota > 0) & (quota < total)
        flags = torch.zeros(*quota.shape, self.columns, dtype=torch.int8, device=self.device)
        if self._programs:
            with torch.cuda.device_of(flags):
                across = -(-self.columns // self._task["BLOCK_N"])
                _tied_columns_kernel[(row.numel() * across,)](
                    flags_ptr=flags, row_ptr=torch.where(partial, row, -1).int(), value_ptr=value, **self._task
                )
        column = torch.searchsorted(flags.cumsum(-1), (quota - before).clamp_min(1)[..., None]).squeeze(-1) + 1
        # (0, 0) keeps none of the tied elements, and (M, 0) keeps all.
        row = torch.where(partial, row, torch.where(quota > 0, self.rows, 0))
        return row.int(), torch.where(partial, column, 0).int()

    def _zeros(self, recipes: int, size: int) -> Tensor:
        return torch.zeros(recipes, self.modules, self.adapters, size, dtype=torch.int32, device=self.device)

    def _run(self, kernel: Any, **arguments: Any) -> None:
        if self._programs:
            with torch.cuda.device_of(arguments["counts_ptr"]):
                kernel[(self._programs,)](**arguments, **self._task)


def _select(groups: list[_Selection], kept: Tensor, ties: str, *, places: int, total: Total) -> list[Trim]:
    """Thresholds and cuts. kept: [recipes, slots]; places: how many a slot has; total: as in `model_trims`.

    No step depends on what was counted, so that all processes call `total` alike.
    """
    if ties not in ("exact", "keep"):
        raise ValueError(f"ties is {ties!r}, wanted 'exact' or 'keep'")
    recipes, slots = kept.shape

    def pool(counts: list[Tensor], recipes: int, bins: int) -> Tensor:
        pooled = torch.zeros(recipes, slots, bins, dtype=torch.int64, device=kept.device)
        for group, each in zip(groups, counts, strict=True):
            pooled.index_add_(1, group.slots.flatten(), each.flatten(1, 2))
        return total(pooled)

    def spread(tensor: Tensor, group: _Selection) -> Tensor:
        return tensor[:, group.slots].contiguous()

    coarse = pool([group.coarse() for group in groups], 1, COARSE_BINS.value).expand(recipes, -1, -1)
    bin_, rank, equal = _locate(coarse, kept.clamp_min(1))
    edge = (COARSE_FIRST.value + torch.arange(COARSE_BINS.value + 1, device=kept.device)) << COARSE_SHIFT.value
    edge[0], edge[-1] = 0, 1 << 31
    first, width = edge[bin_], edge[bin_ + 1] - edge[bin_]
    for _ in range(FINE_PASSES):
        shift = (torch.frexp((width - 1).double()).exponent - 11).clamp_min(0).long()
        interval = torch.stack([first, width.clamp_max(2**31 - 1), shift], -1).int()
        counts = pool([group.fine(spread(interval, group)) for group in groups], recipes, FINE_BINS.value)
        bin_, finer, fewer = _locate(counts, rank)
        is_open = width > 1
        rank, equal = torch.where(is_open, finer, rank), torch.where(is_open, fewer, equal)
        end = first + width
        first = torch.where(is_open, first + (bin_ << shift), first)
        width = torch.where(is_open, torch.minimum(end - first, 1 << shift), width)
    bits = first.int()
    value = torch.where(kept > 0, bits.view(torch.float32), torch.inf)
    cuts = (ties == "exact") & (rank < equal) & (kept > 0)
    quota, counted = torch.where(cuts, rank, 2**31), torch.where(cuts, bits, -1)
    tied = [group.tied_rows(spread(counted, group)) for group in groups]
    before = _before(groups, tied, torch.zeros(recipes, places, slots, dtype=torch.int64, device=kept.device), total)
    trims = []
    for group, rows, earlier in zip(groups, tied, before, strict=True):
        row, column = group.cut(spread(bits, group), rows, (spread(quota, group) - earlier).clamp_min(0))
        trims.append(Trim(spread(value, group), row, column))
    return trims


def _before(groups: list[_Selection], tied: list[Tensor], counts: Tensor, total: Total) -> list[Tensor]:
    """How many tied elements lie in the places before each task tensor's: [recipes, modules, adapters] each.

    counts: zeros [recipes, places, slots].
    """
    for group, rows in zip(groups, tied, strict=True):
        counts[:, group.places, group.slots] = rows.sum(-1)
    counts = total(counts)
    before = counts.cumsum(1) - counts
    return [before[:, group.places, group.slots] for group in groups]


def _locate(counts: Tensor, rank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(bin of the rank-th largest, its rank within the bin, the bin's count) of [.., bins] and ranks [..] from 1."""
    bins = counts.shape[-1]
    from_top = counts.flip(-1).cumsum(-1)
    place = torch.searchsorted(from_top, rank[..., None]).squeeze(-1).clamp_max(bins - 1)
    above = _at(torch.nn.functional.pad(from_top, (1, 0)), place)
    return bins - 1 - place, rank - above, _at(from_top, place) - above


def _at(table: Tensor, index: Tensor) -> Tensor:
    return table.gather(-1, index[..., None]).squeeze(-1)
