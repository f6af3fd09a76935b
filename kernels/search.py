"""Device code of the search for the k-th largest magnitude of each task tensor: `trims.trims` launches it.

Magnitudes are compared as bits(|t|), a monotone integer. A sample brackets the k-th, one sweep counts the elements of
the bracket in bins, a second one lists those of the bin that holds it, and the rest is done on the list. Where there is
no short list (equal magnitudes by the thousand, a bracket that misses) the second sweep counts once more, and what is
still open then is found by one program alone, slowly: the result is the same. README.md has a diagram, and the costs.
"""

import triton
import triton.language as tl

from .task_tile import task_tile, tile_place

BINS: tl.constexpr = tl.constexpr(2048)
INFINITY: tl.constexpr = tl.constexpr(0x7F800000)  # its bits

# A sample keeps the upper 16 of the 31 bits of a magnitude, moved by LOWEST so that they fit an int16; 0 counts as 1,
# and what is no element is LOWEST.
SAMPLE_SHIFT: tl.constexpr = tl.constexpr(15)
SAMPLE_END: tl.constexpr = tl.constexpr((0x7F800000 >> 15) + 1)
LOWEST: tl.constexpr = tl.constexpr(-(1 << 15))
OCTAVES: tl.constexpr = tl.constexpr(8 << 8)  # eight octaves, in these bits
DEVIATIONS: tl.constexpr = tl.constexpr(6.0)  # standard deviations of the sample on either side of the bracket

# int64 words of a search, one row for each recipe, module and adapter.
STATE: tl.constexpr = tl.constexpr(8)
FIRST: tl.constexpr = tl.constexpr(0)  # the k-th is sought in [FIRST, FIRST + WIDTH)
WIDTH: tl.constexpr = tl.constexpr(1)  # 0: nothing is sought, since all or none are kept
SHIFT: tl.constexpr = tl.constexpr(2)  # (bits - FIRST) >> SHIFT is a bin
ORDER: tl.constexpr = tl.constexpr(3)  # it is the ORDER-th largest there, from 1; before the first count, of all
HELD: tl.constexpr = tl.constexpr(4)  # how many elements lie there
LISTED: tl.constexpr = tl.constexpr(5)  # 1: so few that they are listed


@triton.jit
def magnitude_bits(
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
def _in_any_order(x, KEEPS_LAYOUT: tl.constexpr):
    """The elements of a tile, 1-D. In any order they may stay in the layout of the matrix unit; else they move."""
    if KEEPS_LAYOUT:
        return tl.ravel(x, can_reorder=True)
    else:
        return tl.ravel(x)


@triton.jit
def _shift_of(width):
    """The least shift that makes at most BINS bins of an interval: int64."""
    return tl.sum((((width - 1) >> tl.arange(0, 32)) >= BINS).to(tl.int64), axis=0)


@triton.jit(do_not_specialize=["modules", "adapters", "samples", "length"])
def _sample_kernel(
    sample_ptr,  # int16 [modules, adapters, length], LOWEST throughout
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
    samples,  # tiles of each task tensor
    length,  # at least samples * BLOCK_M * BLOCK_N // EVERY
    EVERY: tl.constexpr,
    RANK: tl.constexpr,
    SUBTRACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """sample = the upper bits of every EVERY-th magnitude of some tiles.

    Tiles go down the rows evenly, and across by multiples of the golden ratio: rows and columns of very different
    sizes, as the factors' norms make them, each have their share.
    """
    task = (x_ptr, stride_xm, stride_xa, stride_xr, a_ptr, minus_ptr, modules, adapters, M, N)
    program = tl.program_id(0)
    tensor, number = tl.cast(program // samples, tl.int64), tl.cast(program % samples, tl.int64)
    row = number * tl.cdiv(M, BLOCK_M) // samples * BLOCK_M
    column = ((number * 0x9E3779B9 & 0xFFFFFFFF) * tl.cdiv(N, BLOCK_N) >> 32) * BLOCK_N
    place = (tensor // adapters, row, column)
    bits = magnitude_bits(
        task, scaling_ptr, place, tensor % adapters, RANK, SUBTRACT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R
    )
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    there = (row + offs_m < M)[:, None] & (column + offs_n < N)[None, :]
    upper = (tl.maximum(bits >> SAMPLE_SHIFT, 1) + LOWEST).to(tl.int16)
    chosen = there & ((offs_m[:, None] + offs_n[None, :]) % EVERY == 0)
    offs = (offs_m * (BLOCK_N // EVERY))[:, None] + (offs_n // EVERY)[None, :]
    tl.store(sample_ptr + tensor * length + number * (BLOCK_M * BLOCK_N // EVERY) + offs, upper, mask=chosen)


@triton.jit
def _sampled(sample_ptr, length, least, CHUNK: tl.constexpr):
    """How many of a sample are at least `least`, which is positive: int64. length is a multiple of CHUNK."""
    least = (least + LOWEST).to(tl.int32)
    counts = tl.zeros([CHUNK], tl.int32)
    for start in range(0, length, CHUNK):
        counts += (tl.load(sample_ptr + start + tl.arange(0, CHUNK)).to(tl.int32) >= least).to(tl.int32)
    return tl.sum(counts, axis=0).to(tl.int64)


@triton.jit
def _largest_reached(sample_ptr, length, count, CHUNK: tl.constexpr):
    """The largest value of 16 bits that `count` elements of a sample reach, 0 if there are fewer."""
    low, high = tl.cast(0, tl.int64), tl.cast(SAMPLE_END, tl.int64)
    while high - low > 1:
        middle = (low + high) // 2
        if _sampled(sample_ptr, length, middle, CHUNK) >= count:
            low = middle
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["tensors", "numel"])
def _bracket_kernel(
    state_ptr,  # int64 [recipes, modules, adapters, STATE]
    sample_ptr,  # int16 [modules, adapters, length]
    kept_ptr,  # int64 [recipes, modules, adapters]
    tensors,  # modules * adapters
    numel,
    length,  # a multiple of CHUNK
    CHUNK: tl.constexpr,  # of the sample at a time
):
    """An interval that holds the kept-th largest unless the sample misleads; how it lies changes no result."""
    slot = tl.cast(tl.program_id(0), tl.int64)
    state = state_ptr + slot * STATE
    kept = tl.load(kept_ptr + slot)
    first, width, shift = tl.cast(0, tl.int64), tl.cast(0, tl.int64), tl.cast(0, tl.int64)
    if (kept > 0) & (kept < numel):
        sample_ptr += slot % tensors * length
        share = kept.to(tl.float32) / tl.cast(numel, tl.float32)
        size = _sampled(sample_ptr, length, tl.cast(1, tl.int64), CHUNK).to(tl.float32)
        spread = DEVIATIONS * tl.sqrt(size * share * (1.0 - share)) + 3.0
        above = (size * share - spread).to(tl.int64)
        under = (size * share + spread).to(tl.int64)
        # Beyond the sample's ends by some octaves, which keeps bins narrow.
        end = _largest_reached(sample_ptr, length, tl.maximum(above, 1), CHUNK) + tl.where(above < 1, OCTAVES, 1)
        low = _largest_reached(sample_ptr, length, tl.minimum(under, size.to(tl.int64)), CHUNK)
        low -= tl.where(under > size, OCTAVES, 0)
        first = tl.maximum(low << SAMPLE_SHIFT, 1)
        width = tl.minimum(end << SAMPLE_SHIFT, INFINITY + 1) - first
        shift = _shift_of(width)
    tl.store(state + FIRST, first)
    tl.store(state + WIDTH, width)
    tl.store(state + SHIFT, shift)
    tl.store(state + ORDER, kept)
    tl.store(state + LISTED, 0)


@triton.jit
def _run_of(adapters, modules, M, N, TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(slot, tensor, first tile, end tile) of a program: a run of tiles of one task tensor, for one recipe."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    runs = tl.cdiv(tiles, TILES)
    program = tl.program_id(0)
    slot = tl.cast(program // runs, tl.int64)
    start = program % runs * TILES
    return slot, slot % (modules * adapters), start, tl.minimum(start + TILES, tiles)


@triton.jit(do_not_specialize=["modules", "adapters"])
def _count_kernel(
    counts_ptr,  # int32 [recipes, modules, adapters, BINS], added to
    reached_ptr,  # int64 [recipes, modules, adapters], added to
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
    IN_SHARED: tl.constexpr,  # whether tl.histogram counts by atomics in shared memory
    KEEPS_LAYOUT: tl.constexpr,
    TILES: tl.constexpr,  # tiles a program
    RANK: tl.constexpr,
    SUBTRACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """counts[.., bin] += elements of the interval in a bin; reached += elements at or above its first.

    Elements outside the tensor are 0, and no first is.
    """
    task = (x_ptr, stride_xm, stride_xa, stride_xr, a_ptr, minus_ptr, modules, adapters, M, N)
    slot, tensor, start, end = _run_of(adapters, modules, M, N, TILES, BLOCK_M, BLOCK_N)
    state = state_ptr + slot * STATE
    first = tl.load(state + FIRST).to(tl.int32)
    width = tl.load(state + WIDTH).to(tl.uint32)
    shift = tl.load(state + SHIFT).to(tl.int32)
    if width == 0:
        end = start
    bins_ptr = counts_ptr + slot * BINS
    below = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    counts = tl.zeros([BINS], tl.int32)
    for tile in range(start, end):
        _, row, column = tile_place(tile, M, N, BLOCK_M, BLOCK_N)
        place = (tensor // adapters, row, column)
        bits = magnitude_bits(
            task, scaling_ptr, place, tensor % adapters, RANK, SUBTRACT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R
        )
        above = bits - first
        below += above >> 31
        above = _in_any_order(above, KEEPS_LAYOUT)
        inside = above.to(tl.uint32, bitcast=True) < width
        if IN_SHARED:
            counts += tl.histogram(above >> shift, BINS, mask=inside)
        else:
            tl.atomic_add(bins_ptr + (above >> shift), 1, mask=inside, sem="relaxed")
    if IN_SHARED:
        tl.atomic_add(bins_ptr + tl.arange(0, BINS), counts, mask=counts > 0, sem="relaxed")
    reached = (end - start) * (BLOCK_M * BLOCK_N) + tl.sum(tl.sum(below, axis=1), axis=0)
    tl.atomic_add(reached_ptr + slot, reached.to(tl.int64), sem="relaxed")


@triton.jit
def _narrowed(counts_ptr, first, width, shift, order):
    """The (first, width, order, held) of the bin that holds the order-th largest, all int64.

    counts_ptr: int32 [BINS] of an interval that holds it.
    """
    counts = tl.load(counts_ptr + tl.arange(0, BINS)).to(tl.int64)
    from_top = tl.cumsum(counts, axis=0, reverse=True)
    number = tl.sum((from_top >= order).to(tl.int32), axis=0) - 1
    is_it = tl.arange(0, BINS) == number
    held = tl.sum(tl.where(is_it, counts, 0), axis=0)
    larger = tl.sum(tl.where(is_it, from_top, 0), axis=0) - held
    start = number.to(tl.int64) << shift
    return first + start, tl.minimum(width - start, tl.cast(1, tl.int64) << shift), order - larger, held


@triton.jit(do_not_specialize=["numel"])
def _narrow_kernel(
    state_ptr,  # int64 [recipes, modules, adapters, STATE]
    counts_ptr,  # int32 [recipes, modules, adapters, BINS]: set back to 0
    reached_ptr,  # int64 [recipes, modules, adapters]
    numel,
    EXACT: tl.constexpr,
    LIST: tl.constexpr,
    AREA: tl.constexpr,  # of a tile
):
    """The interval becomes the bin that holds the k-th, or what lies above or below a bracket that missed it."""
    slot = tl.cast(tl.program_id(0), tl.int64)
    state, bins_ptr = state_ptr + slot * STATE, counts_ptr + slot * BINS
    first, width = tl.load(state + FIRST), tl.load(state + WIDTH)
    shift, order = tl.load(state + SHIFT), tl.load(state + ORDER)
    if width > 0:
        inside = tl.sum(tl.load(bins_ptr + tl.arange(0, BINS)).to(tl.int64), axis=0)
        reached = tl.load(reached_ptr + slot)
        held = inside
        if order > reached:
            order, held = order - reached, numel - reached
            width = first
            first = tl.cast(0, tl.int64)
        elif order <= reached - inside:
            held = reached - inside
            first += width
            width = INFINITY + 1 - first
        else:
            first, width, order, held = _narrowed(bins_ptr, first, width, shift, order - (reached - inside))
        is_open = width > 1
        if EXACT:
            is_open = is_open | (order < held)
        # A key, above * AREA + place in the tile, is positive.
        few = (held <= LIST) & (width <= 0x7FFFFFFF // AREA) & (first > 0)
        tl.store(state + FIRST, first)
        tl.store(state + WIDTH, width)
        tl.store(state + SHIFT, _shift_of(width))
        tl.store(state + ORDER, order)
        tl.store(state + HELD, held)
        tl.store(state + LISTED, (is_open & few).to(tl.int64))
    tl.store(bins_ptr + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))


@triton.jit(do_not_specialize=["modules", "adapters"])
def _collect_kernel(
    counts_ptr,  # int32 [recipes, modules, adapters, BINS], added to
    length_ptr,  # int32 [recipes, modules, adapters], added to
    keys_ptr,  # int32 [recipes, modules, adapters, LIST]: (bits - first) * BLOCK_M * BLOCK_N + place in the tile
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
    KEEPS_LAYOUT: tl.constexpr,
    LIST: tl.constexpr,
    TILES: tl.constexpr,
    RANK: tl.constexpr,
    SUBTRACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Lists the elements of the interval, in any order, if they are few, and else counts them in bins.

    Nearly all tiles have none: the minimum of a tile shows it.
    """
    task = (x_ptr, stride_xm, stride_xa, stride_xr, a_ptr, minus_ptr, modules, adapters, M, N)
    slot, tensor, start, end = _run_of(adapters, modules, M, N, TILES, BLOCK_M, BLOCK_N)
    state = state_ptr + slot * STATE
    first = tl.load(state + FIRST).to(tl.int32)
    width = tl.load(state + WIDTH).to(tl.uint32)
    shift = tl.load(state + SHIFT).to(tl.int32)
    listed = tl.load(state + LISTED)
    if (width <= 1) & (listed == 0):
        end = start
    for tile in range(start, end):
        _, row, column = tile_place(tile, M, N, BLOCK_M, BLOCK_N)
        place = (tensor // adapters, row, column)
        bits = magnitude_bits(
            task, scaling_ptr, place, tensor % adapters, RANK, SUBTRACT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R
        )
        above = (bits - first).to(tl.uint32, bitcast=True)
        if tl.min(tl.min(above, axis=1), axis=0) < width:
            if listed == 1:
                local = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
                keys = (above * (BLOCK_M * BLOCK_N)).to(tl.int32, bitcast=True) + local
                keys = _in_any_order(tl.where(above < width, keys, -1), KEEPS_LAYOUT)
                at = tl.atomic_add(length_ptr + slot + 0 * keys, 1, mask=keys >= 0, sem="relaxed")
                tl.store(keys_ptr + slot * LIST + at, keys, mask=keys >= 0)
                tl.store(tiles_ptr + slot * LIST + at, tile + 0 * keys, mask=keys >= 0)
            else:
                some = _in_any_order(above, KEEPS_LAYOUT)
                tl.atomic_add(counts_ptr + slot * BINS + (some >> shift), 1, mask=some < width, sem="relaxed")
