"""The loops of `lowrank.products`: passes over a large matrix, whose sums are in any order, as a BLAS's are."""

from typing import Any

import numba
import numpy as np

from merge_engine.loops.build import F0, OPTIONS, compiled, f32, f64, wide

_FUSED: dict[str, Any] = {**OPTIONS, "fastmath": {"reassoc", "contract", "nsz"}}  # sums in any order, in lanes
DOTS, SUMS = 6, 8  # rows of a matrix that are multiplied at a time by four vectors: sums stay in registers
_LONG = 1024  # columns that are multiplied at a time: those of six rows stay in the L1 cache for all vectors
_PART = 256  # rows whose products are summed in float32


@numba.njit(**_FUSED)
def _sum_of_squares(values):
    total = 0.0
    for j in range(len(values)):
        total += np.float64(values[j]) * np.float64(values[j])
    return total


@compiled((f32[::1],))
def squared_norm(values):
    """The sum of squares in float64, in parts of 4096."""
    total = 0.0
    for start in range(0, len(values), 4096):
        total += _sum_of_squares(values[start : start + 4096])
    return total


@numba.njit(**_FUSED)
def _add_six(out, x0, x1, x2, x3, x4, x5):
    out[0] += x0
    out[1] += x1
    out[2] += x2
    out[3] += x3
    out[4] += x4
    out[5] += x5


@numba.njit(**_FUSED)
def _six_by_four(d, v, left, right, out):
    """out[c, r] += d[r, left:right] . v[c, left:right] of six rows and four vectors."""
    wide()
    d0, d1, d2 = d[0, left:right], d[1, left:right], d[2, left:right]
    d3, d4, d5 = d[3, left:right], d[4, left:right], d[5, left:right]
    v0, v1, v2, v3 = v[0, left:right], v[1, left:right], v[2, left:right], v[3, left:right]
    a0 = a1 = a2 = a3 = a4 = a5 = F0
    b0 = b1 = b2 = b3 = b4 = b5 = F0
    c0 = c1 = c2 = c3 = c4 = c5 = F0
    e0 = e1 = e2 = e3 = e4 = e5 = F0
    for j in range(right - left):
        x0, x1, x2, x3, x4, x5 = d0[j], d1[j], d2[j], d3[j], d4[j], d5[j]
        a, b, c, e = v0[j], v1[j], v2[j], v3[j]
        a0, a1, a2, a3, a4, a5 = a0 + x0 * a, a1 + x1 * a, a2 + x2 * a, a3 + x3 * a, a4 + x4 * a, a5 + x5 * a
        b0, b1, b2, b3, b4, b5 = b0 + x0 * b, b1 + x1 * b, b2 + x2 * b, b3 + x3 * b, b4 + x4 * b, b5 + x5 * b
        c0, c1, c2, c3, c4, c5 = c0 + x0 * c, c1 + x1 * c, c2 + x2 * c, c3 + x3 * c, c4 + x4 * c, c5 + x5 * c
        e0, e1, e2, e3, e4, e5 = e0 + x0 * e, e1 + x1 * e, e2 + x2 * e, e3 + x3 * e, e4 + x4 * e, e5 + x5 * e
    _add_six(out[0], a0, a1, a2, a3, a4, a5)
    _add_six(out[1], b0, b1, b2, b3, b4, b5)
    _add_six(out[2], c0, c1, c2, c3, c4, c5)
    _add_six(out[3], e0, e1, e2, e3, e4, e5)


@compiled((f32[:, ::1], f32[:, ::1], f64[:, ::1]))
def times_rows(vectors, matrix, out):
    """out = vectors @ matrix.T: [4 n, N] by [M, N], M at least 6."""
    for row in range(0, len(matrix), DOTS):
        top = min(row, len(matrix) - DOTS)
        rows, sums = matrix[top : top + DOTS], out[:, top : top + DOTS]
        sums[:] = 0
        for left in range(0, matrix.shape[1], _LONG):
            right = min(left + _LONG, matrix.shape[1])
            for c in range(0, len(vectors), 4):
                _six_by_four(rows, vectors[c : c + 4], left, right, sums[c : c + 4])


@numba.njit(**_FUSED)
def _add_eight_to_four(d, u, out, left, right):
    """out[c, left:right] += sum_r u[c, r] d[r, left:right] of eight rows and four vectors."""
    wide()
    d0, d1, d2, d3 = d[0, left:right], d[1, left:right], d[2, left:right], d[3, left:right]
    d4, d5, d6, d7 = d[4, left:right], d[5, left:right], d[6, left:right], d[7, left:right]
    o0, o1, o2, o3 = out[0, left:right], out[1, left:right], out[2, left:right], out[3, left:right]
    a0, a1, a2, a3, a4, a5, a6, a7 = u[0, 0], u[0, 1], u[0, 2], u[0, 3], u[0, 4], u[0, 5], u[0, 6], u[0, 7]
    b0, b1, b2, b3, b4, b5, b6, b7 = u[1, 0], u[1, 1], u[1, 2], u[1, 3], u[1, 4], u[1, 5], u[1, 6], u[1, 7]
    c0, c1, c2, c3, c4, c5, c6, c7 = u[2, 0], u[2, 1], u[2, 2], u[2, 3], u[2, 4], u[2, 5], u[2, 6], u[2, 7]
    e0, e1, e2, e3, e4, e5, e6, e7 = u[3, 0], u[3, 1], u[3, 2], u[3, 3], u[3, 4], u[3, 5], u[3, 6], u[3, 7]
    for j in range(right - left):
        x0, x1, x2, x3, x4, x5, x6, x7 = d0[j], d1[j], d2[j], d3[j], d4[j], d5[j], d6[j], d7[j]
        o0[j] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3 + a4 * x4 + a5 * x5 + a6 * x6 + a7 * x7
        o1[j] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3 + b4 * x4 + b5 * x5 + b6 * x6 + b7 * x7
        o2[j] += c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3 + c4 * x4 + c5 * x5 + c6 * x6 + c7 * x7
        o3[j] += e0 * x0 + e1 * x1 + e2 * x2 + e3 * x3 + e4 * x4 + e5 * x5 + e6 * x6 + e7 * x7


@compiled((f32[:, ::1], f32[:, ::1], f32[:, ::1], f64[:, ::1]))
def times_columns(vectors, matrix, part, out):
    """out = vectors @ matrix: [4 n, 8 m] by [8 m, N]; part: scratch like out."""
    out[:] = 0
    width = max(1024, (1 << 17) // len(vectors))  # of columns whose sums stay in a L2 cache
    for start in range(0, len(matrix), _PART):
        part[:] = F0
        end = min(start + _PART, len(matrix))
        for left in range(0, matrix.shape[1], width):
            right = min(left + width, matrix.shape[1])
            for row in range(start, end, SUMS):
                rows = matrix[row : row + SUMS]
                for c in range(0, len(vectors), 4):
                    _add_eight_to_four(rows, vectors[c : c + 4, row : row + SUMS], part[c : c + 4], left, right)
        out += part
