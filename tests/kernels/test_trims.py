"""The search for thresholds: exactly k stay, whether its bracket holds the k-th, misses it, or many are equal."""

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_groups import FLOATS, group, seen
from merge_engine.kernels import trims as module
from merge_engine.kernels.launch import Launch
from merge_engine.kernels.merge import merge_deltas
from merge_engine.kernels.search import BINS, FIRST, HELD, INFINITY, LOWEST, ORDER, STATE, WIDTH, _narrow_kernel
from merge_engine.kernels.source import Dense, Source
from merge_engine.kernels.trims import bands, list_length, sample_of, trims
from operators import Operators
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

SMALL = Launch(16, 16, 16, 4)  # many tiles in little time


def kept_of(source: Source, k: list[int], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(what the trims of k keep, thresholds, task tensors): [recipes, modules, adapters, ...]."""
    modules, adapters, _, columns = source.shape
    kept = torch.tensor(k)[:, None, None].expand(-1, modules, adapters)
    found = trims(source, kept, **options)
    t = seen(source).cpu()
    place = torch.arange(t[0, 0].numel()).view(t.shape[2:])
    value, row, column = (field.cpu()[..., None, None] for field in (found.value, found.row, found.column))
    earlier = place < row.long() * columns + column
    return (t.abs() > value) | ((t.abs() == value) & earlier), value, t


def assert_exact(source: Source, k: list[int], **options: Any) -> None:
    """The k largest stay; of equal ones those at the lowest places: by a sort of (magnitude, place)."""
    got, value, t = kept_of(source, k, **options)
    flat = t.abs().flatten(2)
    order = torch.sort(flat, dim=-1, descending=True, stable=True).indices
    for recipe, each in enumerate(k):
        want = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, order[..., :each], True)
        assert torch.equal(got[recipe].flatten(2), want)
        if 0 < each < flat.shape[-1]:
            kth = flat.gather(-1, order[..., each - 1 : each])
            assert torch.equal(value[recipe].flatten(2), kth)


def magnitudes(kind: str, rows: int, columns: int, seed: int) -> Tensor:
    """Task tensors [1, 1, rows, columns] of each sort that a search may meet."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 1, rows, columns, generator=generator)
    if kind == "equal":
        return torch.full_like(x, 0.3) * x.sign()
    if kind == "zero":
        return torch.zeros_like(x)
    if kind == "nearly all zero":
        return x * (torch.rand(x.shape, generator=generator) < 0.02)
    if kind == "few values":
        return (2 * x).round()
    if kind == "subnormal":
        return x * 2.0**-140
    if kind == "every range":
        return (x.double() * torch.exp2(torch.randint(-149, 100, x.shape, generator=generator).double())).float()
    if kind == "rows of very different size":
        return x * torch.exp2(torch.randint(-30, 30, (1, 1, rows, 1), generator=generator).float())
    return x


KINDS = (
    "normal",
    "equal",
    "zero",
    "nearly all zero",
    "few values",
    "subnormal",
    "every range",
    "rows of very different size",
)


@settings(max_examples=8)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 50),
    columns=st.integers(1, 70),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
@example(kind="few values", rows=50, columns=70, share=0.3, seed=1)
@example(kind="equal", rows=37, columns=61, share=0.5, seed=2)
@example(kind="subnormal", rows=33, columns=20, share=0.2, seed=3)
@example(kind="nearly all zero", rows=40, columns=40, share=0.5, seed=4)
def test_exactly_k_of_anything(
    kind: str, rows: int, columns: int, share: float, seed: int, device: torch.device
) -> None:
    numel = rows * columns
    k = [int(share * numel), min(1, numel), max(numel - 1, 0)]
    assert_exact(Dense(magnitudes(kind, rows, columns, seed).to(device)), k, launch=SMALL)


class Misleading:
    """The sample's kernel, with magnitudes off by so many octaves: a bracket misses, above or below the k-th."""

    def __init__(self, kernel: Any, octaves: int) -> None:
        self.kernel, self.octaves = kernel, octaves

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(sample: Tensor, **options: Any) -> None:
            self.kernel[grid](sample, **options)
            moved = (sample.int() + (self.octaves << 8)).clamp(LOWEST.value + 1, 65280 + LOWEST.value)
            sample.copy_(torch.where(sample == LOWEST.value, sample.int(), moved))

        return launch


@settings(max_examples=4)
@given(
    kind=st.sampled_from(KINDS),
    octaves=st.sampled_from([-40, -3, 3, 40]),
    share=st.floats(0, 1),
    short=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(kind="normal", octaves=3, share=0.2, short=False, seed=1)
@example(kind="normal", octaves=-3, share=0.2, short=True, seed=1)
@example(kind="few values", octaves=40, share=0.4, short=True, seed=1)
@example(kind="nearly all zero", octaves=40, share=0.5, short=False, seed=2)
@example(kind="every range", octaves=-40, share=0.5, short=True, seed=2)
def test_a_bracket_that_misses_changes_nothing(
    kind: str, octaves: int, share: float, short: bool, seed: int, device: torch.device
) -> None:
    """short: lists hold eight elements, so that what is found is found by counting, and by one program alone."""
    source = Dense(magnitudes(kind, 29, 35, seed).to(device))
    k = [int(share * 29 * 35)]
    with (
        mock.patch.object(module, "_sample_kernel", Misleading(module._sample_kernel, octaves)),
        mock.patch.object(module, "list_length", lambda numel: 8 if short else list_length(numel)),
    ):
        assert_exact(source, k, launch=SMALL)


@pytest.mark.parametrize(
    ("order", "wanted"),
    [
        (7, (140, INFINITY.value + 1 - 140, 7, 7)),  # the last above the bracket
        (8, (139, 1, 1, 2)),  # the first in it
        (12, (100, 1, 3, 3)),  # the last in it
        (13, (0, 100, 1, 88)),  # the first below
    ],
)
def test_a_bracket_that_misses_by_one_is_noticed(order: int, wanted: tuple[int, ...], device: torch.device) -> None:
    """Of 100 elements 7 are above the bracket [100, 140), 5 in it, and 88 below."""
    state = torch.zeros(1, STATE.value, dtype=torch.int64, device=device)
    state[0, FIRST.value], state[0, WIDTH.value], state[0, ORDER.value] = 100, 40, order
    counts = torch.zeros(1, BINS.value, dtype=torch.int32, device=device)
    counts[0, 0], counts[0, 39] = 3, 2
    reached = torch.tensor([12], device=device)
    _narrow_kernel[(1,)](state, counts, reached, 100, EXACT=True, LIST=1024, AREA=256)
    fields = (FIRST, WIDTH, ORDER, HELD)
    assert tuple(int(state[0, field.value]) for field in fields) == wanted
    assert not counts.any()


@pytest.mark.quick
def test_ties_that_are_kept_need_no_cut(device: torch.device) -> None:
    source = Dense(magnitudes("few values", 40, 50, 5).to(device))
    got, _, t = kept_of(source, [300, 1999, 2000, 0], ties="keep", launch=SMALL)
    for recipe, k in enumerate((300, 1999, 2000, 0)):
        kth = t.abs().flatten(2).sort(-1, descending=True).values[..., k - 1 : k, None] if k else torch.inf
        assert torch.equal(got[recipe], t.abs() >= kth)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_second_search_gives_the_same_bits(dtype: torch.dtype, device: torch.device) -> None:
    source = group((37, 45), ranks=(8, 8), dtype=dtype, device=device)
    kept = torch.full((1, 1, 2), 37 * 45 // 5)
    first, second = trims(source, kept), trims(source, kept)
    for name in ("value", "row", "column"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_the_sample_is_of_all_rows_and_columns() -> None:
    """At least one tile in each row of tiles, and nearly one in each column, where there are so many."""
    for rows, columns in ((4096, 4096), (28672, 8192), (256, 2048), (8192, 28672), (4096, 1024)):
        lora = Dense(torch.empty(1, 1, rows, columns, device="meta"))
        launch = Launch(64, 64, 16, 4)
        tiles, every = sample_of(lora, launch)
        down, across = rows // 64, columns // 64
        columns_seen = Counter(((i * 0x9E3779B9 & 0xFFFFFFFF) * across) >> 32 for i in range(tiles))
        rows_seen = Counter(i * down // tiles for i in range(tiles))
        assert len(rows_seen) == min(down, tiles)
        assert len(columns_seen) >= 0.6 * min(across, tiles)
        assert 1 << 14 <= tiles * 64 * 64 // every <= 1 << 17


def test_framework_operators_of_a_group(device: torch.device) -> None:
    """Trims and merge of a group, views included: a GPU would launch most of them, or wait."""
    source = group((48, 64), modules=2, device=device)
    kept = torch.full((1, 2, 3), 500)
    # What the interpreter does itself is no operator of ours, so nothing is launched.
    with mock.patch.object(GridExecutor, "__call__"), Operators() as counted:
        merge_deltas(source, [[1.0] * 3], trims(source, kept), elect="total", divisor="count")
    assert counted.total <= 20, counted.counts
    waits = [name for name in counted.counts if "local_scalar" in name or "nonzero" in name or "item" in name]
    assert not waits


def test_a_band_is_two_trims(device: torch.device) -> None:
    source = group((48, 64), modules=2, device=device)
    kept, topped = torch.full((1, 2, 3), 500), torch.full((1, 2, 3), 40)
    band = bands(source, kept, topped)
    for got, want in ((band.wide, trims(source, kept + topped)), (band.top, trims(source, topped))):
        assert torch.equal(got.value, want.value) and torch.equal(got.row, want.row)
