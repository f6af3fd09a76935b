"""The torch backend against the textbook: same kept sets, values within derived bounds, same bits for any threads."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from task_tensors import whole

from merge_engine.cpu import tile as cpu_tile
from merge_engine.cpu.keep import Drop, Trim
from merge_engine.cpu.mask import keep_mask
from merge_engine.cpu.merge import l1_factor, merge_deltas, vote_balance
from merge_engine.cpu.select import locate, trims, trims_of_each
from merge_engine.cpu.source import Dense, Product
from merge_engine.cpu.tile import TILE_ELEMENTS, tiles_of
from merge_engine.loops import door
from merge_engine.rules import reference
from merge_engine.rules.rule import make_rule
from merge_engine.runtime.threads import for_each, threads

U = 2**-24  # unit roundoff of float32
SEED = 2**40 + 7
examples = settings(deadline=None, derandomize=True, max_examples=60)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles in both directions, for tensors of test size."""
    monkeypatch.setattr(cpu_tile, "TILE_ROWS", 8)
    monkeypatch.setattr(cpu_tile, "TILE_ELEMENTS", 128)


def keeps_of(rule, sources, density, stream=5):
    if rule.keep == "magnitude":
        numel = sources[0].rows * sources[0].columns
        return [trims([s], rule.kept(density, numel), rule.trim_ties)[0] for s in sources]
    if rule.keep == "bernoulli":
        drops = [Drop(density, SEED, stream, i) for i in range(len(sources))]
        if rule.l1_rescale:
            return [
                Drop(density, SEED, stream, i, l1_factor(s, d))
                for i, (s, d) in enumerate(zip(sources, drops, strict=True))
            ]
        return drops
    return [None] * len(sources)


def masks_of(rows, columns, count, density, stream=5):
    return {
        i: keep_mask(density, seed=SEED, stream=stream, adapter=i, rows=range(rows), columns=range(columns))
        for i in range(count)
    }


def factors(generator, rows, columns, rank, dtype, integers):
    def draw(*shape):
        if integers:  # small whole numbers: products are exact, and thousands of them are equal
            return torch.randint(-2, 3, shape, generator=generator).to(dtype)
        return torch.randn(*shape, generator=generator).to(dtype)

    return draw(rank, columns), draw(rows, rank)


METHODS = ["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"]


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


@examples
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


@pytest.mark.parametrize("rank", [1, 4, 8, 17, 64, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_are_exact_to_rounding(rank, dtype):
    generator = torch.Generator().manual_seed(rank)
    A, B = factors(generator, 67, 131, rank, dtype, integers=False)
    got = whole(Product(A, B, 0.7)).double()
    exact = 0.7 * (B.double() @ A.double())
    bound = (rank + 2) * U * 0.7 * (B.double().abs() @ A.double().abs())
    assert ((got - exact).abs() <= bound).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 977), (977, 1), (127, 131), (64, 2048), (3, 70001), (70001, 2)])
def test_every_shape_is_covered_once(shape):
    seen = torch.zeros(shape, dtype=torch.int32)
    for tile in tiles_of(*shape):
        seen[tile.top : tile.bottom, tile.left : tile.right] += 1
        height, width = tile.shape
        assert height * width <= TILE_ELEMENTS
    assert (seen == 1).all()


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


def test_non_contiguous_and_zero_factors():
    generator = torch.Generator().manual_seed(0)
    A, B = factors(generator, 33, 47, 8, torch.float32, False)
    rule = make_rule("ties")
    plain = [Product(A, B, 1.0), Product(A, torch.zeros_like(B), 1.0)]
    strided = [Product(A.T.contiguous().T, B.T.contiguous().T, 1.0), plain[1]]
    keeps = keeps_of(rule, plain, 0.3)
    assert torch.equal(merge_deltas(plain, [1.0, 1.0], keeps, rule), merge_deltas(strided, [1.0, 1.0], keeps, rule))
    assert torch.equal(merge_deltas(plain[:1], [1.0], keeps[:1], rule), merge_deltas(plain, [1.0, 1.0], keeps, rule))


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


def test_locate():
    histogram = np.array([3, 0, 2, 1])
    assert [locate(histogram, k) for k in range(1, 7)] == [(3, 1), (2, 1), (2, 2), (0, 1), (0, 2), (0, 3)]


def test_an_error_in_a_tile_is_raised():
    class Broken(Dense):
        def fill(self, tile, out):
            raise RuntimeError("cannot be read")

    with pytest.raises(RuntimeError, match="cannot be read"):
        merge_deltas([Broken(torch.ones(3, 3))], [1.0], [None], make_rule("linear"))
    with pytest.raises(RuntimeError, match="cannot be read"):
        trims([Broken(torch.ones(3, 3))], 2, "exact")


def test_threads_that_share_tiles_run_operators_alone():
    """In a process of its own, since a thread settles how many it uses once."""
    program = (
        "import torch; from merge_engine import tiles; torch.set_num_threads(3); "
        "seen = for_each(range(9), lambda _: torch.get_num_threads()); assert seen == [1] * 9, seen; "
        "assert torch.get_num_threads() == 3"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_tile_that_fails_ends_the_others():
    seen, all_free = [], threading.Barrier(torch.get_num_threads(), timeout=60)

    def work(item):
        seen.append(item)
        if item == 3:
            raise RuntimeError("cannot be read")

    with pytest.raises(RuntimeError, match="cannot be read"):
        for_each(range(100_000), work)
    for_each(range(all_free.parties), lambda _: all_free.wait())
    assert len(seen) < 100_000


def test_a_thread_that_has_not_asked_keeps_all_threads():
    """Stages in the background run on one thread each; what a later thread gets is the count from before."""
    code = (
        "import threading, torch; from merge_engine.pipeline import ahead; wanted = int(__import__('sys').argv[1]); "
        "torch.set_num_threads(wanted); got = []; "
        "list(ahead(lambda item: got.append(torch.get_num_threads()), range(3))); assert got == [1] * 3; "
        "thread = threading.Thread(target=lambda: got.append(torch.get_num_threads())); thread.start(); thread.join(); "
        "assert got[-1] == wanted == torch.get_num_threads(), got"
    )
    subprocess.run([sys.executable, "-c", code, "3"], check=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_of_a_fork_can_merge():
    code = (
        "import os, torch; from merge_engine import tiled; from merge_engine.rule import make_rule; "
        "from merge_engine.tiles import Dense; "
        "merge = lambda: merge_deltas([Dense(torch.ones(3, 4))], [2.0], [None], make_rule('linear')); "
        "merge(); child = os.fork(); "
        "ok = bool((merge() == 2).all()); "
        "os._exit(0 if ok else 1) if child == 0 else None; "
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_thresholds_without_loops_are_exact_on_several_threads(monkeypatch):
    """A product's last bits depend on how many threads an operator has; all that looks at them has to have one.

    Equal columns are equal magnitudes at the threshold, of which some are cut.
    """
    monkeypatch.setattr(door, "loops", lambda: None)
    with threads(2):
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            A, B = torch.randn(16, 704, generator=generator).repeat(1, 8), torch.randn(2048, 16, generator=generator)
            source = Product(A, B, 24 / 16)
            k = source.rows * source.columns // 5 + 3
            ((trim,),) = trims_of_each([source], [[k]], "exact")
            kept = merge_deltas([source], [1.0], [trim], make_rule("linear"))
            assert int(kept.count_nonzero()) == k
