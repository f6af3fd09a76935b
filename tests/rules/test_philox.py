"""The keep mask is a pure function of the seed and an element's place, and its words are Philox4x32-10."""

import math
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_engine.cpu import mask as cpu_mask
from merge_engine.cpu.mask import _thread, keep_mask
from merge_engine.rules.philox import keep_threshold, philox, stream_id

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


def mask_of(density: float, rows: range, columns: range, **place: int) -> torch.Tensor:
    return keep_mask(density, rows=rows, columns=columns, **({"seed": 7, "stream": 11, "adapter": 3} | place))


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


@settings(deadline=None)
@given(
    density=st.floats(2**-32, 1),
    seed=st.integers(0, 2**64 - 1),
    stream=UINT32,
    adapter=UINT32,
    row=st.integers(0, 2**32 - 4),
    column=st.integers(0, 2**32 - 15),
    shape=st.tuples(st.integers(0, 4), st.integers(0, 15)),
)
def test_mask_compares_the_words(density, seed, stream, adapter, row, column, shape):
    rows, columns = range(row, row + shape[0]), range(column, column + shape[1])
    mask = keep_mask(density, seed=seed, stream=stream, adapter=adapter, rows=rows, columns=columns)
    threshold = round(density * 2**32)
    expected = [[plain_word(seed, stream, adapter, i, j) < threshold for j in columns] for i in rows]
    assert mask.dtype == torch.bool
    assert mask.tolist() == expected


@settings(deadline=None)
@given(data=st.data(), chunk=st.sampled_from([1, 3, 8, 64, 16384]))
def test_mask_does_not_depend_on_tile_or_chunk(data, chunk):
    rows, columns = 9, 53
    whole = mask_of(0.4, range(rows), range(columns))
    row = sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
    column = sorted(data.draw(st.tuples(st.integers(0, columns), st.integers(0, columns))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_mask, "_CHUNK_QUADS", chunk)
        # A scratch is made for the chunk of its time: have none of another size, neither before nor after.
        _thread.__dict__.clear()
        tile = mask_of(0.4, range(*row), range(*column))
        _thread.__dict__.clear()
    assert torch.equal(tile, whole[slice(*row), slice(*column)])


def test_mask_of_many_chunks_is_that_of_philox():
    rows, columns = range(5, 75), range(3, 4100)
    j = np.arange(columns.start, columns.stop)
    words = np.stack(philox((j >> 2, np.arange(rows.start, rows.stop)[:, None], 11, 3), (7, 0)))
    lane = np.broadcast_to(j & 3, words.shape[1:])[None]
    expected = np.take_along_axis(words, lane, axis=0)[0] < round(0.2 * 2**32)
    assert np.array_equal(mask_of(0.2, rows, columns).numpy(), expected)


@pytest.mark.parametrize("other", [{"seed": 8}, {"seed": 7 + 2**32}, {"stream": 12}, {"adapter": 4}])
def test_every_word_of_the_place_matters(other):
    rows, columns = range(32), range(128)
    agree = (mask_of(0.5, rows, columns) == mask_of(0.5, rows, columns, **other)).double().mean().item()
    # Independent fair bits agree Binomial(4096, 1/2) times: six standard deviations are 0.047.
    assert abs(agree - 0.5) < 0.047


def test_mask_fills_any_out_and_returns_it():
    base = torch.zeros(8, 30, dtype=torch.bool)
    out = base.T[4:29, 1::2]
    assert keep_mask(0.5, seed=7, stream=11, adapter=3, rows=slice(2, 27), columns=slice(5, 9), out=out) is out
    assert torch.equal(out, mask_of(0.5, range(2, 27), range(5, 9)))
    out.fill_(False)
    assert not base.any()


def test_threads_do_not_disturb_each_other():
    tiles = [(range(i, i + 64), range(512 * (i % 3) + i, 512 * (i % 3) + i + 1000)) for i in range(48)]
    alone = [mask_of(0.3, *tile) for tile in tiles]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda tile: mask_of(0.3, *tile), tiles))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_mask_allocates_nothing_of_the_size_of_a_tile():
    rows, columns, out = range(512), range(2048), torch.empty(512, 2048, dtype=torch.bool)

    def fill() -> None:
        keep_mask(0.3, seed=7, stream=11, adapter=3, rows=rows, columns=columns, out=out)

    fill()
    tracemalloc.start()
    try:
        fill()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # numpy's own buffers, 64 KiB for each operand that is broadcast, and some vectors of 512 quads, 4 KiB each. A word
    # for every element would be 4 MiB.
    assert peak < 256 * 1024


@pytest.mark.parametrize("density", [2**-20, 0.01, 0.1, 0.2, 0.5, 0.9, 1 - 2**-20])
def test_density(density):
    rows, columns = 512, 2048
    mask = mask_of(density, range(rows), range(columns), seed=2**63 + 5)
    n, p = mask.numel(), round(density * 2**32) / 2**32
    # The count is Binomial(n, p). Bernstein: it is off by more than t with probability below
    # 2 exp(-t^2 / (2 n p (1 - p) + 2 t / 3)), which is 2e-9 for the larger root t of t^2 = 20 (variance + t / 3) * 2.
    variance = n * p * (1 - p)
    t = 20 / 3 + math.sqrt((20 / 3) ** 2 + 40 * variance)
    assert abs(int(mask.sum()) - n * p) <= t
    # And so in every lane, by the same bound.
    lanes = mask.view(rows, -1, 4).sum(dim=(0, 1))
    t = 20 / 3 + math.sqrt((20 / 3) ** 2 + 10 * variance)
    assert all(abs(int(count) - n * p / 4) <= t for count in lanes)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 5), (2**31, 2**31 + 2), (3, 7)])
def test_a_word_equal_to_the_threshold_is_dropped(row, column):
    word = plain_word(7, 11, 3, row, column)
    # Both densities are exact in float64; as float32 words the two would be one.
    rows, columns = range(row, row + 1), range(column, column + 1)
    assert not mask_of(word / 2**32, rows, columns).item()
    assert mask_of((word + 1) / 2**32, rows, columns).item()


def test_thresholds():
    assert keep_threshold(1.0) == 2**32
    assert keep_threshold(1) == 2**32
    assert keep_threshold(math.nextafter(1, 0)) == 2**32
    assert keep_threshold(0.5) == 2**31
    assert keep_threshold(0.2) == 858993459
    assert keep_threshold(2**-32) == 1
    assert keep_threshold(5e-324) == 0
    assert mask_of(1.0, range(3), range(9)).all()
    assert not mask_of(5e-324, range(3), range(9)).any()


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
    ("place", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, f"seed is {2**64}"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"stream": 2**32}, "stream is"),
        ({"adapter": -1}, "adapter is -1"),
        ({"rows": range(0, 4, 2)}, "rows is"),
        ({"rows": range(-1, 4)}, "rows is"),
        ({"columns": slice(None)}, "columns is"),
        ({"columns": slice(0, 2**32 + 1)}, "columns is"),
        ({"columns": slice(5, 4)}, "columns is"),
        ({"out": torch.empty(4, 4, dtype=torch.bool)}, r"out is \[4, 4\]"),
        ({"out": torch.empty(4, 6)}, "torch.float32"),
        ({"out": torch.empty(4, 6, dtype=torch.bool, device="meta")}, "on meta"),
    ],
)
def test_places_out_of_range(place, message):
    good = {"seed": 0, "stream": 0, "adapter": 0, "rows": range(4), "columns": range(6)}
    with pytest.raises(ValueError, match=message):
        keep_mask(0.5, **(good | place))


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
