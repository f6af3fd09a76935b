"""The innermost loops of the torch backend, compiled for this CPU by Numba where that is installed.

One call makes a tile of the products, trims, elects, averages and stores it, in blocks of a few rows that stay in the
L1 and L2 caches; it runs without Python's interpreter lock, so that threads do not wait for each other. Given the same
finite task tensors, it gives bit for bit what `cpu.merge_tile_by_torch`, `cpu.select` and `cpu.mask` compute by
operators of torch and numpy: the same float32 operations in the same order. A product is the sum of its terms in the
order of the ranks, none fused into another: the same bits on every CPU, while `torch.addmm`'s are those of its BLAS.

Tensors are float32, and seen by their address: the caller keeps them alive, and their rows contiguous.
"""

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

from merge_engine.loops.build import F0, F1, compiled, f32, flag, i64, part, u32, u64, wide
from merge_engine.loops.term import TERM

CHUNK = 256  # columns: of 32 ranks of A these are 32 KiB, and stay in an L2 cache for all rows of a tile
ROWS = 8  # of a chunk's block
_BLOCK = ROWS * CHUNK
_SIGN_OFF = np.uint32(0x7FFFFFFF)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_MUL0, _MUL1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WIDE = 16  # quads in a row from which on they are computed side by side; fewer, and rows are
_WEYL0, _WEYL1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_terms = numba.from_dtype(TERM)[::1]
_tile = (i64, i64, i64, i64)  # top, bottom, left, right


@numba.njit(inline="always")  # a call would not be vectorised
def _quad(quad, row, stream, adapter, key0, key1):
    a, b, c, d = quad, row, stream, adapter
    for _ in range(10):
        p, q = a * _MUL0, c * _MUL1
        a, b, c, d = (q >> _HALF) ^ b ^ key0, q & _LOW, (p >> _HALF) ^ d ^ key1, p & _LOW
        key0, key1 = (key0 + _WEYL0) & _LOW, (key1 + _WEYL1) & _LOW
    return a, b, c, d


@part
def _quads_of_row(mask, first, quads, row, stream, adapter, key0, key1, threshold):
    wide()
    for quad in range(quads):
        a, b, c, d = _quad(np.uint64(first + quad), row, stream, adapter, key0, key1)
        mask[4 * quad] = a < threshold
        mask[4 * quad + 1] = b < threshold
        mask[4 * quad + 2] = c < threshold
        mask[4 * quad + 3] = d < threshold


@part
def _quads_of_column(mask, top, quad, stream, adapter, key0, key1, threshold):
    lanes = np.empty((4, len(mask)), np.bool_)  # one after the other, so that the loop can be vectorised
    lane0, lane1, lane2, lane3 = lanes[0], lanes[1], lanes[2], lanes[3]
    for i in range(len(mask)):
        a, b, c, d = _quad(quad, np.uint64(top + i), stream, adapter, key0, key1)
        lane0[i] = a < threshold
        lane1[i] = b < threshold
        lane2[i] = c < threshold
        lane3[i] = d < threshold
    for i in range(len(mask)):
        for lane in range(4):
            mask[i, lane] = lanes[lane, i]


@part
def _mask_row(mask, row, left, stream, adapter, key0, key1, threshold):
    columns = len(mask)
    head = min(-left % 4, columns)  # up to the first whole quad
    tail = (columns - head) % 4
    first, quads = (left + head) // 4, (columns - head) // 4
    if head:
        words = _quad(np.uint64(left // 4), row, stream, adapter, key0, key1)
        for j in range(head):
            mask[j] = words[left % 4 + j] < threshold
    _quads_of_row(mask[head:], first, quads, row, stream, adapter, key0, key1, threshold)
    if tail:
        words = _quad(np.uint64(first + quads), row, stream, adapter, key0, key1)
        for j in range(tail):
            mask[columns - tail + j] = words[j] < threshold


@compiled((flag[:, ::1], i64, i64, u64, u64, u64, u64, u64))
def keep_mask(mask, top, left, stream, adapter, key0, key1, threshold):
    """mask[i, j] = u32(top + i, left + j) < threshold: see `cpu.mask.keep_mask`. stream to threshold are uint64."""
    columns = mask.shape[1]
    head = min(-left % 4, columns)
    tail = (columns - head) % 4
    first, quads = (left + head) // 4, (columns - head) // 4
    wide, at = quads >= _WIDE, columns - tail
    if wide or head or tail:
        for i in range(mask.shape[0]):
            row = np.uint64(top + i)
            if wide:
                _mask_row(mask[i], row, left, stream, adapter, key0, key1, threshold)
            else:
                _mask_row(mask[i, :head], row, left, stream, adapter, key0, key1, threshold)
                _mask_row(mask[i, at:], row, left + at, stream, adapter, key0, key1, threshold)
    if not wide:
        for quad in range(quads):
            part = mask[:, head + 4 * quad : head + 4 * quad + 4]
            _quads_of_column(part, top, np.uint64(first + quad), stream, adapter, key0, key1, threshold)


@part
def _words_of_quads(words, first, row, stream, adapter, key0, key1):
    wide()
    for quad in range(len(words) // 4):
        a, b, c, d = _quad(np.uint64(first + quad), row, stream, adapter, key0, key1)
        words[4 * quad], words[4 * quad + 1] = a, b
        words[4 * quad + 2], words[4 * quad + 3] = c, d


@compiled((u32[:, ::1], i64, i64, u64, u64, u64, u64))
def random_words(words, top, first, stream, adapter, key0, key1):
    """words[i, j] = u32(top + i, 4 first + j), a multiple of four columns: see `cpu.mask.random_words`."""
    for i in range(len(words)):
        _words_of_quads(words[i], first, np.uint64(top + i), stream, adapter, key0, key1)


@compiled((u32[::1], u32, u32, u32, i64[::1]))
def count_bins(bits, low, width, shift, total):
    """total[(magnitude - low) >> shift] += 1 for every magnitude from low to low + width; bits is uint32 [n]."""
    for i in range(len(bits)):
        place = np.uint32((bits[i] & _SIGN_OFF) - low)
        if place <= width:
            total[place >> shift] += 1


@compiled((u32[:, ::1], u32, i64[::1]))
def count_equal(bits, magnitude, total):
    """total[i] += how many of row i of bits, uint32 [rows, columns], have that magnitude."""
    for i in range(bits.shape[0]):
        row, equal = bits[i], np.uint32(0)
        for j in range(len(row)):
            equal += np.uint32((row[j] & _SIGN_OFF) == magnitude)
        total[i] += equal


@intrinsic
def _pointer(context, address):
    """The address, as a pointer to float32."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), generate


@part
def _floats(address, size):
    return numba.carray(_pointer(address), (size,))


@part
def _words(address, size):
    return _floats(address, size).view(np.uint32)


def _has_avx512() -> bool:
    """Whether loops are compiled for a CPU with vectors of 512 bits."""
    chosen = any(vars(config).get(name) for name in ("CPU_NAME", "CPU_FEATURES"))  # in place of this one
    return not chosen and bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))


# Four rows by so many columns of a product are summed in registers: 16 vectors of 512 bits, or 8 of 256.
_LANES, _VECTORS, _UP = (16, 4, 4) if _has_avx512() else (8, 2, 4)
_PANEL = _LANES * _VECTORS
# Ranks of all products together from which on `cpu.one_sweep` takes less time than two sweeps: lists of open elements
# are made sixteen at a time, or one by one.
LEAST_RANKS = 64 if _has_avx512() else 256


def room_for(terms: np.ndarray) -> int:
    """Elements of scratch that `merge_tile` needs: a block of each term, votes and shares, and a chunk of each A."""
    return (len(terms) + 4) * _BLOCK + int(terms["rank"].sum()) * CHUNK


def _everywhere(builder, value, kind):
    """The value in every lane of a vector."""
    lanes = ir.VectorType(ir.IntType(32), kind.count)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, first, ir.Constant(lanes, [0] * kind.count))


@intrinsic
def _four_rows(context, panel, b0, b1, b2, b3, rank, factor, out):
    """Write factor * (B @ A) of four rows and a panel of columns to out, whose rows are a chunk apart.

    panel: A [rank, panel], b0 to b3: rows of B, all addresses. Terms are added in the order of the ranks, none fused
    into another. No loop of Numba's keeps the sums of four rows in registers.
    """

    def generate(context, builder, signature, arguments):
        size, real = ir.IntType(64), ir.FloatType()
        lanes = ir.VectorType(real, _LANES)
        panel, *rows, rank, factor, out = arguments

        def at(address, floats, kind):
            return builder.inttoptr(builder.add(address, builder.mul(floats, size(4))), kind.as_pointer())

        def terms_of(k):
            head = builder.mul(k, size(_PANEL))
            across = [
                builder.load(at(panel, builder.add(head, size(v * _LANES)), lanes), align=4) for v in range(_VECTORS)
            ]
            for row in rows:
                x = _everywhere(builder, builder.load(at(row, k, real), align=4), lanes)
                yield [builder.fmul(x, a) for a in across]

        sums = [[cgutils.alloca_once(builder, lanes) for _ in range(_VECTORS)] for _ in rows]
        for places, terms in zip(sums, terms_of(size(0)), strict=True):
            for place, term in zip(places, terms, strict=True):
                builder.store(term, place)
        with cgutils.for_range_slice(builder, size(1), rank, size(1)) as (k, _):
            for places, terms in zip(sums, terms_of(k), strict=True):
                for place, term in zip(places, terms, strict=True):
                    builder.store(builder.fadd(builder.load(place), term), place)
        scaling = _everywhere(builder, factor, lanes)
        for row, places in enumerate(sums):
            for v, place in enumerate(places):
                to = at(out, size(row * CHUNK + v * _LANES), lanes)
                builder.store(builder.fmul(builder.load(place), scaling), to, align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6, types.float32, types.int64), generate


@part
def _copy(values, out):
    for j in range(len(out)):
        out[j] = values[j]


@part
def _pack(term, start, size, out):
    """The columns from `start` on of A, as panels [rank, _PANEL] one after the other, with zeros up to a whole one."""
    for left in range(0, size, _PANEL):
        columns = min(_PANEL, size - left)
        for k in range(term.rank):
            to = _floats(out, _PANEL)
            _copy(_floats(term.a + 4 * (k * term.columns + start + left), columns), to[:columns])
            to[columns:] = F0
            out += 4 * _PANEL


@part
def _look(term, panels, block, rows, start, size, held, width, out):
    """Write so many rows of a term from (block, start) on; panels: what `_pack` made there, of a product.

    held: address of the same place of a tile that is held, whose rows are `width` long. out: rows are a chunk apart.
    """
    if term.rank == 0:
        for row in range(rows):
            _copy(_floats(held + 4 * row * width, size), _floats(out + 4 * row * CHUNK, size))
        return
    wide()
    stride, last = 4 * term.rank, term.b + 4 * term.rank * (block + rows - 1)
    for left in range(0, size, _PANEL):
        panel = panels + 4 * term.rank * left
        for row in range(0, rows, _UP):
            b0 = term.b + stride * (block + row)
            b1, b2, b3 = min(b0 + stride, last), min(b0 + 2 * stride, last), min(b0 + 3 * stride, last)
            place = out + 4 * (row * CHUNK + left)
            _four_rows(panel, b0, b1, b2, b3, term.rank, term.scaling, place)


@part
def _drop(t, mask, divisor, factor):
    for j in range(len(t)):
        t[j] = (t[j] if mask[j] else F0) / divisor * factor


@part
def _over(x, limit, factor):
    """factor * x where |x| > limit, else 0; asked this way round, so that NaN stays."""
    return F0 if abs(x) <= limit else x * factor


@part
def _trim(t, limit):
    for j in range(len(t)):
        t[j] = _over(t[j], limit, F1)


@part
def _keep_row(term, row, start, x, mask):
    """Drop, and trim where the trim's place is in this row; returns the limit of what is still to be trimmed."""
    if term.drops:
        stream, adapter, key0, key1 = term.stream, term.adapter, term.key0, term.key1
        _mask_row(mask, np.uint64(row), start, stream, adapter, key0, key1, term.threshold)
        _drop(x, mask, term.divisor, term.factor)
    if row != term.row or term.column <= start:
        return term.below if row < term.row else term.above
    if term.column >= start + len(x):
        return term.below
    _trim(x[: term.column - start], term.below)
    _trim(x[term.column - start :], term.above)
    return -F1


@part
def _sign(x):
    return np.float32(x > F0) - np.float32(x < F0)


@part
def _kept_four(x, j, limits, factors):
    """Element j of four terms, whose chunks are _BLOCK apart: factor times what is kept."""
    return (
        _over(x[j], limits[0], factors[0]),
        _over(x[_BLOCK + j], limits[1], factors[1]),
        _over(x[2 * _BLOCK + j], limits[2], factors[2]),
        _over(x[3 * _BLOCK + j], limits[3], factors[3]),
    )


@part
def _four(values):
    """The first four, in registers."""
    return values[0], values[1], values[2], values[3]


@part
def _votes(v, by_sign):
    return (_sign(v[0]), _sign(v[1]), _sign(v[2]), _sign(v[3])) if by_sign else v


@part
def _vote_four(x, limits, ballots, by_sign, first, votes):
    """votes += the ballots of four terms; votes = them at first."""
    wide()
    limits, ballots = _four(limits), _four(ballots)
    for j in range(len(votes)):
        v = _votes(_kept_four(x, j, limits, ballots), by_sign)
        votes[j] = (F0 if first else votes[j]) + v[0] + v[1] + v[2] + v[3]


@part
def _sum_four(x, limits, weights, first, factor, out):
    """out = (out + what is kept of four terms, times their weights) * factor."""
    wide()
    limits, weights = _four(limits), _four(weights)
    for j in range(len(out)):
        v = _kept_four(x, j, limits, weights)
        out[j] = ((F0 if first else out[j]) + v[0] + v[1] + v[2] + v[3]) * factor


@part
def _elects_plus(vote, tied_plus):
    return (vote > F0) | ((vote == F0) & tied_plus)


@part
def _add_if_agrees(v, plus, weight, own, total, share):
    """(total + weight * v, share + own) where v is on the elected side.

    total is never -0, so that it does not change where 0 would be added.
    """
    agrees = (v if plus else -v) > F0
    return total + v * weight if agrees else total, share + own if agrees else share


@part
def _add_agreeing_four(v, plus, weights, shares, total, share):
    total, share = _add_if_agrees(v[0], plus, weights[0], shares[0], total, share)
    total, share = _add_if_agrees(v[1], plus, weights[1], shares[1], total, share)
    total, share = _add_if_agrees(v[2], plus, weights[2], shares[2], total, share)
    return _add_if_agrees(v[3], plus, weights[3], shares[3], total, share)


@part
def _sum_agreeing_four(x, limits, ballots, weights, shares, votes, tied_plus, first, count, out):
    """out += what agrees with the vote of four terms, times their weights, and count += their shares; = at first."""
    wide()
    limits, ballots, weights, shares = _four(limits), _four(ballots), _four(weights), _four(shares)
    for j in range(len(out)):
        v, plus = _kept_four(x, j, limits, ballots), _elects_plus(votes[j], tied_plus)
        total, share = (F0, F0) if first else (out[j], count[j])
        out[j], count[j] = _add_agreeing_four(v, plus, weights, shares, total, share)


@part
def _mean(total, share, divides):
    return total / (share if divides & (share != F0) else F1)


@part
def _finish(count, divides, scale, out):
    for j in range(len(out)):
        out[j] = _mean(out[j], count[j], divides) * scale


@part
def _merge_four(x, limits, ballots, weights, shares, by_sign, tied_plus, divides, scale, out):
    """out = `_finish` of `_sum_agreeing_four` by `_vote_four`, of four terms that are all: each is read once."""
    wide()
    limits, ballots, weights, shares = _four(limits), _four(ballots), _four(weights), _four(shares)
    for j in range(len(out)):
        v = _kept_four(x, j, limits, ballots)
        votes = _votes(v, by_sign)
        plus = _elects_plus(F0 + votes[0] + votes[1] + votes[2] + votes[3], tied_plus)
        total, share = _add_agreeing_four(v, plus, weights, shares, F0, F0)
        out[j] = _mean(total, share, divides) * scale


_SIXTEEN = ir.VectorType(ir.IntType(32), 16)


def _compared(builder, source, low, high):
    """Magnitudes of sixteen float32 at an address, as bits, and masks of those from low to high and of those above."""
    values = builder.load(builder.inttoptr(source, _SIXTEEN.as_pointer()), align=4)
    values = builder.and_(values, _everywhere(builder, ir.Constant(ir.IntType(32), int(_SIGN_OFF)), _SIXTEEN))
    least, most = _everywhere(builder, low, _SIXTEEN), _everywhere(builder, high, _SIXTEEN)
    inside = builder.icmp_unsigned("<=", builder.sub(values, least), builder.sub(most, least))
    return values, inside, builder.icmp_unsigned(">", values, most)


def _counted(builder, mask):
    return builder.zext(builder.ctpop(builder.bitcast(mask, ir.IntType(16))), ir.IntType(64))


def _and_above(builder, number, above):
    """The number, and 2**32 times how many are above."""
    return builder.add(number, builder.shl(_counted(builder, above), ir.Constant(ir.IntType(64), 32)))


def _lanes_of(builder, bits):
    """The mask of sixteen that these bits are."""
    return builder.bitcast(builder.trunc(bits, ir.IntType(16)), ir.VectorType(ir.IntType(1), 16))


def _put(builder, values, mask, place):
    """Store those of sixteen words that are in the mask to the head of sixteen places at an address, by AVX-512."""
    kind = ir.FunctionType(_SIXTEEN, (_SIXTEEN, _SIXTEEN, mask.type))
    compress = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.mask.compress.v16i32")
    head = builder.call(compress, (values, ir.Constant(_SIXTEEN, [0] * 16), mask))
    builder.store(head, builder.inttoptr(place, _SIXTEEN.as_pointer()), align=4)


@intrinsic
def _collect_sixteen(context, source, low, high, place):
    """Put the magnitudes from low to high, all as bits, of sixteen float32 to the head of sixteen places.

    source, place: addresses. Returns how many these are, and 2**32 times how many are above. It takes AVX-512, by which
    the search of a threshold takes three quarters of the time.
    """

    def generate(context, builder, signature, arguments):
        source, low, high, place = arguments
        values, inside, above = _compared(builder, source, low, high)
        _put(builder, values, inside, place)
        return _and_above(builder, _counted(builder, inside), above)

    return types.uint64(types.int64, types.uint32, types.uint32, types.int64), generate


@intrinsic
def _compare_sixteen(context, source, low, high):
    """Which of sixteen float32 have magnitudes from low to high, a bit each, and 2**32 times how many are above."""

    def generate(context, builder, signature, arguments):
        _, inside, above = _compared(builder, *arguments)
        bits = builder.zext(builder.bitcast(inside, ir.IntType(16)), ir.IntType(64))
        return _and_above(builder, bits, above)

    return types.uint64(types.int64, types.uint32, types.uint32), generate


@intrinsic
def _put_sixteen(context, source, chosen, place):
    """Put those of sixteen words that are chosen, a bit each, to the head of sixteen places; addresses."""

    def generate(context, builder, signature, arguments):
        source, chosen, place = arguments
        values = builder.load(builder.inttoptr(source, _SIXTEEN.as_pointer()), align=4)
        _put(builder, values, _lanes_of(builder, chosen), place)
        return context.get_dummy_value()

    return types.void(types.int64, types.uint64, types.int64), generate


@intrinsic
def _number_sixteen(context, first, chosen, place):
    """Put first + i, for the i of sixteen that are chosen, to the head of sixteen places. Returns how many."""

    def generate(context, builder, signature, arguments):
        first, chosen, place = arguments
        mask = _lanes_of(builder, chosen)
        numbers = builder.add(_everywhere(builder, first, _SIXTEEN), ir.Constant(_SIXTEEN, list(range(16))))
        _put(builder, numbers, mask, place)
        return _counted(builder, mask)

    return types.int64(types.uint32, types.uint64, types.int64), generate


@part
def _open_one_by_one(bits, first, size, brackets, place, found, stride, counts):
    for j in range(first, size):
        is_open = False
        for k in range(4):
            magnitude = _words(bits + 4 * (k * _BLOCK + j), 1)[0] & _SIGN_OFF
            counts[1 + k] += np.int64(magnitude > brackets[1, k])
            is_open |= (magnitude >= brackets[0, k]) & (magnitude <= brackets[1, k])
        if is_open:
            to = found + 4 * counts[0]
            _words(to, 1)[0] = np.uint32(place + j)
            for k in range(4):
                _words(to + 4 * (1 + k) * stride, 1)[0] = _words(bits + 4 * (k * _BLOCK + j), 1)[0]
            counts[0] += 1


@part
def _open_by_sixteen(bits, first, size, brackets, place, found, stride, counts):
    even, to = size // 16 * 16, found + 4 * counts[0]
    low0, low1, low2, low3 = _four(brackets[0])
    high0, high1, high2, high3 = _four(brackets[1])
    above0 = above1 = above2 = above3 = np.uint64(0)
    for j in range(first, even, 16):
        x0 = bits + 4 * j
        x1, x2, x3 = x0 + 4 * _BLOCK, x0 + 8 * _BLOCK, x0 + 12 * _BLOCK
        both0, both1 = _compare_sixteen(x0, low0, high0), _compare_sixteen(x1, low1, high1)
        both2, both3 = _compare_sixteen(x2, low2, high2), _compare_sixteen(x3, low3, high3)
        above0, above1 = above0 + (both0 >> _HALF), above1 + (both1 >> _HALF)
        above2, above3 = above2 + (both2 >> _HALF), above3 + (both3 >> _HALF)
        chosen = (both0 | both1 | both2 | both3) & _LOW
        _put_sixteen(x0, chosen, to + 4 * stride)
        _put_sixteen(x1, chosen, to + 8 * stride)
        _put_sixteen(x2, chosen, to + 12 * stride)
        _put_sixteen(x3, chosen, to + 16 * stride)
        to += 4 * _number_sixteen(np.uint32(place + j), chosen, to)
    counts[0] = (to - found) // 4
    counts[1], counts[2] = counts[1] + np.int64(above0), counts[2] + np.int64(above1)
    counts[3], counts[4] = counts[3] + np.int64(above2), counts[4] + np.int64(above3)
    _open_one_by_one(bits, even, size, brackets, place, found, stride, counts)


_open = _open_by_sixteen if _has_avx512() else _open_one_by_one


_how = (f32[:, ::1], flag, flag, flag, flag, f32, i64[::1], i64, f32[::1])  # of `merge_tile`
_opened = (u32[:, ::1], u32[:, ::1], i64[::1])


@compiled((_terms, *_tile, *_how, *_opened))
def merge_tile(
    terms, top, bottom, left, right, weights, elects, by_sign, tied_plus, divides, scale, outs, stride, room, brackets,
    found, counts
):  # fmt: skip
    """outs[s] = scale * sum_i weights[s, i] x_i over what agrees with the vote of all x, and over its share, of a tile.

    x_i: ballot times what is kept of terms[i]. elects: whether there is a vote at all; by_sign, tied_plus, divides: by
    what, who wins a tie, and whether the sum is divided by the shares of those that agree (1 where they are 0). outs:
    addresses of where the tile begins in each result, whose rows are stride elements apart. room: scratch, `room_for`
    that many terms.

    brackets: [2, 4], of each of up to four terms the least and the largest bits of the magnitudes of which it is open
    whether they stay, and all ones of no term; or [2, 0], where nothing is open. Elements that are open in any term are
    listed: found[0] gets their places, as numbers in a result of `stride` columns, and found[1 + k] the bits of x_k;
    there is room for the tile and 16 more. counts[0]: how many these are; counts[1 + k]: how many magnitudes of term k
    are above its bracket.
    """
    count_of_terms, width = len(terms), right - left
    n = (count_of_terms + 3) // 4 * 4  # zeros up to a multiple of four
    room[count_of_terms * _BLOCK : n * _BLOCK] = F0
    address, all_mask = np.int64(room.ctypes.data), np.empty(CHUNK, np.bool_)
    limits, ballots, shares = np.zeros(n, np.float32), np.zeros(n, np.float32), np.zeros(n, np.float32)
    weight = np.zeros((len(outs), n), np.float32)
    for k in range(count_of_terms):
        ballots[k], shares[k] = terms[k].ballot, terms[k].share
        for s in range(len(outs)):
            weight[s, k] = weights[s, k]
    counts[:] = 0
    last, panels = address + 4 * n * _BLOCK, address + 4 * (count_of_terms + 4) * _BLOCK
    for start in range(left, right, CHUNK):
        size = min(CHUNK, right - start)
        votes, count, mask = _floats(last, size), _floats(last + 4 * CHUNK, size), all_mask[:size]
        panel = panels
        for k in range(count_of_terms):
            _pack(terms[k], start, size, panel)
            panel += 4 * CHUNK * terms[k].rank
        for block in range(top, bottom, ROWS):
            end = min(block + ROWS, bottom)
            panel = panels
            for k in range(count_of_terms):
                held = terms[k].b + 4 * ((block - top) * width + start - left)
                _look(terms[k], panel, block, end - block, start, size, held, width, address + 4 * k * _BLOCK)
                panel += 4 * CHUNK * terms[k].rank
            for row in range(block, end):
                place = address + 4 * (row - block) * CHUNK
                if brackets.shape[1]:
                    at = np.int64(found.ctypes.data)
                    _open(place, 0, size, brackets, row * stride + start, at, found.shape[1], counts)
                for k in range(count_of_terms):
                    limits[k] = _keep_row(terms[k], row, start, _floats(place + 4 * k * _BLOCK, size), mask)
                if elects and n == 4 and len(outs) == 1:
                    out = _floats(outs[0] + 4 * ((row - top) * stride + start - left), size)
                    of = limits, ballots, weight[0], shares
                    _merge_four(_floats(place, 4 * _BLOCK), *of, by_sign, tied_plus, divides, scale, out)
                    continue
                if elects:
                    for k in range(0, n, 4):
                        x = _floats(place + 4 * k * _BLOCK, 4 * _BLOCK)
                        _vote_four(x, limits[k:], ballots[k:], by_sign, k == 0, votes)
                for s in range(len(outs)):
                    out, w = _floats(outs[s] + 4 * ((row - top) * stride + start - left), size), weight[s]
                    for k in range(0, n, 4):
                        x = _floats(place + 4 * k * _BLOCK, 4 * _BLOCK)
                        if elects:
                            of = limits[k:], ballots[k:], w[k:], shares[k:]
                            _sum_agreeing_four(x, *of, votes, tied_plus, k == 0, count, out)
                        else:
                            _sum_four(x, limits[k:], w[k:], k == 0, scale if k + 4 == n else F1, out)
                    if elects:
                        _finish(count, divides, scale, out)


@compiled((f32[::1], u32[::1], f32[::1]))
def put(values, places, out):
    """out[places[i]] = values[i]."""
    for i in range(len(places)):
        out[places[i]] = values[i]


@compiled((_terms, *_tile, i64))
def fill_tile(terms, top, bottom, left, right, out):
    """Write the tile of terms[0], which is a product, to the address out, its rows one after the other."""
    term, width = terms[0], right - left
    room = np.empty(_BLOCK + term.rank * CHUNK, np.float32)
    block = np.int64(room.ctypes.data)
    panels = block + 4 * _BLOCK
    for start in range(left, right, CHUNK):
        size = min(CHUNK, right - start)
        _pack(term, start, size, panels)
        for row in range(top, bottom, ROWS):
            rows = min(ROWS, bottom - row)
            _look(term, panels, row, rows, start, size, 0, 0, block)
            for r in range(rows):
                place = out + 4 * ((row - top + r) * width + start - left)
                _copy(room[r * CHUNK : r * CHUNK + size], _floats(place, size))


# These get addresses: arrays are counted as they come and go, which took longer than the arithmetic.
@part
def _collect_one_by_one(source, size, low, width, found, count):
    bits, places = _words(source, size), _words(found + 4 * count, size + 1)
    above, inside, high = 0, 0, low + width
    for j in range(size):
        above += np.int64((bits[j] & _SIGN_OFF) > high)
    for j in range(size):  # without a branch, which would be mispredicted too often
        magnitude = bits[j] & _SIGN_OFF
        places[inside] = magnitude
        inside += np.int64(np.uint32(magnitude - low) <= width)
    return above, count + inside


@part
def _collect_by_sixteen(source, size, low, width, found, count):
    above, inside, place = np.uint64(0), np.uint64(0), found + 4 * count
    even, high = size // 16 * 16, np.uint32(low + width)
    for j in range(0, even, 16):
        both = _collect_sixteen(source + 4 * j, low, high, place + 4 * np.int64(inside))
        above += both >> _HALF
        inside += both & _LOW
    count += np.int64(inside)
    if even == size:
        return np.int64(above), count
    rest, count = _collect_one_by_one(source + 4 * even, size - even, low, width, found, count)
    return np.int64(above) + rest, count


_collect = _collect_by_sixteen if _has_avx512() else _collect_one_by_one


@compiled((u32[:, ::1], u32[:, ::1], u32[:, ::1], i64[::1]))
def inside(bits, brackets, found, counts):
    """counts[k] = how many magnitudes of bits[k] are in the k-th bracket; they go to the head of found[k].

    brackets: the least and the largest, as of `merge_tile`. A row of found is one longer than one of bits, or more.
    """
    for k in range(len(bits)):
        low, width = brackets[0, k], np.uint32(brackets[1, k] - brackets[0, k])
        source, place = np.int64(bits.ctypes.data) + 4 * k * bits.shape[1], np.int64(found.ctypes.data)
        _, counts[k] = _collect(source, bits.shape[1], low, width, place + 4 * k * found.shape[1], 0)


@compiled((_terms, *_tile, u32[::1], u32[::1], u32[:, ::1], i64[:, ::1]))
def bracket_tile(terms, top, bottom, left, right, lows, widths, found, counts):
    """counts[s] = (how many magnitudes of terms[0] are above lows[s] + widths[s], how many from lows[s] to that).

    The latter go to the head of found[s], which has room for the whole tile and one more. All are bits of float32.
    """
    term, width = terms[0], right - left
    room = np.empty(_BLOCK + term.rank * CHUNK, np.float32)
    block, places, stride = np.int64(room.ctypes.data), np.int64(found.ctypes.data), 4 * found.shape[1]
    panels = block + 4 * _BLOCK
    counts[:] = 0
    for start in range(left, right, CHUNK):
        size = min(CHUNK, right - start)
        _pack(term, start, size, panels)
        for row in range(top, bottom, ROWS):
            rows = min(ROWS, bottom - row)
            held = term.b + 4 * ((row - top) * width + start - left)
            _look(term, panels, row, rows, start, size, held, width, block)
            for s in range(len(lows)):
                place = places + s * stride
                for r in range(rows):
                    bits = block + 4 * r * CHUNK
                    above, counts[s, 1] = _collect(bits, size, lows[s], widths[s], place, counts[s, 1])
                    counts[s, 0] += above
    room[0] = F0  # it lives while its address is used
