"""The loop of DELLA: what stays of each row, by the ranks of its magnitudes."""

import numpy as np

from merge_engine.loops.build import F0, compiled, f32, flag, i64, part, u32, u64, wide

DIGITS, RADIX = 4, 256  # a magnitude is four digits of eight bits
_BINS, _SHIFT = 512, np.uint32(17)  # of eight octaves, 64 bins each; what is smaller is in the first
_MOST = 64  # elements of a row that are counted one by one; where there are more, the row is sorted


@part
def _sort_row(bits, keys, counts):
    """Sort keys = bits << 32 | column of a row, digit by digit; of equal ones the first stays first.

    keys: [2, columns], scratch. Returns which of the two holds the result.
    """
    counts[:] = 0
    for j in range(len(bits)):
        magnitude = bits[j]
        keys[0, j] = np.uint64(magnitude) << np.uint64(32) | np.uint64(j)
        for digit in range(DIGITS):
            counts[digit, (magnitude >> np.uint32(8 * digit)) & np.uint32(RADIX - 1)] += 1
    side = 0
    for digit in range(DIGITS):
        shift, found = np.uint64(32 + 8 * digit), counts[digit]
        if found[(keys[side, 0] >> shift) & np.uint64(RADIX - 1)] == len(bits):
            continue  # all have this digit
        start = 0
        for value in range(RADIX):
            count = found[value]
            found[value] = start
            start += count
        source, target = keys[side], keys[1 - side]
        for j in range(len(bits)):
            value = (source[j] >> shift) & np.uint64(RADIX - 1)
            target[found[value]] = source[j]
            found[value] += 1
        side = 1 - side
    return side


@part
def _rank(bits, column):
    """How many elements of a row come before that of a column."""
    wide()
    magnitude, before = bits[column], np.uint32(0)
    for j in range(column):
        before += np.uint32(bits[j] <= magnitude)
    for j in range(column + 1, len(bits)):
        before += np.uint32(bits[j] < magnitude)
    return np.int64(before)


@part
def _keep_by_bins(bits, words, limits, kept, counts, least, most):
    """kept = words < limits[rank] of a row; returns False where too many elements need their rank itself.

    Ranks are between those at both ends of the element's bin: few words are between the limits there. counts, least,
    most: [_BINS], scratch.
    """
    largest = np.uint32(0)
    for j in range(len(bits)):
        largest = max(largest, bits[j])
    low = largest - min(largest, np.uint32(_BINS << 17) - np.uint32(1))
    counts[:] = 0
    for j in range(len(bits)):
        counts[(max(bits[j], low) - low) >> _SHIFT] += 1
    start = 0
    for i in range(_BINS):
        if counts[i]:
            end = start + counts[i]
            least[i], most[i] = min(limits[start], limits[end - 1]), max(limits[start], limits[end - 1])
            start = end
    open_places, left = np.empty(_MOST, np.int64), 0
    for j in range(len(bits)):
        place, word = (max(bits[j], low) - low) >> _SHIFT, np.uint64(words[j])
        kept[j] = word < least[place]
        if (word >= least[place]) & (word < most[place]):
            if left == _MOST:
                return False
            open_places[left] = j
            left += 1
    for i in range(left):
        column = open_places[i]
        kept[column] = np.uint64(words[column]) < limits[_rank(bits, column)]
    for j in range(len(bits)):
        bits[j] *= np.uint32(kept[j])
    return True


@compiled((u32[:, ::1], u32[:, ::1], u64[::1], f32[::1], flag[:, ::1], f32[:, ::1], u64[:, ::1], i64[:, ::1]))
def keep_by_rank(bits, words, limits, gains, kept, factors, keys, counts):
    """kept = words < limits[rank] [rows, columns], the rank of |x| in its row from below; bits: of |x|, a float32.

    bits become 0 where nothing is kept.

    factors: gains[rank] where kept, else 0; nothing is written to factors of no rows. keys: [2, columns] and counts:
    [DIGITS, RADIX], scratch. Of equal magnitudes the first has the lower rank.
    """
    bins, least, most = np.empty(_BINS, np.int64), np.empty(_BINS, np.uint64), np.empty(_BINS, np.uint64)
    for row in range(len(bits)):
        if not len(factors) and _keep_by_bins(bits[row], words[row], limits, kept[row], bins, least, most):
            continue
        order = keys[_sort_row(bits[row], keys, counts)]
        for rank in range(len(order)):
            column = order[rank] & np.uint64(0xFFFFFFFF)
            stays = np.uint64(words[row, column]) < limits[rank]
            kept[row, column] = stays
            if not stays:
                bits[row, column] = 0
            if len(factors):
                factors[row, column] = gains[rank] if stays else F0
