"""Philox4x32-10 on the host: the random bits of drop-and-rescale (DARE).

``keep element e  iff  u32(e) < round(density * 2**32)``, where ``u32(e)`` is word ``column & 3`` of
``philox(counter=(column >> 2, row, stream, adapter), key=(seed low, seed high))``.
A task tensor is seen as [rows, columns]: the last dimension is columns, a vector is one row. So a mask depends on
nothing else: not on tile, batch, order, device or thread.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Random123).
"""

import functools
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]
Wide = npt.NDArray[np.uint64]  # 32-bit words held in 64 bits, so that a product keeps its high half
Key = tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]
_ROUNDS = 10
_WEYL = (0x9E3779B9, 0xBB67AE85)
# Arrays without dimensions, since numpy takes them faster than scalars.
MUL0 = np.array(0xD2511F53, dtype=np.uint64)
MUL1 = np.array(0xCD9E8D57, dtype=np.uint64)
LOW = np.array(0xFFFFFFFF, dtype=np.uint64)
HALF = np.array(32, dtype=np.uint64)


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
    for k0, k1 in round_keys(k[0], k[1]):
        p0, p1 = c[0] * MUL0, c[2] * MUL1
        c = [(p1 >> HALF) ^ c[1] ^ k0, p1 & LOW, (p0 >> HALF) ^ c[3] ^ k1, p0 & LOW]
    c0, c1, c2, c3 = (word.astype(np.uint32) for word in np.broadcast_arrays(*c))
    return c0, c1, c2, c3


@functools.lru_cache(maxsize=64)
def round_keys(k0: int, k1: int) -> tuple[Key, ...]:
    low = 0xFFFFFFFF
    return tuple(
        (np.array((k0 + i * _WEYL[0]) & low, dtype=np.uint64), np.array((k1 + i * _WEYL[1]) & low, dtype=np.uint64))
        for i in range(_ROUNDS)
    )


def _as_words(name: str, value: npt.ArrayLike) -> Wide:
    array = np.asarray(value)
    if array.dtype.kind not in "iu" or (array.size and not 0 <= int(array.min()) <= int(array.max()) < 2**32):
        raise ValueError(f"{name} is {value!r}, wanted integers in [0, 2**32)")
    return array.astype(np.uint64)
