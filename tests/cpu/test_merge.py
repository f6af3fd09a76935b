"""Merges tile by tile against the textbook: values within derived bounds, the same bits on any number of threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_merges import METHODS, U, factors, keeps_of, masks_of
from hypothesis import given, settings
from hypothesis import strategies as st
from task_tensors import whole

from merge_engine.cpu import tile_grid as cpu_tile
from merge_engine.cpu.keep import Drop, Trim
from merge_engine.cpu.merge import merge_deltas, vote_balance
from merge_engine.cpu.select import trims
from merge_engine.cpu.source import Dense, Product
from merge_engine.loops import door
from merge_engine.rules import reference
from merge_engine.rules.rule import make_rule

ROOT = Path(__file__).parents[2]
examples = settings(deadline=None, derandomize=True, max_examples=30)


@pytest.mark.parametrize("convention", ["peft", "mergekit", "paper"])
@pytest.mark.parametrize("method", METHODS)
def test_merge_equals_reference(method, convention, monkeypatch):
    monkeypatch.setattr(cpu_tile, "TILE_ROWS", 8)
    monkeypatch.setattr(cpu_tile, "TILE_ELEMENTS", 128)

    @examples
    @given(data=st.data())
    def check(data):
        rows, columns = data.draw(st.integers(1, 37)), data.draw(st.integers(1, 61))
        count = data.draw(st.integers(1, 5))
        dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
        integers = data.draw(st.booleans())
        dense = data.draw(st.booleans())
        density = data.draw(st.sampled_from([0.01, 0.2, 0.29, 0.5, 0.9, 1.0]))
        scale = data.draw(st.sampled_from([1.0, 0.3, -2.0, 0.0]))
        weights = data.draw(st.lists(st.sampled_from([1.0, 2.0, 0.5, -1.0, 0.0, 0.7]), min_size=count, max_size=count))
        rule = make_rule(
            method,
            convention=convention,
            election=data.draw(st.sampled_from(["total", "frequency"])),
            scope="tensor",
            trim_ties=data.draw(st.sampled_from(["exact", "keep"])),
        )
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        sources = []
        for _ in range(count):
            rank = data.draw(st.sampled_from([1, 4, 8, 17]))
            A, B = factors(generator, rows, columns, rank, dtype, integers)
            sources.append(Dense((B.float() @ A.float()).to(dtype)) if dense else Product(A, B, 0.5))
        deltas = [whole(source) for source in sources]
        masks = masks_of(rows, columns, count, density)
        want = reference.merge_model(
            {"m": dict(enumerate(deltas))}, weights, {"m": [density] * count}, rule, masks={"m": masks}, scale=scale
        )["m"]
        keeps = keeps_of(rule, sources, density)
        tied = 1
        if rule.majority and rule.elect != "none":
            tied = 1 if vote_balance(sources, weights, keeps, rule) > 0 else -1
        out = torch.full((rows, columns), float("nan"))
        got = merge_deltas(sources, weights, keeps, rule, scale=scale, tied=tied, out=out)
        assert got is out
        # A term is rounded when weighted and when added, on both sides; rescaling adds two roundings and, for L1,
        # the rounding of the norms (n elements); the mean and the scale one each.
        gain = max([k.factor or 1 / k.density for k in keeps if isinstance(k, Drop)], default=1.0)
        total = gain * sum(abs(w) * d.abs() for w, d in zip(weights, deltas, strict=True))
        norms = rows * columns if rule.l1_rescale and rule.keep == "bernoulli" else 0
        bound = 2 * U * (count + 6 + norms) * abs(scale) * total
        if rule.divisor == "weight":
            bound = bound / 0.09  # no sum of up to five of these weights is nearer to zero than 0.1, but zero itself
        assert ((got - want).abs() <= bound + 1e-37).all()

    check()


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty(shape):
    source = Dense(torch.zeros(shape))
    assert trims([source], 0, "exact") == [Trim(float("inf"), 0, 0)]
    assert merge_deltas([source], [1.0], [None], make_rule("ties")).shape == shape


@pytest.mark.parametrize("count", [1, 33, 300])
@pytest.mark.parametrize("election", ["total", "frequency"])
def test_many_adapters(count, election):
    generator = torch.Generator().manual_seed(count)
    sources = [Product(*factors(generator, 19, 23, 4, torch.float32, False), 1.0) for _ in range(count)]
    rule = make_rule("ties", election=election)
    got = merge_deltas(sources, [1.0] * count, keeps_of(rule, sources, 0.5), rule)
    deltas = {"m": {i: whole(s) for i, s in enumerate(sources)}}
    want = reference.merge_model(deltas, [1.0] * count, {"m": [0.5] * count}, rule)["m"]
    bound = U * 2 * (count + 3) * sum(delta.abs() for delta in deltas["m"].values())
    assert ((got - want).abs() <= bound).all()


@pytest.mark.parametrize("count", [255, 256, 513])
@pytest.mark.parametrize("compiled", [True, False])
def test_any_number_of_adapters_that_agree_is_counted(count, compiled, monkeypatch):
    """Each is 1 everywhere, and so is their mean: a count of 8 bits would be 0 of 256 of them."""
    if not compiled:
        monkeypatch.setattr(door, "installed", lambda: False)
    sources = [Dense(torch.ones(2, 3))] * count
    assert torch.equal(merge_deltas(sources, [1.0] * count, [None] * count, make_rule("ties")), torch.ones(2, 3))


@pytest.mark.quick
@pytest.mark.parametrize("compiled", [True, False])
def test_a_base_of_float64_is_added_in_float64(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(door, "installed", lambda: False)
    base = 1 + torch.arange(6, dtype=torch.float64).view(2, 3) * 2**-40
    got = merge_deltas([Dense(torch.full((2, 3), 2.0**-30))], [1.0], [None], make_rule("linear"), base=base, out=base)
    assert got is base
    assert got.tolist() == [[1 + 2**-30 + i * 2**-40 for i in row] for row in ((0, 1, 2), (3, 4, 5))]


@pytest.mark.quick
def test_non_contiguous_and_zero_factors():
    generator = torch.Generator().manual_seed(0)
    A, B = factors(generator, 33, 47, 8, torch.float32, False)
    rule = make_rule("ties")
    plain = [Product(A, B, 1.0), Product(A, torch.zeros_like(B), 1.0)]
    strided = [Product(A.T.contiguous().T, B.T.contiguous().T, 1.0), plain[1]]
    keeps = keeps_of(rule, plain, 0.3)
    assert torch.equal(merge_deltas(plain, [1.0, 1.0], keeps, rule), merge_deltas(strided, [1.0, 1.0], keeps, rule))
    assert torch.equal(merge_deltas(plain[:1], [1.0], keeps[:1], rule), merge_deltas(plain, [1.0, 1.0], keeps, rule))


@pytest.mark.quick
@pytest.mark.parametrize("convention", ["peft", "mergekit"])
@pytest.mark.parametrize("method", METHODS)
def test_thread_count_changes_no_bit(method, convention, small_tiles):
    generator = torch.Generator().manual_seed(1)
    sources = [Product(*factors(generator, 61, 97, 8, torch.float32, False), 0.5) for _ in range(3)]
    rule = make_rule(method, convention=convention)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            keeps = keeps_of(rule, sources, 0.3)
            results.append((keeps, merge_deltas(sources, [2.0, 1.0, -0.5], keeps, rule)))
    finally:
        torch.set_num_threads(before)
    for keeps, merged in results[1:]:
        assert keeps == results[0][0]
        assert torch.equal(merged, results[0][1])


def test_tile_size_changes_no_bit_of_a_dropped_mask(monkeypatch):
    ones = [Dense(torch.ones(53, 171))] * 3
    rule = make_rule("dare_linear")
    keeps = keeps_of(rule, ones, 0.4)
    results = []
    for rows, elements in ((64, 1 << 17), (8, 128), (1, 7)):
        monkeypatch.setattr(cpu_tile, "TILE_ROWS", rows)
        monkeypatch.setattr(cpu_tile, "TILE_ELEMENTS", elements)
        results.append(merge_deltas(ones, [1.0, 2.0, 4.0], keeps, rule))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    masks = masks_of(53, 171, 3, 0.4)
    want = sum(mask.float() / 0.4 * 2**i for i, mask in masks.items())
    assert torch.equal(results[0] == 0, want == 0)


def test_an_error_in_a_tile_is_raised():
    class Broken(Dense):
        def fill(self, tile, out):
            raise RuntimeError("cannot be read")

    with pytest.raises(RuntimeError, match="cannot be read"):
        merge_deltas([Broken(torch.ones(3, 3))], [1.0], [None], make_rule("linear"))
    with pytest.raises(RuntimeError, match="cannot be read"):
        trims([Broken(torch.ones(3, 3))], 2, "exact")


FORK = """
import os
import torch
from merge_engine.cpu.merge import merge_deltas
from merge_engine.cpu.source import Dense
from merge_engine.rules.rule import make_rule

def works():
    return bool((merge_deltas([Dense(torch.ones(3, 4))], [2.0], [None], make_rule("linear")) == 2).all())

assert works()
child = os.fork()
if child == 0:
    os._exit(0 if works() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_of_a_fork_can_merge():
    subprocess.run([sys.executable, "-c", FORK], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize(
    "sources, weights",
    [
        ([Dense(torch.ones(3, 4)), Dense(torch.ones(3, 4))], [1.0]),
        ([Dense(torch.ones(3, 4)), Dense(torch.ones(2, 4))], [1.0, 1.0]),
    ],
)
def test_sources_and_weights_have_to_agree(sources, weights):
    with pytest.raises(ValueError, match="wanted one shape, and 2 weights"):
        merge_deltas(sources, weights, [None] * 2, make_rule("linear"))
