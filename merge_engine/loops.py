"""The innermost loops of the torch backend, compiled for this CPU by Numba where that is installed.

Each gives bit for bit what `tiled` and `rng` compute by torch's and numpy's operators: the same float32 operations in
the same order, no product fused into a sum. One loop goes over a tile where operators go over it a dozen times, and it
runs without Python's interpreter lock, so that threads do not wait for each other between operators.

Tiles are [rows, columns], float32, and contiguous; what is added to is owned by the calling thread.
"""

from typing import Any

import numba
import numpy as np

_F0, _F1 = np.float32(0), np.float32(1)
_SIGN_OFF = np.uint32(0x7FFFFFFF)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_MUL0, _MUL1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WIDE = 16  # quads in a row from which on they are computed side by side; fewer, and rows are
_WEYL0, _WEYL1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


def _kept_on_disk() -> bool:
    """Whether machine code can be kept beside this file or in the user's cache."""
    try:
        numba.njit(cache=True)(_kept_on_disk)
    except RuntimeError:  # no place for it
        return False
    return True


_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
_part = numba.njit(**_OPTIONS)  # of a loop; its machine code is kept with that of its caller


def _compiled(*signatures: Any) -> Any:
    """Compiled when this module is imported, for these types only, and always in this order.

    Numba numbers the files of its cache as they come: in any other order, processes that fill it at once could take
    each other's.
    """
    return numba.njit(list(signatures), cache=_CACHE, **_OPTIONS)


_CACHE = _kept_on_disk()
_flag, _u8, _i64, _u32, _u64, _f32 = numba.boolean, numba.uint8, numba.int64, numba.uint32, numba.uint64, numba.float32
_row32, _tile32, _tiles32 = _f32[::1], _f32[:, ::1], _f32[:, :, ::1]
_trim = (_f32, _f32, _i64, _i64)
_shares = ((_u8, _u8[:, :, ::1]), (_f32, _tiles32))


@numba.njit(inline="always")  # a call would not be vectorised
def _quad(quad, row, stream, adapter, key0, key1):
    a, b, c, d = quad, row, stream, adapter
    for _ in range(10):
        p, q = a * _MUL0, c * _MUL1
        a, b, c, d = (q >> _HALF) ^ b ^ key0, q & _LOW, (p >> _HALF) ^ d ^ key1, p & _LOW
        key0, key1 = (key0 + _WEYL0) & _LOW, (key1 + _WEYL1) & _LOW
    return a, b, c, d


@_part
def _quads_of_row(mask, first, quads, row, stream, adapter, key0, key1, threshold):
    for quad in range(quads):
        a, b, c, d = _quad(np.uint64(first + quad), row, stream, adapter, key0, key1)
        mask[4 * quad] = a < threshold
        mask[4 * quad + 1] = b < threshold
        mask[4 * quad + 2] = c < threshold
        mask[4 * quad + 3] = d < threshold


@_part
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


@_part
def _cut(i, row, column, columns):
    return columns if i < row else column if i == row else 0


@_part
def _add_span(t, limit, weight, total):
    for j in range(len(t)):
        total[j] += (t[j] if abs(t[j]) > limit else _F0) * weight


@_part
def _cast_span(t, limit, ballot, gain, by_sign, votes, plus, minus):
    for j in range(len(t)):
        x = (t[j] if abs(t[j]) > limit else _F0) * ballot
        votes[j] += np.float32(x > _F0) - np.float32(x < _F0) if by_sign else x
        part = x * gain
        plus[j] += part if x > _F0 else _F0
        minus[j] += part if x < _F0 else _F0


@_part
def _count_span(t, limit, ballot, share, plus, minus):
    none = share - share
    for j in range(len(t)):
        x = (t[j] if abs(t[j]) > limit else _F0) * ballot
        plus[j] += share if x > _F0 else none
        minus[j] += share if x < _F0 else none


@_part
def _sum_row(votes, plus, minus, tied_plus, scale, out):
    for j in range(len(votes)):
        yes, no = plus[j], minus[j]  # both are loaded, so that the choice needs no branch
        out[j] = (yes if (votes[j] > _F0) | ((votes[j] == _F0) & tied_plus) else no) * scale


@_part
def _mean_row(votes, plus, minus, for_it, against, tied_plus, scale, out):
    for j in range(len(votes)):
        yes, no, ayes, noes = plus[j], minus[j], np.float32(for_it[j]), np.float32(against[j])
        elects_plus = (votes[j] > _F0) | ((votes[j] == _F0) & tied_plus)
        divisor = ayes if elects_plus else noes
        out[j] = (yes if elects_plus else no) / (divisor if divisor != _F0 else _F1) * scale


@_part
def _vote(t, limit, by_sign, votes, kept):
    for j in range(len(t)):
        x = t[j] if abs(t[j]) > limit else _F0
        kept[j] = x
        votes[j] += np.float32(x > _F0) - np.float32(x < _F0) if by_sign else x


@_part
def _agree(votes, tied_plus, kept, count):
    for j in range(len(kept)):
        x = kept[j]
        elects_plus = (votes[j] > _F0) | ((votes[j] == _F0) & tied_plus)
        agrees = (x > _F0) & elects_plus | (x < _F0) & (not elects_plus)
        kept[j] = x if agrees else _F0
        count[j] += np.float32(agrees)


@_part
def _add(kept, weight, total):
    for j in range(len(kept)):
        total[j] += kept[j] * weight


@_part
def _divide(total, count):
    for j in range(len(total)):
        total[j] /= count[j] if count[j] != _F0 else _F1


@_compiled((_tile32, *_trim, _f32, _tile32))
def add_kept(values, below, above, row, column, weight, total):
    """total += weight * x, where x is what a trim leaves of values.

    It keeps |t| > below before (row, column) of the tile, and |t| > above from there on.
    """
    for i in range(values.shape[0]):
        cut = _cut(i, row, column, values.shape[1])
        _add_span(values[i, :cut], below, weight, total[i, :cut])
        _add_span(values[i, cut:], above, weight, total[i, cut:])


@_compiled(*((_tile32, *_trim, _f32, _f32, _flag, share, _tile32, _tiles32, shares) for share, shares in _shares))
def cast_kept(values, below, above, row, column, ballot, gain, by_sign, share, votes, sums, shares):
    """One adapter's part in an election, x = ballot * what a trim leaves of values (as in `add_kept`).

    votes += x, or its sign; sums[side] += gain * x and shares[side] += share where x is on that side: 0 is +, 1 is -.
    shares is [2, rows, columns], or [2, 0, 0] where nobody counts.
    """
    counts = shares.shape[1] > 0
    for i in range(values.shape[0]):
        cut = _cut(i, row, column, values.shape[1])
        for start, stop, limit in ((0, cut, below), (cut, values.shape[1], above)):
            t = values[i, start:stop]
            vote, plus, minus = votes[i, start:stop], sums[0, i, start:stop], sums[1, i, start:stop]
            _cast_span(t, limit, ballot, gain, by_sign, vote, plus, minus)
            if counts:
                _count_span(t, limit, ballot, share, shares[0, i, start:stop], shares[1, i, start:stop])


@_compiled(*((_tile32, _tiles32, shares, _flag, _f32, _tile32) for _, shares in _shares))
def elected(votes, sums, shares, tied_plus, scale, out):
    """out = scale * the sum of the side that votes elects / its share (1 where that is 0, or where nobody counts)."""
    for i in range(votes.shape[0]):
        if shares.shape[1] > 0:
            _mean_row(votes[i], sums[0, i], sums[1, i], shares[0, i], shares[1, i], tied_plus, scale, out[i])
        else:
            _sum_row(votes[i], sums[0, i], sums[1, i], tied_plus, scale, out[i])


@_compiled((_u32[::1], _u32, _u32, _u32[::1]))
def bracket(bits, low, width, found):
    """(how many magnitudes are above low + width, how many are from low to that); the latter go to the head of found.

    bits: of float32 values, uint32 [n]. found: uint32 [n + 1].
    """
    above, high = np.uint32(0), low + width
    for i in range(len(bits)):
        above += np.uint32((bits[i] & _SIGN_OFF) > high)
    count = np.uint64(0)
    for i in range(len(bits)):  # without a branch, which would be mispredicted too often
        magnitude = bits[i] & _SIGN_OFF
        found[count] = magnitude
        count += np.uint64(np.uint32(magnitude - low) <= width)
    return above, count


@_compiled((_u32[::1], _u32, _u32, _u32, _i64[::1]))
def count_bins(bits, low, width, shift, total):
    """total[(magnitude - low) >> shift] += 1 for every magnitude from low to low + width; bits is uint32 [n]."""
    for i in range(len(bits)):
        place = np.uint32((bits[i] & _SIGN_OFF) - low)
        if place <= width:
            total[place >> shift] += 1


@_compiled((_u32[:, ::1], _u32, _i64[::1]))
def count_equal(bits, magnitude, total):
    """total[i] += how many of row i of bits, uint32 [rows, columns], have that magnitude."""
    for i in range(bits.shape[0]):
        row, equal = bits[i], np.uint32(0)
        for j in range(len(row)):
            equal += np.uint32((row[j] & _SIGN_OFF) == magnitude)
        total[i] += equal


@_compiled((_flag[:, ::1], _i64, _i64, _u64, _u64, _u64, _u64, _u64))
def keep_mask(mask, top, left, stream, adapter, key0, key1, threshold):
    """mask[i, j] = u32(top + i, left + j) < threshold: see `rng.keep_mask`. stream to threshold are uint64."""
    columns = mask.shape[1]
    head = min(-left % 4, columns)  # up to the first whole quad
    tail = (columns - head) % 4
    first, quads = (left + head) // 4, (columns - head) // 4
    for i in range(mask.shape[0]):
        row = np.uint64(top + i)
        if head:
            words = _quad(np.uint64(left // 4), row, stream, adapter, key0, key1)
            for j in range(head):
                mask[i, j] = words[left % 4 + j] < threshold
        if quads >= _WIDE:
            _quads_of_row(mask[i, head:], first, quads, row, stream, adapter, key0, key1, threshold)
        if tail:
            words = _quad(np.uint64(first + quads), row, stream, adapter, key0, key1)
            for j in range(tail):
                mask[i, columns - tail + j] = words[j] < threshold
    if quads < _WIDE:
        for quad in range(quads):
            part = mask[:, head + 4 * quad : head + 4 * quad + 4]
            _quads_of_column(part, top, np.uint64(first + quad), stream, adapter, key0, key1, threshold)


@_compiled(
    (_tiles32, _row32, _row32, _i64[::1], _i64[::1], _flag, _flag, _flag, _flag, _tile32, _tiles32),
)
def merge_weighted(values, below, above, row, column, elects, by_sign, tied_plus, counts, weights, out):
    """out[s] = sum_i weights[s, i] x_i over what agrees with the vote of all x, and over its count.

    values: [n, rows, columns]; x_i is what a trim leaves of values[i], by its limits as in `loops.add_kept`, one of
    each an adapter. weights: [s, n]. out: [s, rows, columns]. elects: whether there is a vote at all; by_sign,
    tied_plus, counts: by what, who wins a tie, and whether the sum is divided by how many agree.
    """
    n, columns = values.shape[0], values.shape[2]
    kept, votes, count = (
        np.empty((n, columns), np.float32),
        np.empty(columns, np.float32),
        np.empty(columns, np.float32),
    )
    for i in range(values.shape[1]):
        votes[:] = _F0
        count[:] = _F0
        for k in range(n):
            cut = _cut(i, row[k], column[k], columns)
            for start, stop, limit in ((0, cut, below[k]), (cut, columns, above[k])):
                _vote(values[k, i, start:stop], limit, by_sign, votes[start:stop], kept[k, start:stop])
        if elects:
            for k in range(n):
                _agree(votes, tied_plus, kept[k], count)
        for s in range(weights.shape[0]):
            total = out[s, i]
            total[:] = _F0
            for k in range(n):
                _add(kept[k], weights[s, k], total)
            if counts:
                _divide(total, count)
