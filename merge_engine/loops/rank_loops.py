"""The loop of DELLA: what stays of each row, by the ranks of its magnitudes."""

import numpy as np

from merge_engine.loops.build import F0, compiled, f32, flag, i64, part, u32, u64

DIGITS, RADIX = 4, 256  # a magnitude is four digits of eight bits


@part
def _sort_row(bits, keys, counts):
    """Sort keys = magnitude << 32 | column of a row, digit by digit; of equal magnitudes the first stays first.

    keys: [2, columns], scratch. Returns which of the two holds the result.
    """
    counts[:] = 0
    for j in range(len(bits)):
        magnitude = bits[j] & np.uint32(0x7FFFFFFF)
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


@compiled((u32[:, ::1], u32[:, ::1], u64[::1], f32[::1], flag[:, ::1], f32[:, ::1], u64[:, ::1], i64[:, ::1]))
def keep_by_rank(bits, words, limits, gains, kept, factors, keys, counts):
    """kept = words < limits[rank] [rows, columns], the rank of |x| in its row from below; bits: of x, a float32.

    factors: gains[rank] where kept, else 0; nothing is written to factors of no rows. keys: [2, columns] and counts:
    [DIGITS, RADIX], scratch. Of equal magnitudes the first has the lower rank.
    """
    for row in range(len(bits)):
        order = keys[_sort_row(bits[row], keys, counts)]
        for rank in range(len(order)):
            column = order[rank] & np.uint64(0xFFFFFFFF)
            stays = np.uint64(words[row, column]) < limits[rank]
            kept[row, column] = stays
            if len(factors):
                factors[row, column] = gains[rank] if stays else F0
