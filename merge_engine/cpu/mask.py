"""Masks of random drops on the CPU, by a compiled loop or by numpy; the words are those of `rules.philox`."""

import operator
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from merge_engine.loops import door
from merge_engine.rules.philox import HALF, LOW, MUL0, MUL1, Key, Wide, Words, keep_threshold, round_keys

# Quads (four columns of one row) computed at once, with 48 bytes of scratch each: 768 KiB stay in a 1 MiB L2. Smaller
# chunks pay for numpy's calls: a tile of 64 x 2048 on one Zen 4 thread takes 12.4 ns an element in chunks of 1024, 5.9
# in 4096, 4.7 in 8192 and 4.1 in 16384.
_CHUNK_QUADS = 16384


def keep_mask(
    density: float,
    *,
    seed: int,
    stream: int,
    adapter: int,
    rows: range | slice,
    columns: range | slice,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """out[i, j] = u32(rows.start + i, columns.start + j) < round(density * 2**32), a tile of the mask.

    ``seed`` is in [0, 2**64); ``stream`` (from `stream_id`) and ``adapter`` in [0, 2**32). ``rows`` and ``columns``
    are the tile's place in the whole tensor, with ends up to 2**32 and step 1. ``out`` is a bool tensor
    [len(rows), len(columns)] on the CPU, of any strides, or None for a new one; it is returned. Whatever is out of
    range raises ValueError. Threads may call this at once: each has a scratch of its own, made at its first call.
    """
    threshold = keep_threshold(density)
    seed = _in_range("seed", seed, 2**64)
    stream = _in_range("stream", stream, 2**32)
    adapter = _in_range("adapter", adapter, 2**32)
    row0, row1 = _span("rows", rows)
    col0, col1 = _span("columns", columns)
    shape = (row1 - row0, col1 - col0)
    if out is None:
        out = torch.empty(shape, dtype=torch.bool)
    elif out.shape != shape or out.dtype != torch.bool or out.device.type != "cpu":
        raise ValueError(f"out is {list(out.shape)} {out.dtype} on {out.device}, wanted {list(shape)} bool on the CPU")
    if threshold == 2**32:
        return out.fill_(True)
    if loops := door.loops(shape[0] * shape[1]):
        whole = out if out.is_contiguous() else torch.empty(shape, dtype=torch.bool)
        arguments = [np.uint64(word) for word in (stream, adapter, seed & 0xFFFFFFFF, seed >> 32, threshold)]
        loops.keep_mask(whole.numpy(), row0, col0, *arguments)
        return out if whole is out else out.copy_(whole)
    mask, limit = out.numpy(), np.uint32(threshold)
    keys = round_keys(seed & 0xFFFFFFFF, seed >> 32)

    quad_end = (col1 + 3) >> 2
    for quad0 in range(col0 >> 2, quad_end, _CHUNK_QUADS):
        quads = range(quad0, min(quad0 + _CHUNK_QUADS, quad_end))
        strip = _Strip(quads, stream, adapter, keys)
        left, right = max(col0, 4 * quads.start), min(col1, 4 * quads.stop)
        step = _CHUNK_QUADS // len(quads)
        for top in range(row0, row1, step):
            bottom = min(top + step, row1)
            words = strip.words(top, bottom)[:, left - 4 * quad0 : right - 4 * quad0]
            np.less(words, limit, out=mask[top - row0 : bottom - row0, left - col0 : right - col0])
    return out


def random_words(*, seed: int, stream: int, adapter: int, rows: slice, columns: slice) -> Words:
    """uint32 [rows, columns]: the words themselves that `keep_mask` compares, a tile of them. Arguments as there."""
    seed = _in_range("seed", seed, 2**64)
    stream, adapter = _in_range("stream", stream, 2**32), _in_range("adapter", adapter, 2**32)
    (row0, row1), (col0, col1) = _span("rows", rows), _span("columns", columns)
    quad_end = (col1 + 3) >> 2
    if loops := door.loops((row1 - row0) * (col1 - col0)):
        first = col0 >> 2
        whole = np.empty((row1 - row0, 4 * (quad_end - first)), np.uint32)
        arguments = [np.uint64(word) for word in (stream, adapter, seed & 0xFFFFFFFF, seed >> 32)]
        loops.random_words(whole, row0, first, *arguments)
        return np.ascontiguousarray(whole[:, col0 - 4 * first : col1 - 4 * first])
    keys = round_keys(seed & 0xFFFFFFFF, seed >> 32)
    out = np.empty((row1 - row0, col1 - col0), np.uint32)
    for quad0 in range(col0 >> 2, quad_end, _CHUNK_QUADS):
        quads = range(quad0, min(quad0 + _CHUNK_QUADS, quad_end))
        strip, step = _Strip(quads, stream, adapter, keys), _CHUNK_QUADS // len(quads)
        left, right = max(col0, 4 * quads.start), min(col1, 4 * quads.stop)
        for top in range(row0, row1, step):
            bottom = min(top + step, row1)
            words = strip.words(top, bottom)[:, left - 4 * quad0 : right - 4 * quad0]
            out[top - row0 : bottom - row0, left - col0 : right - col0] = words
    return out


class _Strip:
    """The random words of some quads in any rows, with all that the column alone decides done once.

    The counter of a quad is (quad, row, stream, adapter). Followed through the rounds, its first product depends on
    the quad only, its second on nothing, and so on: the first word that depends on both is made in round 2.
    """

    def __init__(self, quads: range, stream: int, adapter: int, keys: Sequence[Key]):
        self._keys = keys
        (k0, k1), (l0, l1), (m0, m1) = keys[:3]
        p0 = np.arange(quads.start, quads.stop, dtype=np.uint64) * MUL0
        p1 = np.array(stream, dtype=np.uint64) * MUL1
        self._row_xor = (p1 >> HALF) ^ k0
        self._c2_in_round2 = (p0 & LOW) ^ l1
        p1_in_round2 = ((p0 >> HALF) ^ np.uint64(adapter) ^ k1) * MUL1
        p0_in_round3 = ((p1_in_round2 >> HALF) ^ (p1 & LOW) ^ l0) * MUL0
        self._c0_in_round3 = (p1_in_round2 & LOW) ^ m0
        self._c2_in_round3 = (p0_in_round3 >> HALF) ^ m1
        self._c3_in_round3 = p0_in_round3 & LOW

    def words(self, top: int, bottom: int) -> Words:
        """uint32 [bottom - top, 4 * quads], in the calling thread's scratch: the next call overwrites it."""
        shape = (bottom - top, len(self._c3_in_round3))
        size = shape[0] * shape[1]
        scratch = _scratch()
        c0, c1, c2, c3, t = (scratch[i * size : (i + 1) * size] for i in range(5))

        p0 = (np.arange(top, bottom, dtype=np.uint64)[:, None] ^ self._row_xor) * MUL0
        np.bitwise_xor(self._c2_in_round2, p0 >> HALF, out=c2.reshape(shape))
        np.multiply(c2, MUL1, out=c2)
        np.bitwise_and(c2, LOW, out=c1)
        np.right_shift(c2, HALF, out=c2)
        np.bitwise_xor(c2.reshape(shape), self._c0_in_round3, out=c0.reshape(shape))
        np.bitwise_xor(self._c2_in_round3, p0 & LOW, out=c2.reshape(shape))
        np.copyto(c3.reshape(shape), self._c3_in_round3)

        for key in self._keys[3:-1]:
            _half_round(c0, c1, c2, c3, t, key)
            np.bitwise_and(c0, LOW, out=c0)
            np.bitwise_and(c2, LOW, out=c2)
            c0, c1, c2, c3 = c1, c2, c3, c0

        # The last round's low halves move up instead of being masked: lanes (0, 1) and (2, 3) then fill 64 bits each
        # (little-endian), and once interleaved they lie in the order of the columns.
        _half_round(c0, c1, c2, c3, t, self._keys[-1])
        np.left_shift(c2, HALF, out=c2)
        np.left_shift(c0, HALF, out=c0)
        lanes = scratch[4 * size : 6 * size].reshape(size, 2)
        np.bitwise_or(c1, c2, out=lanes[:, 0])
        np.bitwise_or(c3, c0, out=lanes[:, 1])
        return lanes.view(np.uint32).reshape(shape[0], -1)


def _half_round(c0: Wide, c1: Wide, c2: Wide, c3: Wide, t: Wide, key: Key) -> None:
    """One round in place, short of its end: the new words (0, 1, 2, 3) are c1, the low half of c2, c3, of c0."""
    np.multiply(c0, MUL0, out=c0)
    np.multiply(c2, MUL1, out=c2)
    np.right_shift(c2, HALF, out=t)
    np.bitwise_xor(c1, t, out=c1)
    np.bitwise_xor(c1, key[0], out=c1)
    np.right_shift(c0, HALF, out=t)
    np.bitwise_xor(c3, t, out=c3)
    np.bitwise_xor(c3, key[1], out=c3)


_thread = threading.local()


def _scratch() -> Wide:
    try:
        scratch: Wide = _thread.scratch
    except AttributeError:
        scratch = _thread.scratch = np.empty(6 * _CHUNK_QUADS, dtype=np.uint64)
    return scratch


def _in_range(name: str, value: Any, end: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}, wanted an integer") from None
    if not 0 <= number < end:
        raise ValueError(f"{name} is {number}, wanted 0 <= {name} < 2**{end.bit_length() - 1}")
    return number


def _span(name: str, span: range | slice) -> tuple[int, int]:
    start, stop = span.start or 0, span.stop
    if span.step not in (None, 1) or stop is None or not 0 <= start <= stop <= 2**32:
        raise ValueError(f"{name} is {span}, wanted start <= stop in [0, 2**32] and step 1")
    return start, stop
