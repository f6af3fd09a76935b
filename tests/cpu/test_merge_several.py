"""Several merges of the same tiles: the bits of each merge alone."""

from contextlib import nullcontext
from unittest import mock

import numpy as np
import pytest
import torch
from grids import bits
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_engine.cpu import merge_several as cpu_merge_several
from merge_engine.cpu.keep import Drop, MergeSpec
from merge_engine.cpu.merge import merge_deltas
from merge_engine.cpu.merge_several import merge_several
from merge_engine.cpu.select import trims, trims_of_each
from merge_engine.cpu.source import Product
from merge_engine.loops import door
from merge_engine.rules.rule import make_rule


def product(rows, columns, rank, seed, coarse=False):
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(shape, generator=generator) for shape in ((rank, columns), (rows, rank)))
    return Product((A * 2).round() if coarse else A, (B * 2).round() if coarse else B, 0.5)


def whole(source):
    """The source's own bits: what the tiles of a merge of it alone hold."""
    return merge_deltas([source], [1.0], [None], make_rule("linear"))


@given(
    shape=st.sampled_from([(1, 1), (7, 13), (257, 263), (300, 1021)]),
    densities=st.lists(st.sampled_from([0.0, 1e-4, 0.1, 0.2, 0.5, 0.51, 0.97, 1.0]), min_size=1, max_size=5),
    coarse=st.booleans(),
    compiled=st.booleans(),
    seed=st.integers(0, 3),
)
@settings(max_examples=30)
def test_thresholds_of_several_densities_from_one_sweep(shape, densities, coarse, compiled, seed):
    """Exactly the k first of a stable sort by falling magnitude stay, ties among them or not."""
    source = product(*shape, 3, seed, coarse)
    with nullcontext() if compiled else mock.patch.object(door, "installed", lambda: False):
        delta = whole(source)
        ks = [int(density * delta.numel()) for density in densities]
        exact, keeping = (trims_of_each([source], [ks], ties)[0] for ties in ("exact", "keep"))
        trimmed = [merge_deltas([source], [1.0], [trim], make_rule("linear")) for trim in exact]
    order = np.argsort(-delta.abs().flatten().numpy(), kind="stable")
    for k, got in zip(ks, trimmed, strict=True):
        want = np.zeros(delta.numel(), np.float32)
        want[order[:k]] = delta.flatten().numpy()[order[:k]]
        assert np.array_equal(got.flatten().numpy(), want), k
    for k, trim in zip(ks, keeping, strict=True):
        if k:
            assert trim.value == abs(delta.flatten()[order[k - 1]].item()) and trim.row >= shape[0]


@given(
    shape=st.sampled_from([(1, 5), (67, 131), (300, 521)]),
    count=st.integers(1, 5),
    methods=st.lists(st.sampled_from(["ties", "magnitude_prune", "dare_ties"]), min_size=1, max_size=5),
    convention=st.sampled_from(["peft", "mergekit"]),
    election=st.sampled_from(["total", "frequency"]),
    tied=st.sampled_from([1, -1]),
    coarse=st.booleans(),
    compiled=st.booleans(),
)
@settings(max_examples=40)
def test_several_merges_of_the_same_tiles(shape, count, methods, convention, election, tied, coarse, compiled):
    """With Numba's loops and without; coarse values tie at the threshold and in the vote."""
    sources = [product(*shape, 3, seed, coarse) for seed in range(count)]
    with nullcontext() if compiled else mock.patch.object(door, "installed", lambda: False):
        asks = []
        for number, method in enumerate(methods):
            keeps = [Drop(0.5, 1, number, i) for i in range(count)]
            if method != "dare_ties":
                keeps = [trims([source], source.rows * source.columns // 3, "exact")[0] for source in sources]
            weights = tuple((-1) ** i * (number + i) / 3 for i in range(count))
            asks.append(
                MergeSpec(weights, tuple(keeps), make_rule(method, convention=convention, election=election), tied)
            )
        results = merge_several(sources, asks)
        for ask, got in zip(asks, results, strict=True):
            want = merge_deltas(sources, ask.weights, ask.keeps, ask.rule, tied=tied)
            assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("tied", [1, -1])
@pytest.mark.parametrize("election", ["total", "frequency"])
def test_several_merges_where_every_vote_is_tied(tied, election):
    source = product(67, 131, 3, 0)
    sources = [source, Product(source.A, source.B, -source.scaling)]
    asks = [MergeSpec((1.0, w), (None, None), make_rule("ties", election=election), tied) for w in (0.5, 0.25)]
    delta = whole(source)
    for ask, got in zip(asks, merge_several(sources, asks), strict=True):
        # One of the two is on the elected side, the first where delta has its sign, and is divided by itself alone.
        own = torch.where(delta * tied > 0, torch.tensor(1.0), torch.tensor(ask.weights[1]))
        assert torch.equal(got, delta.abs() * tied * own)


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_weights_that_turn_the_vote_have_a_vote_of_their_own(method):
    sources = [product(67, 131, 3, seed) for seed in range(3)]
    rule = make_rule(method, convention="mergekit")
    asks = [MergeSpec(weights, (None,) * 3, rule) for weights in ((1.0, 1.0, 1.0), (1.0, -2.0, 0.5))]
    for ask, got in zip(asks, merge_several(sources, asks), strict=True):
        assert torch.equal(bits(got), bits(merge_deltas(sources, ask.weights, ask.keeps, ask.rule)))


def test_more_adapters_than_a_thread_holds(monkeypatch):
    sources = [product(67, 131, 3, seed) for seed in range(5)]
    asks = [MergeSpec((w,) * 5, (None,) * 5, make_rule("ties")) for w in (1.0, 0.3)]
    want = merge_several(sources, asks)
    monkeypatch.setattr(cpu_merge_several, "MOST_HELD", 4)
    assert all(map(torch.equal, merge_several(sources, asks), want))
