"""The compiled loops against the operators that they stand for: of the same task tensors, the same bits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from task_tensors import whole

from merge_engine.cpu import merge_several as cpu_merge_several
from merge_engine.cpu import merge_tile_by_loops as cpu_tile_by_loops
from merge_engine.cpu import select as cpu_select
from merge_engine.cpu import tile_grid as cpu_tile
from merge_engine.cpu.keep import Drop, MergeSpec, Trim
from merge_engine.cpu.mask import keep_mask
from merge_engine.cpu.merge import merge_deltas
from merge_engine.cpu.merge_several import merge_several
from merge_engine.cpu.merge_tile_by_loops import terms
from merge_engine.cpu.select import SAMPLE, trims, trims_of_each
from merge_engine.cpu.source import Dense, Difference, Product
from merge_engine.loops import door
from merge_engine.rules import reference
from merge_engine.rules.rule import make_rule

loops = pytest.importorskip("merge_engine.loops.tile_loops", exc_type=ImportError)
examples = settings(deadline=None, derandomize=True, max_examples=30)
METHODS = ["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"]


def both(monkeypatch, compute, *sources):
    """What `compute(*sources)` gives with the loops, and without of what the loops made of products."""
    assert door.loops() is not None
    compiled = compute(*sources)
    values = [Dense(whole(source)) if isinstance(source, Product) else source for source in sources]
    with monkeypatch.context() as patch:
        patch.setattr(door, "installed", lambda: False)
        return compiled, compute(*values)


def same_bits(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(cpu_tile, "TILE_ROWS", 8)
    monkeypatch.setattr(cpu_tile, "TILE_ELEMENTS", 128)
    monkeypatch.setattr(cpu_select, "SAMPLE", 64)


@pytest.mark.parametrize("convention", ["peft", "mergekit", "paper"])
@pytest.mark.parametrize("method", METHODS)
def test_merges_are_the_same(method, convention, monkeypatch, small_tiles):
    @examples
    @given(data=st.data())
    def check(data):
        rows, columns, count = (data.draw(st.integers(1, most)) for most in (37, 61, 5))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        integers = data.draw(st.booleans())  # thousands of equal magnitudes, and votes of zero

        def draw(*shape):
            values = torch.randn(*shape, generator=generator)
            return values.round() if integers else values

        sources = []
        for _ in range(count):
            kind = data.draw(st.sampled_from(["product", "dense", "difference"]))
            if kind == "product":
                sources.append(Product(draw(4, columns), draw(rows, 4), 0.7))
            elif kind == "dense":
                sources.append(Dense(draw(rows, columns).bfloat16()))
            else:
                sources.append(Difference(draw(rows, columns), draw(rows, columns)))
        rule = make_rule(
            method,
            convention=convention,
            election=data.draw(st.sampled_from(["total", "frequency"])),
            trim_ties=data.draw(st.sampled_from(["exact", "keep"])),
        )
        weights = data.draw(st.lists(st.sampled_from([1.0, 0.7, -1.3, 0.0]), min_size=count, max_size=count))
        density = data.draw(st.sampled_from([0.01, 0.3, 0.9, 1.0]))
        scale, tied = data.draw(st.sampled_from([1.0, 0.3, -2.0])), data.draw(st.sampled_from([1, -1]))

        def compute(*sources):
            keeps = [None] * count
            if rule.keep == "magnitude" and density < 1:
                keeps = [trims([s], rule.kept(density, rows * columns), rule.trim_ties)[0] for s in sources]
            elif rule.keep == "bernoulli":
                keeps = [Drop(density, 7, 5, i, data_factor) for i in range(count)]
            return keeps, merge_deltas(sources, weights, keeps, rule, scale=scale, tied=tied)

        data_factor = data.draw(st.sampled_from([None, 1.7]))
        (keeps, compiled), (other_keeps, operators) = both(monkeypatch, compute, *sources)
        assert keeps == other_keeps
        assert same_bits(compiled, operators)

    check()


@pytest.mark.parametrize("method", METHODS)
def test_chunks_blocks_and_groups_of_terms_are_the_same(method):
    """Rows longer than a chunk, more rows than a block, three groups of four terms, and trims that end anywhere."""

    @settings(examples, max_examples=25)
    @given(data=st.data())
    def check(data):
        rows, count = data.draw(st.integers(1, 21)), data.draw(st.integers(1, 9))
        columns = data.draw(st.sampled_from([1, 2, 255, 256, 257, 511, 512, 513, 700]))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        products_only = data.draw(st.booleans())
        values = st.sampled_from([0.0, 2.0**-149, 0.7, 1.0, float("inf")])
        places = st.integers(0, rows), st.integers(0, columns)
        weights = st.lists(st.sampled_from([1.0, 0.7, -1.3, 0.0]), min_size=count, max_size=count)

        def draw(*shape):
            return torch.randn(*shape, generator=generator).mul_(2).round().div_(2)

        def source():
            kind = "product" if products_only else data.draw(st.sampled_from(["product", "dense", "difference"]))
            if kind == "product":
                rank = data.draw(st.integers(1, 17))
                return Product(draw(rank, columns), draw(rows, rank), 0.7)
            first = draw(rows, columns)
            return Dense(first.bfloat16()) if kind == "dense" else Difference(first, draw(rows, columns))

        def keep(adapter):
            if method in ("magnitude_prune", "ties") and data.draw(st.booleans()):
                return Trim(data.draw(values), *map(data.draw, places))
            if method in ("dare_linear", "dare_ties") and data.draw(st.booleans()):
                return Drop(data.draw(st.sampled_from([0.3, 1.0])), 2**63 + 5, 5, adapter, data.draw(factors))
            return None

        factors = st.sampled_from([None, 1.7])
        sources, keeps = [source() for _ in range(count)], tuple(map(keep, range(count)))
        rule = make_rule(
            method,
            convention=data.draw(st.sampled_from(["peft", "mergekit"])),
            election=data.draw(st.sampled_from(["total", "frequency"])),
        )
        tied = data.draw(st.sampled_from([1, -1]))
        asks = [MergeSpec(tuple(data.draw(weights)), keeps, rule, tied) for _ in range(2)]
        out = data.draw(st.sampled_from(["new", "strided", "transposed", "base"]))
        scale = data.draw(st.sampled_from([1.0, -2.0, 0.0]))

        def compute(*sources):
            base = torch.ones(rows, columns, dtype=torch.bfloat16) if out == "base" else None
            outs = {"strided": torch.zeros(rows, columns + 3)[:, 1:-2], "transposed": torch.zeros(columns, rows).T}
            merged = merge_deltas(
                sources, asks[0].weights, keeps, rule, scale=scale, tied=tied, base=base, out=outs.get(out, base)
            )
            return [merged.float().contiguous(), *merge_several(sources, asks)]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu_tile, "LEAST_ELEMENTS", data.draw(st.sampled_from([1 << 16, 1500])))
            held = data.draw(st.sampled_from([1 << 19, 3000, 100]))
            for module in (cpu_tile_by_loops, cpu_merge_several):
                patch.setattr(module, "HELD", held)
            for ours, theirs in zip(*both(patch, compute, *sources), strict=True):
                assert same_bits(ours, theirs)

    check()


def test_thresholds_of_a_batch_are_those_of_each_source_alone():
    """Of sources whose samples tell all, nothing, or what is wrong."""
    generator = torch.Generator().manual_seed(19)
    rows, columns = 300, 700
    misleading = torch.randn(rows, columns, generator=generator)
    misleading[::3] *= 1e-3  # these rows are what is sampled
    infinite = torch.randn(rows, columns, generator=generator)
    infinite[:, ::7] = float("inf")
    matrices = [
        torch.randn(rows, columns, generator=generator),
        torch.zeros(rows, columns),
        torch.full((rows, columns), -2.5),
        misleading,
        infinite,
        torch.randn(4, 5, generator=generator),  # too small for a sample
    ]
    ks = [[int(density * matrix.numel()) for density in (0, 0.1, 0.3, 0.99)] for matrix in matrices]
    with pytest.MonkeyPatch.context() as patch:
        found, by_operators = both(patch, lambda: trims_of_each([Dense(m) for m in matrices], ks, "exact"))
    assert found == by_operators
    for matrix, own, thresholds in zip(matrices, ks, found, strict=True):
        for k, trim in zip(own, thresholds, strict=True):
            kept = merge_deltas([Dense(matrix)], [1.0], [trim], make_rule("linear"))
            assert torch.equal(kept, reference.trim(matrix, k, "exact"))


def test_more_adapters_than_a_byte_counts(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    sources = [Dense(torch.randn(5, 9, generator=generator)) for _ in range(300)]
    rule = make_rule("ties")
    compiled, operators = both(monkeypatch, lambda: merge_deltas(sources, [1.0] * 300, [None] * 300, rule))
    assert same_bits(compiled, operators)
    stacked = torch.stack([source.matrix for source in sources]).double()
    agree = stacked.sign() == stacked.sum(0).sign()
    assert int(agree.sum(0).max()) > 255 / 2
    assert torch.allclose(compiled.double(), (stacked * agree).sum(0) / agree.sum(0), atol=1e-5)


@examples
@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 3.0e-40, -3.0e-40, 2.0**-126, 3.0e38]), max_size=40),
    k=st.integers(1, 40),
    shape=st.sampled_from([(1, 1), (2, 1), (1, 2)]),
)
def test_thresholds_are_the_same_for_awkward_values(values, k, shape):
    values = torch.tensor(values or [0.0]).repeat(shape)
    k = min(k, values.numel())
    with pytest.MonkeyPatch.context() as patch:
        compiled, operators = both(patch, lambda: trims([Dense(values)], k, "exact"))
    assert compiled == operators


@pytest.mark.quick
@pytest.mark.parametrize("ties", ["exact", "keep"])
@pytest.mark.parametrize("rounded", [False, True])
def test_the_sampled_bracket_is_the_same(ties, rounded, monkeypatch):
    generator = torch.Generator().manual_seed(11)
    A, B = torch.randn(8, 700, generator=generator), torch.randn(300, 8, generator=generator)
    source = Product(A.round() if rounded else A, B.round() if rounded else B, 0.5)
    assert source.rows * source.columns >= 4 * SAMPLE
    for k in (1, 1000, 42000, 209_999):
        compiled, operators = both(monkeypatch, lambda source, k=k: trims([source], k, ties), source)
        assert compiled == operators


@examples
@given(
    density=st.sampled_from([2**-30, 0.2, 0.5, 1 - 2**-20]),
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**32 - 1),
    adapter=st.integers(0, 2**32 - 1),
    top=st.integers(0, 2**32 - 8),
    left=st.integers(0, 2**32 - 91),
    rows=st.integers(0, 7),
    columns=st.integers(0, 90),
)
def test_masks_are_the_same(density, seed, stream, adapter, top, left, rows, columns):
    with pytest.MonkeyPatch.context() as patch:
        compiled, operators = both(
            patch,
            lambda: keep_mask(
                density,
                seed=seed,
                stream=stream,
                adapter=adapter,
                rows=range(top, top + rows),
                columns=range(left, left + columns),
            ),
        )
    assert torch.equal(compiled, operators)


@pytest.mark.quick
def test_a_mask_may_have_any_strides(monkeypatch):
    def compute():
        out = torch.zeros(9, 30, dtype=torch.bool)
        keep_mask(0.5, seed=1, stream=2, adapter=3, rows=range(9), columns=range(3, 13), out=out[:, 1:30:3])
        return out

    compiled, operators = both(monkeypatch, compute)
    assert torch.equal(compiled, operators) and not compiled[:, 2::3].any()


@examples
@given(
    rows=st.integers(1, 21), columns=st.integers(1, 700), rank=st.integers(1, 40), scaling=st.sampled_from([1.0, 0.3])
)
def test_products_add_their_terms_in_order(rows, columns, rank, scaling):
    generator = torch.Generator().manual_seed(rank)
    A, B = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
    total = torch.zeros(rows, columns)
    for k in range(rank):
        total += B[:, k : k + 1] * A[k]
    assert torch.equal(whole(Product(A, B, scaling)), total * np.float32(scaling).item())


@pytest.mark.quick
def test_bracket_finds_what_is_inside():
    generator = np.random.default_rng(5)
    values = generator.standard_normal((17, 590)).astype(np.float32)
    ends = np.array([[0.4, 0.9], [0.0, 0.1], [2.0, np.inf]], np.float32)
    lows, highs = ends.view(np.uint32).T.copy()
    found, counts = np.zeros((3, values.size + 1), np.uint32), np.zeros((3, 2), np.int64)
    term = terms([Dense(torch.from_numpy(values))])
    term["b"] = values.ctypes.data
    loops.bracket_tile(term, 0, 17, 0, 590, lows, highs - lows, found, counts)
    magnitude = np.abs(values)
    for (low, high), (above, count), row in zip(ends, counts, found, strict=True):
        inside = (magnitude >= low) & (magnitude <= high)
        assert above == (magnitude > high).sum() and count == inside.sum() > 0
        assert np.array_equal(np.sort(row[:count].view(np.float32)), np.sort(magnitude[inside]))


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 250])
def test_what_is_inside_is_collected_in_order(size):
    """Sixteen at a time, where the CPU can, and one by one, with nothing written behind the whole."""
    generator = np.random.default_rng(size)
    values = generator.standard_normal(size).astype(np.float32)
    values[::7], values[3::11] = np.inf, -0.0
    bits = values.view(np.uint32)
    magnitudes = bits & np.uint32(0x7FFFFFFF)
    ends = np.array([0, 1, 0x3E800000, 0x3F000000, 0x3F800000, 0x7F800000, 0x7FC00000, 0x7FFFFFFF], np.uint32)
    for low, high in [(low, high) for low in ends for high in ends if low <= high]:
        inside = magnitudes[(magnitudes >= low) & (magnitudes <= high)]
        for collect in {loops._collect, loops._collect_one_by_one}:
            found = np.full(size + 9, 7, np.uint32)
            found[:3] = 5
            above, count = collect(bits.ctypes.data, size, low, np.uint32(high - low), found.ctypes.data, 3)
            assert above == (magnitudes > high).sum() and count == 3 + len(inside)
            assert np.array_equal(found[3 : int(count)], inside)
            assert (found[:3] == 5).all() and (found[size + 4 :] == 7).all()


@pytest.mark.quick
def test_what_is_not_a_number_stays(monkeypatch):
    """Terms that overflow to Inf - Inf: an error further on, and no silent zero."""
    source = Product(torch.full((2, 5), 1e30), torch.tensor([[1e30, -1e30]] * 3), 1.0)
    for keep in (None, Trim(0.5, 1, 2)):
        compiled, operators = both(
            monkeypatch, lambda keep=keep: merge_deltas([source], [1.0], [keep], make_rule("linear"))
        )
        assert compiled.isnan().all() and not operators.isfinite().any()  # a BLAS that fuses ends at Inf
