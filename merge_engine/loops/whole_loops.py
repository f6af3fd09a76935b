"""The loops of whole tensors: differences of bfloat16 models, and what SCE makes of them.

The same float32 operations in the same order as the operators in `whole_tensors.stock`, a chunk at a time.
"""

import numba
import numpy as np

from merge_engine.loops.build import F0, F1, OPTIONS, compiled, f32, part, u16, wide

_CHUNK = 1024  # elements of each model: they stay in an L1 cache


@compiled((u16[::1], f32[::1], f32[::1]))
def subtract(x, base, out):
    """out = x - base, x the bits of bfloat16."""
    wide()
    bits = out.view(np.uint32)
    for j in range(len(out)):
        bits[j] = np.uint32(x[j]) << np.uint32(16)
    for j in range(len(out)):
        out[j] -= base[j]


@numba.njit(**OPTIONS, fastmath={"contract"})  # one rounding where the CPU has it, as torch's addcmul
def _add_squares(x, mean, total):
    wide()
    for j in range(len(total)):
        apart = x[j] - mean[j]
        total[j] += apart * apart


@part
def _add(x, total):
    wide()
    for j in range(len(total)):
        total[j] += x[j]


@part
def _divide(total, divisor):
    wide()
    for j in range(len(total)):
        total[j] /= divisor


@compiled((f32[:, ::1], f32[::1]))
def variances(found, out):
    """out = the variance over the first dimension of found [n, size]. Returns how many are not 0."""
    count, mean, varying = np.float32(len(found)), np.empty(_CHUNK, np.float32), 0
    for start in range(0, len(out), _CHUNK):
        end = min(start + _CHUNK, len(out))
        own, total = mean[: end - start], out[start:end]
        own[:] = found[0, start:end]
        for i in range(1, len(found)):
            _add(found[i, start:end], own)
        _divide(own, count)
        total[:] = F0
        for i in range(len(found)):
            _add_squares(found[i, start:end], own, total)
        _divide(total, count)
        for j in range(len(total)):
            varying += np.int64(total[j] != F0)
    return varying


@part
def _select(x, chosen):
    wide()
    for j in range(len(x)):
        x[j] *= F1 if chosen[j] > F0 else F0


@compiled((f32[:, ::1], f32[::1]))
def select(found, chosen):
    """found[i] = found[i] where chosen > 0, else 0."""
    for start in range(0, len(chosen), _CHUNK):
        for i in range(len(found)):
            _select(found[i, start : start + _CHUNK], chosen[start : start + _CHUNK])


@part
def _add_agreeing(x, elected, weight, total, share):
    wide()
    for j in range(len(total)):
        agrees = (x[j] if elected[j] >= F0 else -x[j]) > F0
        total[j] += x[j] * weight if agrees else F0
        share[j] += weight if agrees else F0


@part
def _mean(total, share, floor, out):
    wide()
    for j in range(len(out)):
        divisor = max(share[j], floor)
        out[j] += total[j] / (F1 if divisor == F0 else divisor)


@compiled((f32[:, ::1], f32[::1], f32, f32[::1]))
def add_agreeing(found, weights, floor, out):
    """out += sum_i w_i x_i / sum_i w_i over the x_i = found[i] with the sign of their sum, + for 0.

    The divisor is floor at least, and 1 in place of 0.
    """
    room = np.empty((3, _CHUNK), np.float32)
    for start in range(0, len(out), _CHUNK):
        end = min(start + _CHUNK, len(out))
        room[:] = F0
        elected, total, share = room[0, : end - start], room[1, : end - start], room[2, : end - start]
        for i in range(len(found)):
            _add(found[i, start:end], elected)
        for i in range(len(found)):
            _add_agreeing(found[i, start:end], elected, weights[i], total, share)
        _mean(total, share, floor, out[start:end])
