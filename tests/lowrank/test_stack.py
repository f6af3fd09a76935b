"""Sums of products, cut to a rank, against a dense SVD in float64."""

import math

import numpy as np
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
    check_same,
    error_of,
    generator,
    graded,
    least_error,
    random_factors,
    squares_of,
    summands,
    summed,
)

from merge_engine.lowrank.stack import Stack, from_products

U = 2**-24  # unit roundoff of float32


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    ranks=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    weights=st.lists(st.sampled_from([1.0, 0.5, -1.0, 0.0, 3.7, -1e-6, 1e8]), min_size=6, max_size=6),
    rank=st.integers(1, 60),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
def test_products_are_cut_as_by_a_dense_svd(seed, m, n, ranks, weights, rank, dtype):
    weights = weights[: len(ranks)]
    As, Bs = random_factors(seed, m, n, ranks, dtype)
    exact = summed(As, Bs, weights)
    result = from_products(As, Bs, weights, rank)
    k = min(rank, m, n, sum(ranks))
    check_form(result, m, n, k)
    norm = float(exact.norm())
    summands = sum(
        abs(w) * float(A.double().norm() * B.double().norm()) for A, B, w in zip(As, Bs, weights, strict=True)
    )
    # Householder QR and SVD of at most 54 columns, here and in the reference: a small multiple of 54 U64 each.
    slack = ROUNDING * norm + 1000 * U64 * summands
    least = least_error(squares_of(exact), k)
    assert least - slack <= error_of(result, exact) <= least + slack
    if norm > 1e-6 * summands:
        check_energy(result, exact, 2 * ROUNDING + 1e-8)


@pytest.mark.quick
def test_a_sum_of_full_rank_is_kept_to_the_rounding_of_its_factors():
    As, Bs = random_factors(1, 700, 300, [16, 16, 8, 4])
    weights = [0.3, -1.2, 2.0, 1.0]
    exact = summed(As, Bs, weights)
    result = from_products(As, Bs, weights, rank=44)
    check_form(result, 700, 300, 44)
    assert error_of(result, exact) <= ROUNDING * float(exact.norm())
    assert result.energy == 1.0


@pytest.mark.quick
def test_products_that_cancel():
    """D is a millionth of its summands: float32 would keep nothing of it."""
    As, Bs = random_factors(2, 90, 70, [8, 3], torch.float64)
    exact = 1e-6 * Bs[0] @ As[0]
    result = from_products([As[0], As[0]], [Bs[0], Bs[0]], [1 + 1e-6, -1], rank=16)
    # The weights themselves are rounded: 1 + 1e-6 is off by U64, or 1e-10 of D.
    assert error_of(result, exact) <= (ROUNDING + 1e-9) * float(exact.norm())
    nothing = from_products([As[0], As[0]], [Bs[0], Bs[0]], [1.0, -1.0], rank=4)
    check_form(nothing, 90, 70, 4)
    assert nothing.energy == 1.0 and not nothing.B.any()


@pytest.mark.parametrize("energy", [None, 0.99, 1.0])
def test_a_zero_sum(energy):
    result = from_products([torch.zeros(4, 9)], [torch.zeros(7, 4)], [1.0], rank=3, energy=energy)
    check_form(result, 7, 9, 3 if energy is None else 1)
    assert result.energy == 1.0 and not result.B.any()


def test_any_basis_of_the_factors_gives_the_same_product():
    """(B G, G^-1 A) is the same adapter as (B, A)."""
    As, Bs = random_factors(3, 60, 50, [8, 8], torch.float64)
    g = generator(4)
    plain = from_products(As, Bs, [0.7, -0.2], rank=9)
    mixed_As, mixed_Bs = [], []
    for A, B in zip(As, Bs, strict=True):
        G = torch.randn(8, 8, generator=g, dtype=torch.float64)
        mixed_As.append(torch.linalg.solve(G, A))
        mixed_Bs.append(B @ G)
    mixed = from_products(mixed_As, mixed_Bs, [0.7, -0.2], rank=9)
    # Float64 loses some 1e-13 in G and its inverse, and the gap after the ninth value (checked) turns that into no
    # more than 1e-11 of the product.
    squares = squares_of(summed(As, Bs, [0.7, -0.2]))
    assert squares[9] < 0.95 * squares[8]
    difference = (plain.B.double() @ plain.A.double() - mixed.B.double() @ mixed.A.double()).norm()
    assert float(difference) <= 2 * ROUNDING * float(squares.sum().sqrt())
    assert mixed.energy == pytest.approx(plain.energy, abs=1e-12)


def test_mixed_ranks_equal_ranks_padded_with_zeros():
    As, Bs = random_factors(5, 33, 47, [2, 16, 5])
    padded_As = [torch.nn.functional.pad(A, (0, 0, 0, 16 - len(A))) for A in As]
    padded_Bs = [torch.nn.functional.pad(B, (0, 16 - B.shape[1])) for B in Bs]
    weights = [1.0, 0.5, 2.0]
    mixed, padded = (from_products(*factors, weights, rank=23) for factors in ((As, Bs), (padded_As, padded_Bs)))
    norm = float(summed(As, Bs, weights).norm())
    difference = (mixed.B.double() @ mixed.A.double() - padded.B.double() @ padded.A.double()).norm()
    assert float(difference) <= 2 * ROUNDING * norm
    assert mixed.energy == pytest.approx(padded.energy, abs=1e-14)


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), energy=st.floats(0.01, 1.0), rank=st.integers(1, 20))
def test_energy_chooses_the_rank_of_a_sum(seed, energy, rank):
    As, Bs = random_factors(seed, 30, 20, [4, 6])
    squares = squares_of(summed(As, Bs, [1.0, -0.3]))[:10]
    kept = squares.cumsum(0) / squares.sum()
    result = from_products(As, Bs, [1.0, -0.3], rank, energy)
    k = len(result.A)
    check_form(result, 30, 20, k)
    # Singular values agree to 1e-13 of the largest, and so do sums of their squares.
    assert k == min(rank, 10) or kept[k - 1] >= energy - 1e-12
    assert k == 1 or kept[k - 2] < energy + 1e-12
    assert result.energy == pytest.approx(float(kept[k - 1]), abs=1e-12)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_products_of_extreme_size(scale):
    As, Bs = random_factors(6, 20, 30, [3, 3])
    As = [A * scale for A in As]
    result = from_products(As, Bs, [1.0, 1.0], rank=6)
    exact = summed(As, Bs, [1.0, 1.0])
    assert error_of(result, exact) <= ROUNDING * float(exact.norm())
    assert result.energy == 1.0


@pytest.mark.parametrize(
    ("As", "Bs", "weights", "message"),
    [
        ([], [], [], "at least one"),
        ([torch.ones(2, 3)], [torch.ones(4, 2)], [1.0, 2.0], "2 weights"),
        ([torch.ones(2, 3)], [torch.ones(4, 3)], [1.0], r"A\[0\] is \[2, 3\]"),
        ([torch.ones(3)], [torch.ones(4, 1)], [1.0], r"A\[0\] is \[3\]"),
        ([torch.ones(2, 3), torch.ones(1, 4)], [torch.ones(4, 2), torch.ones(4, 1)], [1.0, 1.0], r"wanted \[4, 3\]"),
        ([torch.ones(0, 3)], [torch.ones(4, 0)], [1.0], "no empty side"),
        ([torch.full((2, 3), math.nan)], [torch.ones(4, 2)], [1.0], "not finite"),
        ([torch.full((2, 3), math.inf)], [torch.zeros(4, 2)], [1.0], "not finite"),
        ([torch.ones(2, 3)], [torch.ones(4, 2)], [math.nan], "not finite"),
        ([torch.full((2, 3), 1e30)], [torch.full((4, 2), 1e30)], [1.0], "overflows float32"),
    ],
)
def test_products_refused(As, Bs, weights, message):
    with pytest.raises(ValueError, match=message):
        from_products(As, Bs, weights, 2)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    m=st.integers(1, 60),
    n=st.integers(1, 60),
    ranks=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    exponents=st.lists(st.floats(-12, 0), min_size=1, max_size=6),
    mixed=st.booleans(),
    copies=st.integers(1, 3),
    weights=st.lists(st.sampled_from([1.0, -0.5, 0.0, 1e-7, -1e6]), min_size=5, max_size=5),
    again=st.lists(st.sampled_from([1.0, -1.0, -1.0 + 2**-30, 1e-3, 0.0]), min_size=2, max_size=2),
    rank=st.integers(1, 70),
    scale=st.sampled_from([1.0, 1e-15, 1e15]),
)
def test_stacks_of_any_condition_are_cut_as_by_a_dense_svd(
    seed, m, n, ranks, exponents, mixed, copies, weights, again, rank, scale
):
    """Singular values from 1 to 1e-12 of the first, adapters that come twice, and weights with which they cancel."""
    As, Bs = graded(seed, m, n, ranks, exponents, mixed)
    As = [A * scale for A in As]
    own = weights[: len(ranks)]
    weights = [w * x for x in (1.0, *again)[:copies] for w in own]
    As, Bs = As * copies, Bs * copies
    exact, size = summed(As, Bs, weights), summands(As, Bs, weights)
    result = from_products(As, Bs, weights, rank)
    k = min(rank, m, n, sum(map(len, As)))
    check_form(result, m, n, k)
    norm = float(exact.norm())
    slack = (ROUNDING + SQUARED) * norm + 1000 * U64 * size
    least = least_error(squares_of(exact), k)
    assert least - slack <= error_of(result, exact) <= least + slack
    if norm > 1e-6 * size:
        check_energy(result, exact, 2 * ROUNDING + 1e-8)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    ranks=st.sampled_from([[16, 16, 16, 16], [40], [7, 30, 5]]),
    slope=st.floats(0.0, 12.0),
    rank=st.integers(1, 24),
    energy=st.one_of(st.floats(0.01, 1.0), st.just(1.0), st.floats(1e-12, 1e-3).map(lambda x: 1 - x)),
)
def test_energy_chooses_the_rank_whatever_the_spectrum(seed, ranks, slope, rank, energy):
    """The values beyond those that are found count: whether few or most are asked for."""
    r = sum(ranks)
    As, Bs = graded(seed, 80, 70, ranks, [-slope * i / r for i in range(r)], True)
    squares = squares_of(summed(As, Bs, [1.0] * len(ranks)))[:r]
    kept = squares.cumsum(0) / squares.sum()
    result = from_products(As, Bs, [1.0] * len(ranks), rank, energy)
    k = len(result.A)
    check_form(result, 80, 70, k)
    # Eigenvalues below r 2 U64 of the first count as none: r of them come to less than r^2 2 U64 = 1e-12 of all.
    assert k == min(rank, r) or kept[k - 1] >= energy - 2e-12
    assert k == 1 or kept[k - 2] < energy + 2e-12
    assert result.energy == pytest.approx(float(kept[k - 1]), abs=2e-12)


@pytest.mark.parametrize("smallest", [1e-2, 2.1e-6, 1.1e-6, 0.9e-6, 1e-8, 1e-13, 0.0])
@pytest.mark.parametrize("rank", [3, 10, 12, 48])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_form_holds_down_to_the_smallest_value(smallest, rank, mixed):
    """On both sides of where A is no longer found by a division by S; the largest value apart, all kept are small."""
    exponent = math.log10(smallest) if smallest else -400.0
    spread = [0.0, *(exponent + 0.01 * i for i in range(2, rank)), *(exponent for _ in range(49 - rank))][:48]
    As, Bs = graded(7, 90, 75, [12, 12, 12, 12], spread, mixed)
    exact = summed(As, Bs, [1.0] * 4)
    result = from_products(As, Bs, [1.0] * 4, rank)
    check_form(result, 90, 75, rank)
    least, norm = least_error(squares_of(exact), rank), float(exact.norm())
    assert error_of(result, exact) <= least + (ROUNDING + SQUARED) * norm
    # Of few values the squares are found, and of many they themselves: to some units of U64 of the largest. The latter
    # count as zero below 2**-51 48 sum_i |B_i|_F |A_i|_F.
    s, lengths = squares_of(exact)[:rank].sqrt(), torch.linalg.vector_norm(result.B.double(), dim=0)
    if 4 * rank <= 48:
        assert ((lengths.square() - s.square()).abs() <= 2 * ROUNDING * s.square() + 50 * U64 * norm**2).all()
    else:
        assert ((lengths - s).abs() <= ROUNDING * s + 4 * 48 * U64 * summands(As, Bs, [1.0] * 4)).all()


@pytest.mark.quick
def test_a_weight_of_zero_leaves_no_trace():
    """Not even of an adapter 1e20 times as large, in whose rounding all others would drown."""
    As, Bs = random_factors(12, 60, 50, [8, 8, 8], torch.float64)
    Bs[1] *= 1e20
    exact = summed(As, Bs, [1.0, 0.0, -0.5])
    for rank in (4, 16):
        result = from_products(As, Bs, [1.0, 0.0, -0.5], rank)
        check_form(result, 60, 50, rank)
        least, norm = least_error(squares_of(exact), rank), float(exact.norm())
        assert error_of(result, exact) <= least + (ROUNDING + SQUARED) * norm
        assert result.energy == pytest.approx(1 - least**2 / norm**2, abs=1e-9)


@pytest.mark.parametrize("ranks", [[8, 8, 8, 8], [9, 31, 40]])
def test_a_stack_is_as_it_was_after_every_cut(ranks):
    """The bits of a cut depend on its weights alone, not on the cuts before it, and the stack's factors are its own."""
    As, Bs = random_factors(13, 45, 52, ranks, torch.float64)
    kept = [tensor.clone() for tensor in (*As, *Bs)]
    stack = Stack(As, Bs)
    asked = [
        ([1.0] * len(ranks), 8, None),
        ([0.0] * len(ranks), 3, None),
        ([0.3, -1.0, *[2.0] * (len(ranks) - 2)], 40, 0.9),
    ]
    first = [stack.cut(*each) for each in asked]
    for tensor in (*As, *Bs):
        tensor.fill_(math.nan)
    for each, want in zip(asked, first, strict=True):
        got = stack.cut(*each)
        fresh = from_products(kept[: len(ranks)], kept[len(ranks) :], *each)
        for other in (got, fresh):
            assert torch.equal(other.A, want.A) and torch.equal(other.B, want.B) and other.energy == want.energy


@pytest.mark.parametrize("shape", [(9, 9), (31, 12), (12, 31), (6, 40)], ids=str)
@pytest.mark.parametrize("left", [0, 1, 3])
def test_rows_beyond_the_rank_of_a_sum(shape, left):
    """All but one adapter, of so many ranks, have weight 0; the rows that complete A may span all that there is."""
    m, n = shape
    As, Bs = random_factors(21, m, n, [left, 4, 17], torch.float64)
    stack = Stack(As, Bs)
    weights = [-0.5, 0.0, 0.0]
    exact = summed(As, Bs, weights)
    for rank in (1, 3, 5, 8, min(m, n), 100):
        result, k = stack.cut(weights, rank), min(rank, m, n, left + 21)
        check_form(result, m, n, k)
        least = least_error(squares_of(exact), k) if left else 0.0
        assert error_of(result, exact) <= least + ROUNDING * float(exact.norm()) + 1e-13
        assert not result.B[:, left:].any() and int(result.B.any(dim=0).sum()) == min(k, left)
        check_same(stack.cut(weights, rank), result)
        check_same(from_products(As, Bs, weights, rank), result)


def test_rows_beyond_the_rank_leave_random_numbers_alone():
    As, Bs = random_factors(22, 30, 20, [2, 5])
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(from_products(As, Bs, [1.0, 0.0], 7))
        assert torch.equal(torch.get_rng_state(), state)
    check_same(*found)


@pytest.mark.parametrize("energy", [0.5, 1.0])
def test_energy_asks_for_no_row_beyond_the_rank(energy):
    """Adapters whose A or B are multiples of one another: the sum has rank 3 of 12."""
    As, Bs = random_factors(23, 40, 30, [3], torch.float64)
    As, Bs = [As[0], 2 * As[0], As[0], As[0]], [Bs[0], Bs[0], -Bs[0], 3 * Bs[0]]
    exact = summed(As, Bs, [1.0, 0.3, 0.2, 0.1])
    kept = squares_of(exact).cumsum(0) / float(exact.square().sum())
    result = from_products(As, Bs, [1.0, 0.3, 0.2, 0.1], 12, energy)
    check_form(result, 40, 30, len(result.A))
    assert len(result.A) <= 3 and float(kept[len(result.A) - 1]) >= energy - 1e-12
    plain = from_products(As, Bs, [1.0, 0.3, 0.2, 0.1], 12)
    check_form(plain, 40, 30, 12)
    assert error_of(plain, exact) <= ROUNDING * float(exact.norm())


@given(
    shape=st.sampled_from([(1, 7), (13, 5), (31, 41), (97, 29)]),
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rank=st.integers(1, 40),
    seed=st.integers(0, 99),
)
@settings(max_examples=30)
def test_a_stack_cuts_sums_of_products_as_a_dense_svd_does(shape, ranks, dtype, rank, seed):
    """Against numpy's SVD of the dense sum in float64; factors of any weights come from one decomposition."""
    generator = torch.Generator().manual_seed(seed)
    As = [torch.randn(r, shape[1], generator=generator).to(dtype) for r in ranks]
    Bs = [torch.randn(shape[0], r, generator=generator).to(dtype) for r in ranks]
    stack = Stack(As, Bs)
    for weights in torch.randn(2, len(ranks), generator=generator, dtype=torch.float64).tolist():
        dense = sum(w * (B.double() @ A.double()) for w, A, B in zip(weights, As, Bs, strict=True)).numpy()
        s = np.linalg.svd(dense, compute_uv=False)
        A, B, energy = stack.cut(weights, rank)
        k = min(rank, *shape, sum(ranks))
        assert A.shape == (k, shape[1]) and B.shape == (shape[0], k)
        assert energy == pytest.approx((s[:k] ** 2).sum() / (s**2).sum(), abs=1e-12)
        error = np.linalg.norm(dense - B.double().numpy() @ A.double().numpy())
        best = math.sqrt((s[k:] ** 2).sum())
        # The factors' rounding moves the product by 2 u |D_k|, and what of it lies in the rest adds in quadrature.
        assert error <= best + 2 * U * math.sqrt((s[:k] ** 2).sum()) + 1e-12 * s[0]
        wanted = 0.8
        least = 1 + int((np.cumsum(s**2) / (s**2).sum() < wanted).sum())
        assert len(stack.cut(weights, sum(ranks), wanted).A) == min(least, sum(ranks))


def test_a_stack_whose_products_cancel_is_zero():
    A, B = torch.randn(3, 17), torch.randn(11, 3)
    result = Stack([A, A], [B, B]).cut([0.7, -0.7], 4)
    assert not result.B.any() and result.energy == 1.0


def test_a_stack_refuses_what_does_not_fit():
    A, B = torch.randn(3, 17), torch.randn(11, 3)
    for As, Bs in (([], []), ([A], [B, B]), ([A], [B.T]), ([A, A[:, 1:]], [B, B]), ([A * math.inf], [B])):
        with pytest.raises(ValueError, match=r"wanted|not finite"):
            Stack(As, Bs)
    for weights, rank in (([], 1), ([1.0], 0), ([math.nan], 1)):
        with pytest.raises(ValueError, match=r"wanted|not finite"):
            Stack([A], [B]).cut(weights, rank)
    with pytest.raises(ValueError, match="overflows float32"):
        Stack([A], [B]).cut([1e39], 3)
