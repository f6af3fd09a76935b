"""The keep mask is a function of the seed and an element's place alone; its words are those of Philox4x32-10."""

import math
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_philox import UINT32, plain_word

from merge_engine.cpu import mask as cpu_mask
from merge_engine.cpu.mask import _thread, keep_mask
from merge_engine.loops import door
from merge_engine.rules.philox import philox


@pytest.fixture(autouse=True, params=["loops", "numpy"])
def made_by(request, monkeypatch):
    """Every test twice: the compiled loop makes the mask, then numpy does, as where Numba is not installed."""
    if request.param == "numpy":
        monkeypatch.setattr(door, "installed", lambda: False)
    elif door.loops() is None:
        pytest.skip("needs Numba")


def mask_of(density: float, rows: range, columns: range, **place: int) -> torch.Tensor:
    return keep_mask(density, rows=rows, columns=columns, **({"seed": 7, "stream": 11, "adapter": 3} | place))


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


@pytest.mark.quick
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


@pytest.mark.quick
@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 5), (2**31, 2**31 + 2), (3, 7)])
def test_a_word_equal_to_the_threshold_is_dropped(row, column):
    word = plain_word(7, 11, 3, row, column)
    # Both densities are exact in float64; as float32 words the two would be one.
    rows, columns = range(row, row + 1), range(column, column + 1)
    assert not mask_of(word / 2**32, rows, columns).item()
    assert mask_of((word + 1) / 2**32, rows, columns).item()


def test_densities_at_the_ends():
    assert mask_of(1.0, range(3), range(9)).all()
    assert not mask_of(5e-324, range(3), range(9)).any()


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
