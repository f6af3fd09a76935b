"""Device helpers that selection and merge share, so that both see the same bits of a task tensor.

A task tensor is seen in tiles, which are computed anew wherever they are needed: from the factors of a LoRA adapter, or
from a dense tensor, less its base if there is one. What one recipe does with one adapter in one module is a row of
``terms`` int32 [recipes, modules, adapters, TERMS], packed by `source.terms_of`; floats are stored as their bits.
"""

import triton
import triton.language as tl

TERMS: tl.constexpr = tl.constexpr(8)
GAIN: tl.constexpr = tl.constexpr(0)  # float: t = gain * product, the scaling (and the rescale of a random drop)
WEIGHT: tl.constexpr = tl.constexpr(1)  # float
# A trim keeps |t| > THRESHOLD, and |t| = THRESHOLD before the place (CUT_ROW, CUT_COLUMN).
THRESHOLD: tl.constexpr = tl.constexpr(2)  # float
CUT_ROW: tl.constexpr = tl.constexpr(3)
CUT_COLUMN: tl.constexpr = tl.constexpr(4)
# A band is the trim at THRESHOLD less the one at TOP, whose three words lie there in the same order.
TOP: tl.constexpr = tl.constexpr(5)
# A random drop keeps the words up to LIMIT of the Philox counter (column >> 2, row, STREAM, ADAPTER): all uint32.
LIMIT: tl.constexpr = tl.constexpr(2)
STREAM: tl.constexpr = tl.constexpr(3)
ADAPTER: tl.constexpr = tl.constexpr(4)
KEY0: tl.constexpr = tl.constexpr(5)
KEY1: tl.constexpr = tl.constexpr(6)


@triton.jit
def float_term(terms_ptr, FIELD: tl.constexpr):
    return tl.load(terms_ptr + FIELD).to(tl.float32, bitcast=True)


@triton.jit
def word_term(terms_ptr, FIELD: tl.constexpr):
    return tl.load(terms_ptr + FIELD).to(tl.uint32, bitcast=True)


@triton.jit
def tile_place(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(module, row, column), int64, of a tile's first element: tiles are numbered along rows, then by module."""
    across = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * across
    row = tl.cast(tile % tiles // across, tl.int64) * BLOCK_M
    column = tl.cast(tile % across, tl.int64) * BLOCK_N
    return tl.cast(tile // tiles, tl.int64), row, column


@triton.jit
def task_tile(
    task,
    place,
    adapter,
    RANK: tl.constexpr,
    SUBTRACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A tile of B @ A, x, or x - base of one adapter, at a place: float32 [BLOCK_M, BLOCK_N], 0 outside the tensor.

    task: (x_ptr, stride_xm, stride_xa, stride_xr, a_ptr, minus_ptr, modules, adapters, M, N), where
        x_ptr is B [modules, adapters, M, RANK], or where RANK is 0 dense task tensors [modules, adapters, M, N]:
        modules lie stride_xm apart, adapters stride_xa, rows stride_xr, and the last dimension is contiguous;
        a_ptr is A [modules, adapters, RANK, N] and minus_ptr [modules, M, N], taken off if SUBTRACT: both contiguous.
    place: (module, row, column) of the tile's first element, int64, and so is adapter: they multiply strides. Offsets
        within a tile fit an int32.
    """
    x_ptr, stride_xm, stride_xa, stride_xr, a_ptr, minus_ptr, _, adapters, M, N = task
    module, row, column = place
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = row + offs_m < M
    mask_n = column + offs_n < N
    x_ptr += module * stride_xm + adapter * stride_xa + row * stride_xr
    if RANK == 0:
        mask = mask_m[:, None] & mask_n[None, :]
        x_ptrs = x_ptr + column + offs_m[:, None] * stride_xr + offs_n[None, :]
        t = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        if SUBTRACT:
            minus_ptrs = minus_ptr + (module * M + row) * N + column + offs_m[:, None] * N + offs_n[None, :]
            t -= tl.load(minus_ptrs, mask=mask, other=0.0).to(tl.float32)
        return t
    else:
        offs_r = tl.arange(0, BLOCK_R)
        b_ptrs = x_ptr + offs_m[:, None] * stride_xr + offs_r[None, :]
        a_ptrs = a_ptr + (module * adapters + adapter) * RANK * N + column + offs_r[:, None] * N + offs_n[None, :]
        b = tl.load(b_ptrs, mask=mask_m[:, None], other=0.0)
        a = tl.load(a_ptrs, mask=mask_n[None, :], other=0.0)
        product = tl.dot(b, a, input_precision=PRECISION)
        for _ in range(RANK // BLOCK_R - 1):
            b_ptrs += BLOCK_R
            a_ptrs += BLOCK_R * N
            b = tl.load(b_ptrs, mask=mask_m[:, None], other=0.0)
            a = tl.load(a_ptrs, mask=mask_n[None, :], other=0.0)
            product = tl.dot(b, a, product, input_precision=PRECISION)
        return product


@triton.jit
def kept(product, terms_ptr, place, KEEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(t = gain * product, which of its elements stay): float32 and bool [BLOCK_M, BLOCK_N].

    Zeros never stay: they add nothing and never agree with an elected sign, and so need no test of their own later.
    """
    t = product * float_term(terms_ptr, GAIN)
    if KEEP == "magnitude":
        return trim(t, terms_ptr + THRESHOLD, place, BLOCK_M, BLOCK_N)
    elif KEEP == "band":
        t, wide = trim(t, terms_ptr + THRESHOLD, place, BLOCK_M, BLOCK_N)
        _, top = trim(t, terms_ptr + TOP, place, BLOCK_M, BLOCK_N)
        return t, wide & (top == 0)
    elif KEEP == "bernoulli":
        return t, keep_words(terms_ptr, place, BLOCK_M, BLOCK_N) & (t != 0.0)
    else:
        tl.static_assert(KEEP == "all", "the kernels have no such keep")
        return t, t != 0.0


@triton.jit
def trim(t, trim_ptr, place, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(t, |t| > threshold, or |t| = threshold at a place before the cut); t may lose what is dropped.

    trim_ptr: (threshold, cut row, cut column), in the order of THRESHOLD, CUT_ROW and CUT_COLUMN.

    Only tiles that hold the cut row look at places. The others compare with a scalar: the threshold itself above the
    cut row, the next larger float below it. Thresholds are positive (`source.terms_of` sees to it).
    """
    _, row, column = place
    threshold = float_term(trim_ptr, 0)
    cut_row = tl.load(trim_ptr + 1) - row.to(tl.int32)
    cut_column = tl.load(trim_ptr + 2)
    if (cut_row >= 0) & (cut_row < BLOCK_M):
        offs_m = tl.arange(0, BLOCK_M)
        offs_n = column.to(tl.int32) + tl.arange(0, BLOCK_N)
        # From which column on a row has lost its ties: one comparison an element.
        end = tl.where(offs_m < cut_row, 2147483647, tl.where(offs_m == cut_row, cut_column, 0))
        t = tl.where((offs_n[None, :] >= end[:, None]) & (tl.abs(t) == threshold), 0.0, t)
    above = (threshold.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True)
    return t, tl.abs(t) >= tl.where(cut_row >= 0, threshold, above)


@triton.jit
def keep_words(terms_ptr, place, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which words of a tile are at most the limit: bool [BLOCK_M, BLOCK_N].

    Word ``column & 3`` of the counter (column >> 2, row, stream, adapter) belongs to an element: one call of Philox
    serves four neighbours. Words are compared before they are interleaved, since a bool is cheaper to move.
    """
    _, row, column = place
    limit = word_term(terms_ptr, LIMIT)
    quads = (column // 4).to(tl.uint32) + tl.arange(0, BLOCK_N // 4).to(tl.uint32)
    rows = row.to(tl.uint32) + tl.arange(0, BLOCK_M).to(tl.uint32)
    quads, rows = tl.broadcast(quads[None, :], rows[:, None])
    word0, word1, word2, word3 = philox(
        quads,
        rows,
        word_term(terms_ptr, STREAM),
        word_term(terms_ptr, ADAPTER),
        word_term(terms_ptr, KEY0),
        word_term(terms_ptr, KEY1),
    )
    even = tl.join(word0 <= limit, word2 <= limit)
    odd = tl.join(word1 <= limit, word3 <= limit)
    return tl.join(even, odd).reshape(BLOCK_M, BLOCK_N)


@triton.jit
def philox(counter0, counter1, counter2, counter3, key0, key1):
    """Philox4x32-10: four uint32 words of a uint32 counter and key (Salmon et al., SC 2011)."""
    for _ in tl.static_range(10):
        product0 = counter0.to(tl.uint64) * 0xD2511F53
        product1 = counter2.to(tl.uint64) * 0xCD9E8D57
        counter0 = (product1 >> 32).to(tl.uint32) ^ counter1 ^ key0
        counter2 = (product0 >> 32).to(tl.uint32) ^ counter3 ^ key1
        counter1 = product1.to(tl.uint32)
        counter3 = product0.to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return counter0, counter1, counter2, counter3
