"""Philox4x32-10 in Python's integers, as in the paper."""

from hypothesis import strategies as st

LOW = 0xFFFFFFFF
UINT32 = st.integers(0, LOW)


def plain_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 as in the paper, in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return c0, c1, c2, c3


def plain_word(seed: int, stream: int, adapter: int, row: int, column: int) -> int:
    return plain_philox((column >> 2, row, stream, adapter), (seed & LOW, seed >> 32))[column & 3]
