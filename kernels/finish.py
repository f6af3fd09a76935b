"""Device code of the last step of a search: from a short list, or where there is none, by one program that looks on."""

import triton
import triton.language as tl

from .search import (
    BINS,
    FIRST,
    HELD,
    INFINITY,
    LISTED,
    ORDER,
    SHIFT,
    STATE,
    WIDTH,
    _narrowed,
    magnitude_bits,
)
from .task_tile import tile_place

CHUNK: tl.constexpr = tl.constexpr(1024)  # of a list at a time


@triton.jit
def _listed_place(keys, tiles, N, AREA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The flat places, int64, of the elements of a list."""
    across, local = tl.cdiv(N, BLOCK_N), keys % AREA
    rows = (tiles // across * BLOCK_M + local // BLOCK_N).to(tl.int64)
    return rows * N + tiles % across * BLOCK_N + local % BLOCK_N


@triton.jit
def _listed_above(keys_ptr, length, least, AREA: tl.constexpr):
    """How many of a list have bits of at least first + least."""
    counts = tl.zeros([CHUNK], tl.int32)
    for start in range(0, length, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        keys = tl.load(keys_ptr + offs, mask=offs < length, other=-1)
        counts += ((keys >= 0) & (keys // AREA >= least)).to(tl.int32)
    return tl.sum(counts, axis=0)


@triton.jit
def _listed_upto(
    keys_ptr, tiles_ptr, length, above, upto, N, AREA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """How many of a list have bits of first + above and a flat place of at most `upto`."""
    counts = tl.zeros([CHUNK], tl.int32)
    for start in range(0, length, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        keys = tl.load(keys_ptr + offs, mask=offs < length, other=-1)
        tiles = tl.load(tiles_ptr + offs, mask=offs < length, other=0)
        places = _listed_place(keys, tiles, N, AREA, BLOCK_M, BLOCK_N)
        counts += ((keys >= 0) & (keys // AREA == above) & (places <= upto)).to(tl.int32)
    return tl.sum(counts, axis=0)


@triton.jit
def _from_list(
    keys_ptr,
    tiles_ptr,
    length,
    width,
    order,
    M,
    N,
    EXACT: tl.constexpr,
    AREA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(bits - first, cut row, cut column) of the order-th largest of a list: int32."""
    low, high = tl.cast(0, tl.int64), width
    while high - low > 1:
        middle = (low + high) // 2
        if _listed_above(keys_ptr, length, middle, AREA) >= order:
            low = middle
        else:
            high = middle
    larger = _listed_above(keys_ptr, length, low + 1, AREA)
    quota, equal = order - larger, _listed_above(keys_ptr, length, low, AREA) - larger
    row, column = tl.cast(M, tl.int32), tl.cast(0, tl.int32)
    if EXACT:
        if quota < equal:
            before, upto = tl.cast(-1, tl.int64), tl.cast(M, tl.int64) * N - 1
            while upto - before > 1:
                middle = (before + upto) // 2
                if _listed_upto(keys_ptr, tiles_ptr, length, low, middle, N, AREA, BLOCK_M, BLOCK_N) >= quota:
                    upto = middle
                else:
                    before = middle
            row = (upto // N).to(tl.int32)
            column = (upto % N + 1).to(tl.int32)
    return low.to(tl.int32), row, column


@triton.jit
def _within(
    task,
    scaling_ptr,
    tensor,
    start,
    end,
    least,
    most,
    RANK: tl.constexpr,
    SUBTRACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """How many tiles in [start, end) have bits in [least, most] at each place of a tile: int32 [BLOCK_M, BLOCK_N].

    What lies outside the tensor counts as 0.
    """
    _, _, _, _, _, _, _, adapters, M, N = task
    counts = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    span = (most - least).to(tl.uint32, bitcast=True)
    for number in range(0, end - start):  # from 0: Triton 3.5 fails where a bound comes from a while loop
        first_place = tile_place(start + number, M, N, BLOCK_M, BLOCK_N)
        place = (tensor // adapters, first_place[1], first_place[2])
        bits = magnitude_bits(
            task, scaling_ptr, place, tensor % adapters, RANK, SUBTRACT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R
        )
        counts += ((bits - least).to(tl.uint32, bitcast=True) <= span).to(tl.int32)
    return counts


# What one program does alone where no list was made, one sweep after the other.
LARGER: tl.constexpr = tl.constexpr(0)  # counts what is larger than the interval,
HALVE: tl.constexpr = tl.constexpr(1)  # halves the interval until it is one value,
ROWS: tl.constexpr = tl.constexpr(
    2
)  # goes down the rows of tiles to the one that holds the last tied element that stays,
COLUMNS: tl.constexpr = tl.constexpr(3)  # and along the tiles of its row.
DONE: tl.constexpr = tl.constexpr(4)


@triton.jit
def _alone(
    task,
    scaling_ptr,
    tensor,
    first,
    width,
    order,
    held,
    EXACT: tl.constexpr,
    RANK: tl.constexpr,
    SUBTRACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """(bits, cut row, cut column), int32, of the order-th largest of an interval that holds `held` elements."""
    _, _, _, _, _, _, _, _, M, N = task
    across = tl.cdiv(N, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    first, width = first.to(tl.int32), width.to(tl.int32)
    row, column = tl.cast(M, tl.int32), tl.cast(0, tl.int32)
    larger, before = tl.cast(0, tl.int64), tl.cast(0, tl.int64)
    block, number, row_in_block = tl.cast(0, tl.int32), tl.cast(0, tl.int32), tl.cast(0, tl.int32)
    stage = tl.where(width > 1, LARGER, tl.where(EXACT & (order < held), ROWS, DONE))
    while stage < DONE:
        start, end = block * across + number, block * across + number + 1
        least, most = first, first
        if stage == ROWS:
            end = start + across
        elif stage < ROWS:
            start, end = 0 * block, tl.cdiv(M, BLOCK_M) * across
            least = tl.where(stage == LARGER, first + width, first + width // 2)
            most = tl.cast(INFINITY, tl.int32)
        counts = _within(
            task,
            scaling_ptr,
            tensor,
            start,
            end,
            least,
            most,
            RANK,
            SUBTRACT,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_R,
        )
        rows = tl.sum(counts, axis=1)
        if (stage == ROWS) & (first == 0):
            rows -= across * BLOCK_N - N  # what lies right of the tensor; what lies below it comes last
        if stage == COLUMNS:
            rows = tl.where(offs_m == row_in_block, rows, 0)
        total = tl.sum(rows.to(tl.int64), axis=0)
        if stage == LARGER:
            larger = total
            stage = HALVE
        elif stage == HALVE:
            upper = total - larger
            half = width // 2
            if upper >= order:
                first += half
                width -= half
                held = upper
            else:
                width = half
                order -= upper
                held -= upper
                larger = total
            if width == 1:
                stage = tl.where(EXACT & (order < held), ROWS, DONE)
        elif before + total < order:
            before += total
            if stage == ROWS:
                block += 1
            else:
                number += 1
        elif stage == ROWS:
            row_in_block = tl.sum((tl.cumsum(rows, axis=0) + before < order).to(tl.int32), axis=0)
            before += tl.sum(tl.where(offs_m < row_in_block, rows, 0), axis=0)
            stage = COLUMNS
        else:
            columns = tl.sum(tl.where((offs_m == row_in_block)[:, None], counts, 0), axis=0)
            row = block * BLOCK_M + row_in_block
            column = number * BLOCK_N + 1
            column += tl.sum((tl.cumsum(columns, axis=0) + before < order).to(tl.int32), axis=0)
            stage = DONE
    return first, row, column


# Rows and columns lie where the number of slots puts them.
@triton.jit(do_not_specialize=["modules", "adapters"], do_not_specialize_on_alignment=["row_ptr", "column_ptr"])
def _finish_kernel(
    value_ptr,  # int32 [recipes, modules, adapters]: bits of a float32
    row_ptr,  # int32, likewise
    column_ptr,  # int32, likewise
    counts_ptr,  # int32 [recipes, modules, adapters, BINS]
    length_ptr,  # int32 [recipes, modules, adapters]
    keys_ptr,  # int32 [recipes, modules, adapters, LIST], see search._collect_kernel
    tiles_ptr,  # int32, likewise
    state_ptr,  # int64 [recipes, modules, adapters, STATE]
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
    EXACT: tl.constexpr,  # whether equal magnitudes are cut
    LIST: tl.constexpr,
    RANK: tl.constexpr,
    SUBTRACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The threshold and the place before which elements equal to it stay: (M, 0) if all of them do."""
    task = (x_ptr, stride_xm, stride_xa, stride_xr, a_ptr, minus_ptr, modules, adapters, M, N)
    slot = tl.cast(tl.program_id(0), tl.int64)
    tensor = slot % (modules * adapters)
    state = state_ptr + slot * STATE
    first, width, order = tl.load(state + FIRST), tl.load(state + WIDTH), tl.load(state + ORDER)
    value = first.to(tl.int32)
    row, column = tl.cast(M, tl.int32), tl.cast(0, tl.int32)
    if width == 0:
        value = tl.where(order > 0, 0, INFINITY).to(tl.int32)
    elif tl.load(state + LISTED) == 1:
        above, row, column = _from_list(
            keys_ptr + slot * LIST,
            tiles_ptr + slot * LIST,
            tl.load(length_ptr + slot),
            width,
            order,
            M,
            N,
            EXACT,
            BLOCK_M * BLOCK_N,
            BLOCK_M,
            BLOCK_N,
        )
        value += above
    else:
        held = tl.load(state + HELD)
        if width > 1:
            first, width, order, held = _narrowed(counts_ptr + slot * BINS, first, width, tl.load(state + SHIFT), order)
        value, row, column = _alone(
            task,
            scaling_ptr,
            tensor,
            first,
            width,
            order,
            held,
            EXACT,
            RANK,
            SUBTRACT,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_R,
        )
    tl.store(value_ptr + slot, value)
    tl.store(row_ptr + slot, row)
    tl.store(column_ptr + slot, column)
