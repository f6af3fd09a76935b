"""Philox4x32-10 on the host: the random bits of drop-and-rescale (DARE).

``keep element e  iff  u32(e) < round(density * 2**32)``, where ``u32(e)`` is word ``column & 3`` of
``philox(counter=(column >> 2, row, stream, adapter), key=(seed low, seed high))``.
A task tensor is seen as [rows, columns]: the last dimension is columns, a vector is one row. So a mask depends on
nothing else: not on tile, batch, order, device or thread.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Random123).
"""

import functools
import operator
import threading
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from merge_engine import jit

Words = npt.NDArray[np.uint32]
_Wide = npt.NDArray[np.uint64]  # 32-bit words held in 64 bits, so that a product keeps its high half
_Key = tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]

_ROUNDS = 10
_WEYL = (0x9E3779B9, 0xBB67AE85)
# Arrays without dimensions, since numpy takes them faster than scalars.
_MUL0 = np.array(0xD2511F53, dtype=np.uint64)
_MUL1 = np.array(0xCD9E8D57, dtype=np.uint64)
_LOW = np.array(0xFFFFFFFF, dtype=np.uint64)
_HALF = np.array(32, dtype=np.uint64)

# Quads (four columns of one row) computed at once, with 48 bytes of scratch each: 768 KiB stay in a 1 MiB L2. Smaller
# chunks pay for numpy's calls: a tile of 64 x 2048 on one Zen 4 thread takes 12.4 ns an element in chunks of 1024, 5.9
# in 4096, 4.7 in 8192 and 4.1 in 16384.
_CHUNK_QUADS = 16384


def stream_id(module: str, side: str) -> int:
    """crc32(f"{module}.{side}"): the counter word that tells one task tensor from another.

    ``side`` is ``"delta"``, ``"A"`` or ``"B"``; another one raises ValueError.
    """
    if side not in ("delta", "A", "B"):
        raise ValueError(f"side is {side!r}, wanted 'delta', 'A' or 'B'")
    return zlib.crc32(f"{module}.{side}".encode())


def keep_threshold(density: float) -> int:
    """round(density * 2**32): a word below it is kept; 2**32 keeps every word, 0 (density <= 2**-33) none.

    The product is exact in float64 (a power of two) and ties round to even. A density outside (0, 1] raises ValueError.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density!r}, wanted 0 < density <= 1")
    return round(density * 2**32)


def philox(counter: Sequence[npt.ArrayLike], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10(counter, key): four random words for each counter.

    ``counter`` holds four words, arrays of integers in [0, 2**32) that broadcast together; ``key`` two integers in
    that range. Returns four uint32 arrays of the broadcast shape. A word out of range raises ValueError.
    """
    if len(counter) != 4 or len(key) != 2:
        raise ValueError(f"got {len(counter)} counter and {len(key)} key words, wanted 4 and 2")
    c = [_as_words(f"counter[{i}]", word) for i, word in enumerate(counter)]
    k = [int(_as_words(f"key[{i}]", word)) for i, word in enumerate(key)]
    for k0, k1 in _round_keys(k[0], k[1]):
        p0, p1 = c[0] * _MUL0, c[2] * _MUL1
        c = [(p1 >> _HALF) ^ c[1] ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c[3] ^ k1, p0 & _LOW]
    c0, c1, c2, c3 = (word.astype(np.uint32) for word in np.broadcast_arrays(*c))
    return c0, c1, c2, c3


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
    if loops := jit.loops():
        whole = out if out.is_contiguous() else torch.empty(shape, dtype=torch.bool)
        arguments = [np.uint64(word) for word in (stream, adapter, seed & 0xFFFFFFFF, seed >> 32, threshold)]
        loops.keep_mask(whole.numpy(), row0, col0, *arguments)
        return out if whole is out else out.copy_(whole)
    mask, limit = out.numpy(), np.uint32(threshold)
    keys = _round_keys(seed & 0xFFFFFFFF, seed >> 32)

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


class _Strip:
    """The random words of some quads in any rows, with all that the column alone decides done once.

    The counter of a quad is (quad, row, stream, adapter). Followed through the rounds, its first product depends on
    the quad only, its second on nothing, and so on: the first word that depends on both is made in round 2.
    """

    def __init__(self, quads: range, stream: int, adapter: int, keys: Sequence[_Key]):
        self._keys = keys
        (k0, k1), (l0, l1), (m0, m1) = keys[:3]
        p0 = np.arange(quads.start, quads.stop, dtype=np.uint64) * _MUL0
        p1 = np.array(stream, dtype=np.uint64) * _MUL1
        self._row_xor = (p1 >> _HALF) ^ k0
        self._c2_in_round2 = (p0 & _LOW) ^ l1
        p1_in_round2 = ((p0 >> _HALF) ^ np.uint64(adapter) ^ k1) * _MUL1
        p0_in_round3 = ((p1_in_round2 >> _HALF) ^ (p1 & _LOW) ^ l0) * _MUL0
        self._c0_in_round3 = (p1_in_round2 & _LOW) ^ m0
        self._c2_in_round3 = (p0_in_round3 >> _HALF) ^ m1
        self._c3_in_round3 = p0_in_round3 & _LOW

    def words(self, top: int, bottom: int) -> Words:
        """uint32 [bottom - top, 4 * quads], in the calling thread's scratch: the next call overwrites it."""
        shape = (bottom - top, len(self._c3_in_round3))
        size = shape[0] * shape[1]
        scratch = _scratch()
        c0, c1, c2, c3, t = (scratch[i * size : (i + 1) * size] for i in range(5))

        p0 = (np.arange(top, bottom, dtype=np.uint64)[:, None] ^ self._row_xor) * _MUL0
        np.bitwise_xor(self._c2_in_round2, p0 >> _HALF, out=c2.reshape(shape))
        np.multiply(c2, _MUL1, out=c2)
        np.bitwise_and(c2, _LOW, out=c1)
        np.right_shift(c2, _HALF, out=c2)
        np.bitwise_xor(c2.reshape(shape), self._c0_in_round3, out=c0.reshape(shape))
        np.bitwise_xor(self._c2_in_round3, p0 & _LOW, out=c2.reshape(shape))
        np.copyto(c3.reshape(shape), self._c3_in_round3)

        for key in self._keys[3:-1]:
            _half_round(c0, c1, c2, c3, t, key)
            np.bitwise_and(c0, _LOW, out=c0)
            np.bitwise_and(c2, _LOW, out=c2)
            c0, c1, c2, c3 = c1, c2, c3, c0

        # The last round's low halves move up instead of being masked: lanes (0, 1) and (2, 3) then fill 64 bits each
        # (little-endian), and once interleaved they lie in the order of the columns.
        _half_round(c0, c1, c2, c3, t, self._keys[-1])
        np.left_shift(c2, _HALF, out=c2)
        np.left_shift(c0, _HALF, out=c0)
        lanes = scratch[4 * size : 6 * size].reshape(size, 2)
        np.bitwise_or(c1, c2, out=lanes[:, 0])
        np.bitwise_or(c3, c0, out=lanes[:, 1])
        return lanes.view(np.uint32).reshape(shape[0], -1)


def _half_round(c0: _Wide, c1: _Wide, c2: _Wide, c3: _Wide, t: _Wide, key: _Key) -> None:
    """One round in place, short of its end: the new words (0, 1, 2, 3) are c1, the low half of c2, c3, of c0."""
    np.multiply(c0, _MUL0, out=c0)
    np.multiply(c2, _MUL1, out=c2)
    np.right_shift(c2, _HALF, out=t)
    np.bitwise_xor(c1, t, out=c1)
    np.bitwise_xor(c1, key[0], out=c1)
    np.right_shift(c0, _HALF, out=t)
    np.bitwise_xor(c3, t, out=c3)
    np.bitwise_xor(c3, key[1], out=c3)


_thread = threading.local()


def _scratch() -> _Wide:
    try:
        scratch: _Wide = _thread.scratch
    except AttributeError:
        scratch = _thread.scratch = np.empty(6 * _CHUNK_QUADS, dtype=np.uint64)
    return scratch


@functools.lru_cache(maxsize=64)
def _round_keys(k0: int, k1: int) -> tuple[_Key, ...]:
    low = 0xFFFFFFFF
    return tuple(
        (np.array((k0 + i * _WEYL[0]) & low, dtype=np.uint64), np.array((k1 + i * _WEYL[1]) & low, dtype=np.uint64))
        for i in range(_ROUNDS)
    )


def _as_words(name: str, value: npt.ArrayLike) -> _Wide:
    array = np.asarray(value)
    if array.dtype.kind not in "iu" or (array.size and not 0 <= int(array.min()) <= int(array.max()) < 2**32):
        raise ValueError(f"{name} is {value!r}, wanted integers in [0, 2**32)")
    return array.astype(np.uint64)


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
