"""Stacked factors of a group, decomposed at once, against a dense SVD in float64 and against `Stack`."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from low_rank import (
    ROUNDING,
    SQUARED,
    U64,
    check_energy,
    check_form,
    error_of,
    graded,
    least_error,
    random_factors,
    squares_of,
    summands,
    summed,
)
from operators import Operators
from small_adapters import adapters
from torch import Tensor

from merge_engine.lowrank.batched_stack import _MISSED, Stacks
from merge_engine.lowrank.core_methods import CORE_METHODS
from merge_engine.lowrank.cores import Cores
from merge_engine.lowrank.small_svd import LowRank, svd_of
from merge_engine.lowrank.stack import Stack


def stacks_of(modules) -> Stacks:
    """Of modules (As, Bs), whose ranks agree."""
    rows = torch.stack([torch.cat(As) for As, _ in modules])
    columns = torch.stack([torch.cat([B.T for B in Bs]) for _, Bs in modules])
    return Stacks(rows, columns, [len(A) for A in modules[0][0]])


def product(result: LowRank) -> Tensor:
    return result.B.double() @ result.A.double()


def apart(got: LowRank, want: LowRank) -> float:
    return float((product(got) - product(want)).norm())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    m=st.integers(10, 60),
    n=st.integers(10, 60),
    ranks=st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(lambda ranks: 0 < sum(ranks) <= 10),
    weights=st.lists(st.sampled_from([1.0, 0.5, -1.0, 0.0, 3.7, -1e-6, 1e8]), min_size=4, max_size=4),
    rank=st.integers(1, 60),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
def test_sums_are_cut_as_by_a_dense_svd(seed, m, n, ranks, weights, rank, dtype):
    weights = weights[: len(ranks)]
    modules = [random_factors(seed + i, m, n, ranks, dtype) for i in range(3)]
    strengths = [weights, [2 * w for w in weights], weights[::-1]]
    cuts = stacks_of(modules).cut(strengths, rank)[0]
    for i, ((As, Bs), own) in enumerate(zip(modules, strengths, strict=True)):
        exact, result = summed(As, Bs, own), cuts.of(i)
        k = min(rank, sum(ranks))
        assert result is not None
        check_form(result, m, n, k)
        norm, of_summands = float(exact.norm()), summands([A.double() for A in As], [B.double() for B in Bs], own)
        slack = (ROUNDING + SQUARED) * norm + 2 * _MISSED * of_summands
        least = least_error(squares_of(exact), k)
        assert least - slack <= error_of(result, exact) <= least + slack
        if norm > 1e-6 * of_summands:
            check_energy(result, exact, 2 * ROUNDING + 1e-8)


def kinds() -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Modules of 40 x 50 of three adapters, which Cholesky's factors fail for or not."""
    As, Bs = random_factors(1, 40, 50, [4, 3, 5], torch.float64)
    near = [A.clone() for A in As]
    near[2][:4] = As[0] + 1e-3 * near[2][:4]
    lost = [A.clone() for A in As]
    lost[2][:4] = As[0] + 1e-10 * lost[2][:4]
    equal = [As[0], As[0][:3], torch.cat([As[0], As[0][:1]])]
    nothing = [torch.zeros_like(B) for B in Bs]
    wrong = [A.clone() for A in As]
    wrong[1][2, 3] = math.inf
    return {
        "apart": (As, Bs),
        "nearly equal A": (near, Bs),
        "equal A": (equal, Bs),
        "zero B": (As, [Bs[0], nothing[1], Bs[2]]),
        "all zero": (As, nothing),
        "equal adapters": ([As[0], As[0][:3], As[2]], [Bs[0], Bs[0][:, :3], Bs[2]]),
        "of all sizes": ([1e-20 * As[0], 1e20 * As[1], As[2]], [1e18 * Bs[0], 1e-18 * Bs[1], Bs[2]]),
        "equal but for 1e-10": (lost, Bs),
        "not finite": (wrong, Bs),
    }


FOUND = {name: name not in ("equal but for 1e-10", "not finite") for name in kinds()}


@pytest.fixture(scope="module")
def group() -> Stacks:
    return stacks_of(list(kinds().values()))


def test_what_is_found(group):
    """Rows between equal and apart lose more than `Stack` does, and are left to it, as is what is no number."""
    assert group.found == list(FOUND.values()) and len(group) == len(FOUND)
    cuts = group.cut([[1.0] * 3] * len(FOUND), 12)[0]
    assert [cuts.of(i) is not None for i in range(len(FOUND))] == group.found
    unfolded = group.unfold([svd_of(torch.eye(12).double())] * len(FOUND), [0.0] * len(FOUND), 12)[0]
    assert [unfolded.of(i) is not None for i in range(len(FOUND))] == group.found


@pytest.mark.parametrize("kind", [name for name, found in FOUND.items() if found])
@pytest.mark.parametrize(("rank", "energy"), [(12, None), (5, None), (12, 0.8), (3, 0.99), (100, None)])
def test_sums_agree_with_those_of_one_stack(group, kind, rank, energy):
    (As, Bs), i = kinds()[kind], list(FOUND).index(kind)
    for weights in ([1.0, -0.5, 2.0], [0.0, 1.0, 0.0], [0.7, -0.7, 0.0]):
        got = group.cut([weights] * len(group), rank, energy)[0].of(i)
        want = Stack(As, Bs).cut(weights, rank, energy)
        scale = summands(As, Bs, weights)
        assert got is not None and got.A.shape == want.A.shape and got.B.shape == want.B.shape
        check_form(got, 40, 50, len(want.A))
        # Each is rounded once; singular values that both take for zero, or one of them, are below 2**-43 of the sum.
        assert apart(got, want) <= 2 * ROUNDING * float(product(want).norm()) + 12 * 2.0**-43 * scale
        assert got.energy == pytest.approx(want.energy, abs=1e-12)


@pytest.mark.parametrize("method", CORE_METHODS)
@pytest.mark.parametrize("kind", [name for name, found in FOUND.items() if found])
def test_methods_on_cores_agree_with_those_of_one_stack(group, kind, method):
    (As, Bs), i = kinds()[kind], list(FOUND).index(kind)
    stack, weights, scalings = Stack(As, Bs), [1.0, 0.5, 2.0], [0.5, 2.0, 1.0]
    want = CORE_METHODS[method](Cores(stack, scalings), weights)
    # A flat spectrum may be cut anywhere; whole, it is one matrix.
    for rank in (12,) if method in ("iso_c", "tsv_iso") else (12, 5, 3):
        got = CORE_METHODS[method](Cores(group.triangles(i), scalings), weights, rank)
        assert got.rank == want.rank
        if want.smallest is not None:
            assert got.smallest == pytest.approx(want.smallest, rel=1e-9)
        cores = [got.svd if each == i else None for each in range(len(group))]
        cuts, _ = group.unfold(cores, [got.noise] * len(group), rank)
        one, other = cuts.of(i), stack.unfold(want.core, rank, None, want.noise)
        assert one is not None and one.A.shape == other.A.shape
        check_form(one, 40, 50, rank)
        # Polar factors grow disturbances by the inverse of their smallest singular value, here above 1e-4.
        assert apart(one, other) <= (2 * ROUNDING + 1e-9) * float(product(other).norm())
        assert one.energy == pytest.approx(other.energy, abs=1e-9)
    assert [k > 0 for k in cuts.ranks] == [each == i for each in range(len(group))]


@settings(max_examples=40, deadline=None)
@given(given=adapters(), method=st.sampled_from(["tsv", "actmat", "karcher"]))
def test_any_adapters_on_cores(given, method):
    """Shared A, equal adapters, zero ones, negative weights and those of 0."""
    shape = len(given.Bs[0]), given.As[0].shape[1]
    if sum(map(len, given.As)) > min(shape):
        with pytest.raises(ValueError, match="no more than M and N"):
            stacks_of([(given.As, given.Bs)])
        return
    stacks, stack = stacks_of([(given.As, given.Bs)]), Stack(given.As, given.Bs)
    assert stacks.found == [True]
    merged = [CORE_METHODS[method](Cores(each, given.scalings), given.weights) for each in (stacks.triangles(0), stack)]
    got = stacks.unfold([merged[0].svd], [merged[0].noise], 60)[0].of(0)
    want = stack.unfold(merged[1].core, 60, None, merged[1].noise)
    assert got is not None and merged[0].rank == merged[1].rank
    grown = 1 / min(merged[1].smallest or 1.0, 1.0)
    assert apart(got, want) <= (2 * ROUNDING + 1e-12 * grown**2) * float(product(want).norm())


def test_the_exponents_of_a_spectrum_survive():
    """Singular values down to 1e-6 of the largest, from factors that mix them, agree in their share with the dense."""
    modules = [graded(seed, 60, 70, [6, 6], [0, -2, -4, -6], mixed) for seed, mixed in ((0, True), (1, False))]
    cuts = stacks_of(modules).cut([[1.0, 1.0]] * 2, 12)[0]
    for i, (As, Bs) in enumerate(modules):
        exact, result = summed(As, Bs, [1.0, 1.0]), cuts.of(i)
        assert result is not None
        values = torch.linalg.svdvals(exact)[:12]
        lengths = torch.linalg.vector_norm(result.B.double(), dim=0)
        # float64 blurs each by a few units of the largest, beside the rounding of a column.
        assert bool(((lengths - values).abs() <= 2.0**-23 * values + 1000 * U64 * values[0]).all())


def test_a_result_that_overflows_float32_is_not_found():
    As, Bs = random_factors(3, 20, 30, [4], torch.float32)
    cuts = stacks_of([(As, Bs), (As, Bs), (As, Bs)]).cut([[1.0], [1e38], [math.nan]], 4)[0]
    assert cuts.of(0) is not None and cuts.of(1) is None and cuts.of(2) is None


def test_a_module_is_the_same_in_any_company():
    modules = list(kinds().values())
    together = stacks_of(modules).cut([[1.0, -0.5, 2.0]] * len(modules), 7)[0]
    for i, module in enumerate(modules):
        alone, other = stacks_of([module]).cut([[1.0, -0.5, 2.0]], 7)[0].of(0), together.of(i)
        assert (alone is None) == (other is None)
        if alone is not None and other is not None:
            assert torch.equal(alone.A, other.A) and torch.equal(alone.B, other.B) and alone.energy == other.energy


def test_the_device_gets_few_operators_and_waits_twice(monkeypatch):
    """Whatever the group: the small cores are the host's, and what is done to them is not counted here."""
    copies: list[torch.Size] = []
    to_host = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: (copies.append(self.shape), to_host(self))[1])
    found = []
    stacks_of([random_factors(0, 40, 50, [4, 4])])  # identities are made once
    for count in (2, 9):
        modules = [random_factors(seed, 40, 50, [4, 4]) for seed in range(count)]
        rows = torch.stack([torch.cat(As) for As, _ in modules])
        columns = torch.stack([torch.cat([B.T for B in Bs]) for _, Bs in modules])
        copies.clear()
        with Operators() as operators:
            stacks = Stacks(rows, columns, [4, 4])
        found.append(operators.total)
        assert len(copies) == 1
        with Operators() as operators:
            stacks.cut([[1.0, 1.0]] * count, 8)
        assert operators.counts["aten.bmm.default"] == 2 and len(copies) == 2
    assert found[0] == found[1] < 100


@pytest.mark.parametrize(
    ("rows", "columns", "ranks", "message"),
    [
        (torch.ones(4, 9), torch.ones(1, 4, 8), [4], "wanted"),
        (torch.ones(1, 4, 9), torch.ones(2, 4, 8), [4], r"wanted \[G, R, N\]"),
        (torch.ones(0, 4, 9), torch.ones(0, 4, 8), [4], "wanted"),
        (torch.ones(1, 0, 9), torch.ones(1, 0, 8), [], "wanted"),
        (torch.ones(1, 4, 9), torch.ones(1, 4, 8), [3], "wanted a sum of 4"),
        (torch.ones(1, 4, 9), torch.ones(1, 4, 3), [4], "no more than M and N"),
    ],
)
def test_shapes_refused(rows, columns, ranks, message):
    with pytest.raises(ValueError, match=message):
        Stacks(rows, columns, ranks)


def test_requests_refused():
    stacks = stacks_of([random_factors(0, 20, 30, [4])])
    with pytest.raises(ValueError, match="rank is 0"):
        stacks.cut([[1.0]], 0)
    with pytest.raises(ValueError, match="energy is 2"):
        stacks.unfold([svd_of(torch.eye(4).double())], [0.0], 3, 2.0)
