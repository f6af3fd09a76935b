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

CHUNK = 256  # columns: 16 ranks of A are 16 KiB, half of an L1 cache
ROWS = 8  # of a chunk's block
EIGHT = 8  # ranks are added by so many at a time
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


def room_for(terms: int) -> int:
    """Elements of scratch that `merge_tile` needs: a block of each term, votes and shares."""
    return (terms + 4) * _BLOCK


@part
def _add_eight(a, stride, b0, b1, first, factor, out0, out1):
    """factor * (out + eight terms of B @ A) of two rows, out being 0 at first; stride: bytes from rank to rank of A."""
    wide()
    size = len(out0)
    a0, a1, a2, a3, a4, a5, a6, a7 = (
        _floats(a, size),
        _floats(a + stride, size),
        _floats(a + 2 * stride, size),
        _floats(a + 3 * stride, size),
        _floats(a + 4 * stride, size),
        _floats(a + 5 * stride, size),
        _floats(a + 6 * stride, size),
        _floats(a + 7 * stride, size),
    )
    p, q = _floats(b0, 8), _floats(b1, 8)
    p0, p1, p2, p3, p4, p5, p6, p7 = p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]
    q0, q1, q2, q3, q4, q5, q6, q7 = q[0], q[1], q[2], q[3], q[4], q[5], q[6], q[7]
    if first:
        for j in range(size):
            x0, x1, x2, x3, x4, x5, x6, x7 = a0[j], a1[j], a2[j], a3[j], a4[j], a5[j], a6[j], a7[j]
            s = p0 * x0 + p1 * x1 + p2 * x2 + p3 * x3 + p4 * x4 + p5 * x5 + p6 * x6 + p7 * x7
            t = q0 * x0 + q1 * x1 + q2 * x2 + q3 * x3 + q4 * x4 + q5 * x5 + q6 * x6 + q7 * x7
            out0[j] = s * factor
            out1[j] = t * factor
    else:
        for j in range(size):
            x0, x1, x2, x3, x4, x5, x6, x7 = a0[j], a1[j], a2[j], a3[j], a4[j], a5[j], a6[j], a7[j]
            s = out0[j] + p0 * x0 + p1 * x1 + p2 * x2 + p3 * x3 + p4 * x4 + p5 * x5 + p6 * x6 + p7 * x7
            t = out1[j] + q0 * x0 + q1 * x1 + q2 * x2 + q3 * x3 + q4 * x4 + q5 * x5 + q6 * x6 + q7 * x7
            out0[j] = s * factor
            out1[j] = t * factor


@part
def _copy(values, out):
    for j in range(len(out)):
        out[j] = values[j]


@part
def _look(term, row, rows, start, top, left, width, out0, out1):
    """Write one or two rows of a term from column `start` on; a tile that is held begins at (top, left)."""
    if term.rank == 0:
        held = term.b + 4 * ((row - top) * width + start - left)
        _copy(_floats(held, len(out0)), out0)
        _copy(_floats(held + 4 * (rows - 1) * width, len(out1)), out1)
    else:
        b0 = term.b + 4 * row * term.rank
        b1 = b0 + 4 * (rows - 1) * term.rank
        for k in range(0, term.rank, EIGHT):
            a = term.a + 4 * (k * term.columns + start)
            factor = term.scaling if k + EIGHT == term.rank else F1
            _add_eight(a, 4 * term.columns, b0 + 4 * k, b1 + 4 * k, k == 0, factor, out0, out1)


@part
def _drop(t, mask, divisor, factor):
    for j in range(len(t)):
        t[j] = (t[j] if mask[j] else F0) / divisor * factor


@part
def _over(x, limit):
    """x where |x| > limit, else 0; asked this way round, so that NaN stays."""
    return F0 if abs(x) <= limit else x


@part
def _trim(t, limit):
    for j in range(len(t)):
        t[j] = _over(t[j], limit)


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
def _vote_four(x, limits, ballots, by_sign, first, votes):
    """votes += the ballots of four terms, whose chunks are _BLOCK apart; votes = them at first."""
    wide()
    l0, l1, l2, l3 = limits[0], limits[1], limits[2], limits[3]
    b0, b1, b2, b3 = ballots[0], ballots[1], ballots[2], ballots[3]
    for j in range(len(votes)):
        x0, x1, x2, x3 = x[j], x[_BLOCK + j], x[2 * _BLOCK + j], x[3 * _BLOCK + j]
        v0 = _over(x0, l0) * b0
        v1 = _over(x1, l1) * b1
        v2 = _over(x2, l2) * b2
        v3 = _over(x3, l3) * b3
        if by_sign:
            v0, v1, v2, v3 = _sign(v0), _sign(v1), _sign(v2), _sign(v3)
        vote = F0 if first else votes[j]
        votes[j] = vote + v0 + v1 + v2 + v3


@part
def _agreeing(x, limit, ballot, elects_plus):
    """ballot * x where it is kept and on the elected side, else 0; and whether it is."""
    x = _over(x, limit) * ballot
    agrees = (x > F0) & elects_plus | (x < F0) & (not elects_plus)
    return x if agrees else F0, agrees


@part
def _sum_four(x, limits, weights, first, factor, out):
    """out = (out + what is kept of four terms, times their weights) * factor."""
    wide()
    l0, l1, l2, l3 = limits[0], limits[1], limits[2], limits[3]
    w0, w1, w2, w3 = weights[0], weights[1], weights[2], weights[3]
    for j in range(len(out)):
        x0, x1, x2, x3 = x[j], x[_BLOCK + j], x[2 * _BLOCK + j], x[3 * _BLOCK + j]
        v0 = _over(x0, l0) * w0
        v1 = _over(x1, l1) * w1
        v2 = _over(x2, l2) * w2
        v3 = _over(x3, l3) * w3
        total = F0 if first else out[j]
        out[j] = (total + v0 + v1 + v2 + v3) * factor


@part
def _sum_agreeing_four(x, limits, ballots, weights, shares, votes, tied_plus, first, count, out):
    """out += what agrees with the vote of four terms, times their weights, and count += their shares; = at first."""
    wide()
    l0, l1, l2, l3 = limits[0], limits[1], limits[2], limits[3]
    b0, b1, b2, b3 = ballots[0], ballots[1], ballots[2], ballots[3]
    w0, w1, w2, w3 = weights[0], weights[1], weights[2], weights[3]
    s0, s1, s2, s3 = shares[0], shares[1], shares[2], shares[3]
    for j in range(len(out)):
        x0, x1, x2, x3 = x[j], x[_BLOCK + j], x[2 * _BLOCK + j], x[3 * _BLOCK + j]
        plus = (votes[j] > F0) | ((votes[j] == F0) & tied_plus)
        v0, agrees0 = _agreeing(x0, l0, b0, plus)
        v1, agrees1 = _agreeing(x1, l1, b1, plus)
        v2, agrees2 = _agreeing(x2, l2, b2, plus)
        v3, agrees3 = _agreeing(x3, l3, b3, plus)
        total = F0 if first else out[j]
        share = F0 if first else count[j]
        share += s0 if agrees0 else F0
        share += s1 if agrees1 else F0
        share += s2 if agrees2 else F0
        share += s3 if agrees3 else F0
        count[j] = share
        out[j] = total + v0 * w0 + v1 * w1 + v2 * w2 + v3 * w3


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
    l0, l1, l2, l3 = limits[0], limits[1], limits[2], limits[3]
    b0, b1, b2, b3 = ballots[0], ballots[1], ballots[2], ballots[3]
    w0, w1, w2, w3 = weights[0], weights[1], weights[2], weights[3]
    s0, s1, s2, s3 = shares[0], shares[1], shares[2], shares[3]
    for j in range(len(out)):
        x0, x1, x2, x3 = x[j], x[_BLOCK + j], x[2 * _BLOCK + j], x[3 * _BLOCK + j]
        v0 = _over(x0, l0) * b0
        v1 = _over(x1, l1) * b1
        v2 = _over(x2, l2) * b2
        v3 = _over(x3, l3) * b3
        if by_sign:
            v0, v1, v2, v3 = _sign(v0), _sign(v1), _sign(v2), _sign(v3)
        vote = F0 + v0 + v1 + v2 + v3
        plus = (vote > F0) | ((vote == F0) & tied_plus)
        v0, agrees0 = _agreeing(x0, l0, b0, plus)
        v1, agrees1 = _agreeing(x1, l1, b1, plus)
        v2, agrees2 = _agreeing(x2, l2, b2, plus)
        v3, agrees3 = _agreeing(x3, l3, b3, plus)
        share = s0 if agrees0 else F0
        share += s1 if agrees1 else F0
        share += s2 if agrees2 else F0
        share += s3 if agrees3 else F0
        out[j] = _mean(F0 + v0 * w0 + v1 * w1 + v2 * w2 + v3 * w3, share, divides) * scale


@compiled((_terms, *_tile, f32[:, ::1], flag, flag, flag, flag, f32, i64[::1], i64, f32[::1]))
def merge_tile(
    terms, top, bottom, left, right, weights, elects, by_sign, tied_plus, divides, scale, outs, stride, room
):
    """outs[s] = scale * sum_i weights[s, i] x_i over what agrees with the vote of all x, and over its share, of a tile.

    x_i: ballot times what is kept of terms[i]. elects: whether there is a vote at all; by_sign, tied_plus, divides: by
    what, who wins a tie, and whether the sum is divided by the shares of those that agree (1 where they are 0). outs:
    addresses of where the tile begins in each result, whose rows are stride elements apart. room: scratch, `room_for`
    that many terms.
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
    last = address + 4 * n * _BLOCK
    for block in range(top, bottom, ROWS):
        end = min(block + ROWS, bottom)
        for start in range(left, right, CHUNK):
            size = min(CHUNK, right - start)
            votes, count, mask = _floats(last, size), _floats(last + 4 * CHUNK, size), all_mask[:size]
            for k in range(count_of_terms):
                for row in range(block, end, 2):
                    x = address + 4 * (k * _BLOCK + (row - block) * CHUNK)
                    x0, x1 = _floats(x, size), _floats(x + 4 * CHUNK, size)
                    _look(terms[k], row, min(2, end - row), start, top, left, width, x0, x1)
            for row in range(block, end):
                place = address + 4 * (row - block) * CHUNK
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


@compiled((_terms, *_tile, i64))
def fill_tile(terms, top, bottom, left, right, out):
    """Write the tile of terms[0], which is a product, to the address out, its rows one after the other."""
    width, spare = right - left, np.empty(CHUNK, np.float32)
    for start in range(left, right, CHUNK):
        size = min(CHUNK, right - start)
        for row in range(top, bottom, 2):
            rows = min(2, bottom - row)
            place = out + 4 * ((row - top) * width + start - left)
            second = _floats(place + 4 * width, size) if rows == 2 else spare[:size]
            _look(terms[0], row, rows, start, top, left, width, _floats(place, size), second)


def _has_avx512() -> bool:
    """Whether loops are compiled for a CPU with vectors of 512 bits."""
    chosen = any(vars(config).get(name) for name in ("CPU_NAME", "CPU_FEATURES"))  # in place of this one
    return not chosen and bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))


@intrinsic
def _collect_sixteen(context, bits, low, high, found):
    """Put the magnitudes from low to high, all as bits, of sixteen float32 to the head of sixteen places.

    bits, found: addresses. Returns how many these are, and 2**32 times how many are above. It takes AVX-512, by which
    the search of a threshold takes three quarters of the time.
    """

    def generate(context, builder, signature, arguments):
        word, half = ir.IntType(32), ir.IntType(16)
        words, flags = ir.VectorType(word, 16), ir.VectorType(ir.IntType(1), 16)

        def everywhere(value):
            first = builder.insert_element(ir.Constant(words, ir.Undefined), value, ir.Constant(word, 0))
            return builder.shuffle_vector(first, first, ir.Constant(words, [0] * 16))

        def count(mask):
            return builder.zext(builder.ctpop(builder.bitcast(mask, half)), ir.IntType(64))

        source, low, high, place = arguments
        values = builder.load(builder.inttoptr(source, words.as_pointer()), align=4)
        values = builder.and_(values, everywhere(ir.Constant(word, int(_SIGN_OFF))))
        least, most = everywhere(low), everywhere(high)
        above = builder.icmp_unsigned(">", values, most)
        inside = builder.icmp_unsigned("<=", builder.sub(values, least), builder.sub(most, least))
        kind = ir.FunctionType(words, (words, words, flags))
        compress = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.mask.compress.v16i32")
        head = builder.call(compress, (values, ir.Constant(words, [0] * 16), inside))
        builder.store(head, builder.inttoptr(place, words.as_pointer()), align=4)
        return builder.add(count(inside), builder.shl(count(above), ir.Constant(ir.IntType(64), 32)))

    return types.uint64(types.int64, types.uint32, types.uint32, types.int64), generate


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


@compiled((_terms, *_tile, u32[::1], u32[::1], u32[:, ::1], i64[:, ::1]))
def bracket_tile(terms, top, bottom, left, right, lows, widths, found, counts):
    """counts[s] = (how many magnitudes of terms[0] are above lows[s] + widths[s], how many from lows[s] to that).

    The latter go to the head of found[s], which has room for the whole tile and one more. All are bits of float32.
    """
    pair = np.empty((2, CHUNK), np.float32)
    first, places, stride = np.int64(pair.ctypes.data), np.int64(found.ctypes.data), 4 * found.shape[1]
    counts[:] = 0
    for start in range(left, right, CHUNK):
        size = min(CHUNK, right - start)
        x0, x1 = pair[0, :size], pair[1, :size]  # used in every round, so that it lives while its address is used
        for row in range(top, bottom, 2):
            rows = min(2, bottom - row)
            _look(terms[0], row, rows, start, top, left, right - left, x0, x1)
            for r in range(rows):
                for s in range(len(lows)):
                    bits, place = first + 4 * r * CHUNK, places + s * stride
                    above, counts[s, 1] = _collect(bits, size, lows[s], widths[s], place, counts[s, 1])
                    counts[s, 0] += above
