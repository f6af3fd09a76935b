"""A merge in one sweep: the bits of the merge whose thresholds were found in a sweep before."""

import numpy as np
import pytest
import torch
from grids import bits, save_adapter
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_engine.cpu import select, tile_grid
from merge_engine.cpu.keep import MergeSpec
from merge_engine.cpu.merge import merge_deltas
from merge_engine.cpu.one_sweep import trim_and_merge
from merge_engine.cpu.select import trims_of_each
from merge_engine.cpu.source import Product
from merge_engine.engine.cpu_backend import TorchBackend
from merge_engine.engine.merge import merge
from merge_engine.rules.rule import make_rule
from merge_engine.runtime.threads import threads

loops = pytest.importorskip("merge_engine.loops.tile_loops", exc_type=ImportError)


@pytest.fixture
def small(monkeypatch):
    """Several tiles in both directions, samples and ranks for tensors of test size."""
    monkeypatch.setattr(tile_grid, "TILE_ROWS", 8)
    monkeypatch.setattr(tile_grid, "TILE_ELEMENTS", 300)
    monkeypatch.setattr(tile_grid, "LEAST_ELEMENTS", 300)
    monkeypatch.setattr(select, "SAMPLE", 64)
    monkeypatch.setattr(loops, "LEAST_RANKS", 0)


def products(rows, columns, rank, count, seed=0, step=0.0):
    """Random products; with a step their values are multiples of it, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        A, B = (torch.randn(shape, generator=generator) for shape in ((rank, columns), (rows, rank)))
        found.append(Product((A / step).round() * step, (B / step).round() * step, 0.5) if step else Product(A, B, 0.5))
    return found


def two_sweeps(sources, ks, ties, spec, scale):
    found = trims_of_each(sources, [[k] for k in ks], ties)
    keeps = [own[0] for own in found]
    return merge_deltas(sources, spec.weights, keeps, spec.rule, scale=scale, tied=spec.tied)


def same_bits(a, b):
    return torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("convention", ["peft", "mergekit", "paper"])
@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_the_bits_of_two_sweeps(method, convention, small):
    done = []

    @settings(deadline=None, derandomize=True, max_examples=40)
    @given(
        shape=st.sampled_from([(40, 61), (9, 300), (300, 9), (64, 64), (33, 177)]),
        count=st.integers(1, 4),
        densities=st.lists(st.sampled_from([0.01, 0.2, 0.5, 0.9]), min_size=4, max_size=4),
        weights=st.lists(st.sampled_from([1.0, -0.5, 0.0, 3.0]), min_size=4, max_size=4),
        step=st.sampled_from([0.0, 2.0**-12, 2.0**-6]),
        ties=st.sampled_from(["exact", "keep"]),
        tied=st.sampled_from([1, -1]),
        scale=st.sampled_from([1.0, -0.7]),
        count_of_threads=st.sampled_from([1, 2]),
        seed=st.integers(0, 5),
    )
    def check(shape, count, densities, weights, step, ties, tied, scale, count_of_threads, seed):
        sources = products(*shape, 3, count, seed, step)
        ks = [max(1, int(density * shape[0] * shape[1])) for density in densities[:count]]
        spec = MergeSpec(tuple(weights[:count]), (), make_rule(method, convention=convention), tied)
        with threads(count_of_threads):
            got = trim_and_merge(sources, ks, ties, spec, scale)
            if got is not None:
                done.append(step)
                assert same_bits(got, two_sweeps(sources, ks, ties, spec, scale))

    check()
    assert min(done.count(0.0), sum(map(bool, done))) > 5  # it did not give up


@pytest.mark.quick
def test_equal_magnitudes_at_the_threshold_go_from_a_place_on(small):
    """Half of a matrix has one magnitude: as many of these stay as there is room for, the first ones."""
    generator = torch.Generator().manual_seed(0)
    B = torch.rand(60, 1, generator=generator) + 1
    B[20:40] = 1.5
    source = Product(torch.ones(1, 50), B, 1.0)
    k = int((B > 1.5).sum()) * 50 + 333
    got = trim_and_merge([source], [k], "exact", MergeSpec((1.0,), (), make_rule("magnitude_prune"), 1))
    kept = np.flatnonzero(got.numpy())
    order = np.argsort(-(B @ torch.ones(1, 50)).flatten().numpy(), kind="stable")
    assert np.array_equal(kept, np.sort(order[:k]))


def test_where_one_sweep_will_not_do(small, monkeypatch):
    sources, rule = products(40, 61, 3, 5), make_rule("ties")

    def merged(sources, ks, rule=rule):
        return trim_and_merge(sources, ks, "exact", MergeSpec((1.0,) * len(ks), (), rule, 1))

    assert merged(sources[:4], [400] * 4) is not None
    assert merged(sources, [400] * 5) is None  # too many
    assert merged(sources[:2], [400, 0]) is None  # nothing to keep
    assert merged(products(8, 8, 3, 2), [20, 20]) is None  # too small to be sampled
    assert merged(sources[:2], [400, 400], make_rule("elect_max")) is None  # the loops do not know it
    with monkeypatch.context() as patch:
        patch.setattr(select, "FILLED", 10)
        assert merged(products(60, 60, 1, 1, step=2.0), [700]) is None  # too many are equal
    monkeypatch.setattr(select, "_brackets", lambda source, ks: [(5, 9)])
    assert merged(sources[:2], [400, 400]) is None  # the sample was wrong
    monkeypatch.setattr(loops, "LEAST_RANKS", 17)
    assert merged(sources[:2], [400, 400]) is None  # 8 ranks each, filled up with zeros


def test_a_merge_of_high_ranks_makes_its_products_once(monkeypatch, tmp_path):
    """And its factors are those that two sweeps lead to."""
    shapes = {"model.layers.0.self_attn.q_proj": (300, 320), "model.layers.0.self_attn.v_proj": (256, 320)}
    paths = [save_adapter(tmp_path / str(seed), seed, shapes, rank=128) for seed in range(2)]
    calls = []

    def counted(*given):
        calls.append(trim_and_merge(*given))
        return calls[-1]

    def merged():
        return merge(paths, method="ties", density=0.2, rank=8, backend=TorchBackend.name)

    monkeypatch.setattr("merge_engine.engine.cpu_backend.trim_and_merge", counted)
    once = merged()
    assert calls and all(each is not None for each in calls)
    monkeypatch.setattr(loops, "LEAST_RANKS", 1000)
    twice = merged()
    for name, factors in once.modules.items():
        assert all(same_bits(a, b) for a, b in zip(factors[:2], twice.modules[name][:2], strict=True))
