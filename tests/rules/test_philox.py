"""Philox4x32-10, thresholds and streams: against known answers and an independent version."""

import math
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_philox import LOW, UINT32, plain_philox

from merge_engine.rules.philox import keep_threshold, philox, stream_id


@pytest.mark.quick
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((LOW, LOW, LOW, LOW), (LOW, LOW), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_random123(counter, key, words):
    assert plain_philox(counter, key) == words
    assert tuple(int(word) for word in philox(counter, key)) == words


@settings(deadline=None)
@given(st.tuples(UINT32, UINT32, UINT32, UINT32), st.tuples(UINT32, UINT32))
def test_philox_is_philox(counter, key):
    assert tuple(int(word) for word in philox(counter, key)) == plain_philox(counter, key)


def test_philox_broadcasts():
    words = philox((np.arange(5), np.arange(3)[:, None], 8, np.uint32(LOW)), (1, 2))
    assert all(word.shape == (3, 5) and word.dtype == np.uint32 for word in words)
    assert tuple(int(word[2, 4]) for word in words) == plain_philox((4, 2, 8, LOW), (1, 2))


@pytest.mark.quick
def test_thresholds():
    assert keep_threshold(1.0) == 2**32
    assert keep_threshold(1) == 2**32
    assert keep_threshold(math.nextafter(1, 0)) == 2**32
    assert keep_threshold(0.5) == 2**31
    assert keep_threshold(0.2) == 858993459
    assert keep_threshold(2**-32) == 1
    assert keep_threshold(5e-324) == 0


@pytest.mark.quick
def test_stream_id():
    assert stream_id("model.layers.3.self_attn.q_proj", "A") == zlib.crc32(b"model.layers.3.self_attn.q_proj.A")
    assert stream_id("ключ", "delta") == zlib.crc32("ключ.delta".encode())
    with pytest.raises(ValueError, match="side is 'C'"):
        stream_id("m", "C")


@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.0000001, math.nan, math.inf])
def test_density_out_of_range(density):
    with pytest.raises(ValueError, match="density is"):
        keep_threshold(density)


@pytest.mark.parametrize(
    ("counter", "key", "message"),
    [
        ((0, 0, 0), (0, 0), "3 counter"),
        ((0, 0, 0, 2**32), (0, 0), r"counter\[3\]"),
        ((0, 0, -1, 0), (0, 0), r"counter\[2\]"),
        ((0.5, 0, 0, 0), (0, 0), r"counter\[0\]"),
        ((0, 0, 0, 0), (0, 2**32), r"key\[1\]"),
    ],
)
def test_words_out_of_range(counter, key, message):
    with pytest.raises(ValueError, match=message):
        philox(counter, key)
