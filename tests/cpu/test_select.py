"""Thresholds of a trim: exactly k elements stay, and of equal magnitudes those that come first."""

import numpy as np
import pytest
import torch
from cpu_merges import factors
from hypothesis import given, settings
from hypothesis import strategies as st
from task_tensors import whole

from merge_engine.cpu import select as cpu_select
from merge_engine.cpu import tile_grid as cpu_tile
from merge_engine.cpu.merge import merge_deltas
from merge_engine.cpu.select import locate, trims, trims_of_each
from merge_engine.cpu.source import Dense, Product
from merge_engine.loops import door
from merge_engine.rules import reference
from merge_engine.rules.rule import make_rule
from merge_engine.runtime.threads import threads


@settings(max_examples=60)
@given(data=st.data())
def test_exactly_k_survive_lowest_index_first(data):
    rows, columns, rank = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 50)), data.draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    sources = [
        Product(*factors(generator, rows, columns, rank, torch.bfloat16, integers=True), 0.25)
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_tile, "TILE_ROWS", 8)
        patch.setattr(cpu_tile, "TILE_ELEMENTS", 128)
        flat = torch.cat([whole(source).flatten() for source in sources])
        k = data.draw(st.integers(0, flat.numel()))
        kept = [
            merge_deltas([source], [1.0], [trim], make_rule("linear")).flatten()
            for source, trim in zip(sources, trims(sources, k, "exact"), strict=True)
        ]
    want = reference.trim(flat, k, "exact")
    assert torch.equal(torch.cat(kept), want)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thousands_of_equal_magnitudes(dtype):
    generator = torch.Generator().manual_seed(3)
    A, B = factors(generator, 300, 400, 2, dtype, integers=True)
    source, k = Product(A, B, 1.0), int(0.2 * 300 * 400)
    kept = merge_deltas([source], [1.0], trims([source], k, "exact"), make_rule("linear"))
    threshold = kept[kept != 0].abs().min()
    assert (whole(source).abs() == threshold).sum() > 5000
    assert (kept != 0).sum() == k
    assert torch.equal(kept, reference.trim(whole(source), k, "exact"))
    every = merge_deltas([source], [1.0], trims([source], k, "keep"), make_rule("linear"))
    assert torch.equal(every, reference.trim(whole(source), k, "keep"))


@pytest.mark.quick
def test_locate():
    histogram = np.array([3, 0, 2, 1])
    assert [locate(histogram, k) for k in range(1, 7)] == [(3, 1), (2, 1), (2, 2), (0, 1), (0, 2), (0, 3)]


def test_thresholds_without_loops_are_exact_on_several_threads(monkeypatch):
    """A product's last bits depend on how many threads an operator has; all that looks at them has to have one.

    Equal columns are equal magnitudes at the threshold, of which some are cut.
    """
    monkeypatch.setattr(door, "installed", lambda: False)
    with threads(2):
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            A, B = torch.randn(16, 704, generator=generator).repeat(1, 8), torch.randn(2048, 16, generator=generator)
            source = Product(A, B, 24 / 16)
            k = source.rows * source.columns // 5 + 3
            ((trim,),) = trims_of_each([source], [[k]], "exact")
            kept = merge_deltas([source], [1.0], [trim], make_rule("linear"))
            assert int(kept.count_nonzero()) == k


def random_factors(kind, rows, columns, rank, seed):
    """Of rows and columns that are alike, of norms that differ, or repeat as heads do, or with a part that is larger;
    or A = B^T."""
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(shape, generator=generator) for shape in ((rank, columns), (rows, rank)))
    if kind == "norms differ":
        A *= torch.exp(0.5 * torch.randn(columns, generator=generator))
        B *= torch.exp(0.5 * torch.randn(rows, 1, generator=generator))
    if kind == "norms repeat":
        B *= torch.exp(0.5 * torch.randn(64, 1, generator=generator)).repeat(rows // 64 + 1, 1)[:rows]
    if kind == "a third is larger":
        B[: rows // 3] *= 4
    return (B.T.repeat(1, columns // rows + 1)[:, :columns] if kind == "symmetric" else A), B


@pytest.mark.parametrize(
    ("kind", "rank", "widest"),
    [
        ("alike", 32, 0.03),
        ("alike", 4, 0.07),
        ("norms differ", 16, 0.08),
        ("norms repeat", 32, 0.06),
        ("a third is larger", 16, 0.05),
        ("symmetric", 32, 0.05),
    ],
)
@pytest.mark.parametrize("shape", [(1024, 1024), (900, 1100), (60, 16000), (16000, 60)])
def test_a_bracket_is_as_wide_as_the_sample_is_uncertain(kind, rank, widest, shape):
    """It holds the threshold, and no more than it must."""
    shares = []
    for seed in range(8):
        A, B = random_factors(kind, *shape, rank, seed)
        magnitudes = (B @ A).abs().flatten().sort().values
        for density in (0.05, 0.2, 0.5):
            k = int(density * len(magnitudes))
            low, high = (cpu_select.value_of(bits) for bits in cpu_select.bracket_of(Product(A, B, 1.0), k))
            assert low <= float(magnitudes[-k]) <= high
            shares.append(float(((magnitudes >= low) & (magnitudes <= high)).float().mean()))
    assert 0.005 < sum(shares) / len(shares) < widest


@pytest.mark.parametrize("shape", [(9, 5), (1000, 3), (70, 4000)])
def test_a_sample_is_spread_over_the_whole(shape):
    """Each element of the matrix says its row and column: a group has some from everywhere, all groups nearly all."""
    rows, columns = shape
    places = torch.arange(rows)[:, None] * 10000.0 + torch.arange(columns)
    found = cpu_select._sample(Dense(places)).view(np.float32)
    assert len(found) == cpu_select.GROUPS
    of_rows, of_columns = found // 10000, found % 10000
    for of, size in ((of_rows, rows), (of_columns, columns)):
        assert of.min() <= size // 100 and of.max() >= size - 1 - size // 100
        assert len(np.unique(of)) >= min(size, 900)
        assert abs(of.mean(axis=1) - (size - 1) / 2).max() <= 0.05 * size + 1


def test_a_delta_of_zeros_is_not_collected(monkeypatch):
    """Its sample says nothing, and all of it lies inside any bracket."""
    collected, inside = [], cpu_select.kth_inside

    def counted(*arguments):
        collected.append(sum(len(found) for _, found in arguments[-1]))
        return inside(*arguments)

    monkeypatch.setattr(cpu_select, "kth_inside", counted)
    B = torch.zeros(600, 8)
    B[:30] = torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
    source = Product(torch.randn(8, 700, generator=torch.Generator().manual_seed(2)), B, 1.0)
    for k in (1000, 210_000):
        (trim,) = trims([source], k, "exact")
        kept = merge_deltas([source], [1.0], [trim], make_rule("linear"))
        want = np.sort(whole(source).abs().flatten().numpy())[::-1][:k]
        assert np.array_equal(np.sort(kept.abs().flatten().numpy())[::-1][:k], want)
    assert len(collected) == 2 and max(collected) < 600 * 700 / 10


def test_few_values_are_found_in_one_sweep(monkeypatch):
    """As of differences of bfloat16 models: many equal magnitudes, of which a bracket holds all."""
    values = (4 * torch.randn(300, 700, generator=torch.Generator().manual_seed(3))).round() / 4 + 0.125
    monkeypatch.setattr(cpu_select, "_kth_by_histogram", lambda *_: pytest.fail("a second sweep"))
    for k in (1000, 100_000, 200_000):
        (trim,) = trims([Dense(values)], k, "exact")
        kept = merge_deltas([Dense(values)], [1.0], [trim], make_rule("linear"))
        order = np.argsort(-values.abs().flatten().numpy(), kind="stable")[:k]
        assert np.array_equal(kept.flatten().nonzero().flatten().numpy(), np.sort(order))
