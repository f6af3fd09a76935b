"""Low-rank factors against a dense SVD in float64. U and V are never compared, only products, errors and energies."""

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merge_engine.loops import door
from merge_engine.lowrank import krylov as lowrank_krylov
from merge_engine.lowrank.core import LowRank, leading, product_norm
from merge_engine.lowrank.krylov import _BLUR, first_space, from_matrix
from merge_engine.lowrank.products import times
from merge_engine.lowrank.stack import Stack, from_products
from merge_engine.runtime.threads import threads

U32 = 2.0**-24
U64 = 2.0**-53

# Rounding B = U S and the orthonormal rows of A to float32 moves the product by |dB A + B dA|_F <=
# |dB|_F |A|_2 + (sum_i s_i^2 |da_i|^2)^(1/2) <= 2 U32 |B A|_F, to first order.
ROUNDING = 2.01 * U32


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_factors(seed: int, m: int, n: int, ranks: list[int], dtype: torch.dtype = torch.float32):
    g = generator(seed)
    As = [torch.randn(r, n, generator=g, dtype=torch.float64).to(dtype) for r in ranks]
    Bs = [torch.randn(m, r, generator=g, dtype=torch.float64).to(dtype) for r in ranks]
    return As, Bs


def summed(As, Bs, weights) -> Tensor:
    return sum(w * (B.double() @ A.double()) for A, B, w in zip(As, Bs, weights, strict=True))


def with_spectrum(m: int, n: int, spectrum: Tensor, seed: int = 0) -> Tensor:
    g = generator(seed)
    k = len(spectrum)
    u = torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64))[0]
    return ((u * spectrum.double()) @ v.T).float()


def ties_delta(m: int, n: int, seed: int = 0, density: float = 0.2) -> tuple[Tensor, Tensor]:
    """Three deltas of rank 16 with half their factors shared, trimmed, elected and averaged; and their stacked A."""
    g = generator(seed)

    def factors() -> tuple[Tensor, Tensor]:
        return torch.randn(m, 16, generator=g) * torch.logspace(0, -1.5, 16), torch.randn(16, n, generator=g)

    shared_B, shared_A = factors()
    total, votes, As = [], [], []
    for _ in range(3):
        B, A = factors()
        As.append((shared_A + A) / 2)
        delta = (shared_B + B) / 2 @ As[-1]
        threshold = delta.abs().flatten().kthvalue(int((1 - density) * delta.numel())).values
        total.append(torch.where(delta.abs() > threshold, delta, 0))
    stacked = torch.stack(total)
    sign = torch.where(stacked.sum(0) >= 0, 1, -1)
    votes = stacked.sign() == sign
    return (stacked * votes).sum(0) / votes.sum(0).clamp(min=1), torch.cat(As)


def squares_of(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix.double()).square()


def least_error(squares: Tensor, k: int) -> float:
    return float(squares[k:].sum().sqrt())


def error_of(result: LowRank, matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.double() - result.B.double() @ result.A.double()))


def check_form(result: LowRank, m: int, n: int, k: int) -> None:
    A, B, energy = result
    assert A.shape == (k, n) and B.shape == (m, k)
    for factor in (A, B):
        assert factor.dtype == torch.float32 and factor.is_contiguous() and factor.isfinite().all()
        assert factor.untyped_storage().nbytes() == 4 * factor.numel()
    # Rounding moves a product of two unit rows by 2 U32 at most, and of two columns by that share of their lengths.
    assert torch.allclose(A.double() @ A.double().T, torch.eye(k, dtype=torch.float64), rtol=0, atol=2.1 * U32)
    lengths = torch.linalg.vector_norm(B.double(), dim=0)
    assert ((B.double().T @ B.double() - lengths.square().diag()).abs() <= 2.1 * U32 * lengths.outer(lengths)).all()
    assert (lengths.diff() <= 2 * U32 * lengths[:-1]).all()
    assert isinstance(energy, float) and 0 <= energy <= 1


def check_energy(result: LowRank, matrix: Tensor, slack: float) -> None:
    total = matrix.double().square().sum()
    kept = (result.B.double() @ result.A.double()).square().sum() / total if total > 0 else 1.0
    assert abs(result.energy - float(kept)) <= slack


# --- sums of products


@settings(max_examples=150, deadline=None)
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


def test_a_sum_of_full_rank_is_kept_to_the_rounding_of_its_factors():
    As, Bs = random_factors(1, 700, 300, [16, 16, 8, 4])
    weights = [0.3, -1.2, 2.0, 1.0]
    exact = summed(As, Bs, weights)
    result = from_products(As, Bs, weights, rank=44)
    check_form(result, 700, 300, 44)
    assert error_of(result, exact) <= ROUNDING * float(exact.norm())
    assert result.energy == 1.0


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


# --- dense matrices


def check_against_svd(matrix: Tensor, start: Tensor, rank: int) -> LowRank:
    m, n = matrix.shape
    result = from_matrix(matrix, start, rank)
    k = min(rank, m, n)
    check_form(result, m, n, k)
    norm = float(matrix.double().norm())
    least = least_error(squares_of(matrix), k)
    # What is promised: half of tolerance 1e-5 in the error, and 1e-4 is enough by far. Where the error is all rounding:
    # that of the factors, and of D^T U in float32, about sqrt(M) U32 a product (Higham and Mary, 2019).
    slack = (2 + math.sqrt(max(m, n))) * U32 * norm
    assert least * (1 - 1e-9) - 4 * U32 * norm <= error_of(result, matrix) <= 1.0001 * least + slack
    check_energy(result, matrix, slack / max(norm, 1e-300))
    return result


@pytest.mark.parametrize("shape", [(512, 768), (384, 1024), (1100, 300)])
@pytest.mark.parametrize("rank", [4, 16, 48])
def test_ties_deltas(shape, rank):
    matrix, start = ties_delta(*shape)
    result = check_against_svd(matrix, start, rank)
    assert result.energy < 0.9


def test_ties_delta_needs_few_passes(monkeypatch):
    widths = []

    def counted(block: Tensor, matrix: Tensor) -> Tensor:
        widths.append(len(block))
        return times(block, matrix)

    monkeypatch.setattr(lowrank_krylov, "times", counted)
    check_against_svd(*ties_delta(512, 768), rank=16)
    assert widths[0] == 48 + 8 and set(widths[1:]) == {16} and len(widths) <= 8


N = 200
SPECTRA = {
    "flat": torch.ones(N),
    "power": 1 / torch.arange(1.0, N + 1),
    "linear": 1 - torch.arange(N) / N,
    "geometric": torch.logspace(0, -4, N),
    "rank 1": torch.ones(1),
    "rank 7": torch.logspace(0, -2, 7),
    "rank 12, repeated": torch.ones(12),
    "12 repeated above a plateau": torch.cat([torch.ones(12), torch.full((N - 12,), 0.9)]),
    "3 repeated at the cut": torch.cat([torch.ones(11), torch.full((3,), 0.5), torch.full((N - 14,), 0.1)]),
    "noise of a thousandth": torch.cat([torch.logspace(0, -1, 12), torch.full((N - 12,), 1e-4)]),
    "the last one tiny": torch.cat([torch.ones(11), torch.full((1,), 1e-2), torch.full((N - 12,), 1e-3)]),
}
STARTS = {
    "none": torch.empty(0, N),
    "zero": torch.zeros(16, N),
    "one row many times": torch.ones(48, N),
    "random": torch.randn(24, N, generator=generator(8)),
    "whole space and more": torch.randn(2 * N, N, generator=generator(9)),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("rank", [1, 12])
def test_hard_spectra_and_useless_starts(spectrum, start, rank):
    check_against_svd(with_spectrum(260, N, SPECTRA[spectrum]), STARTS[start], rank)


def test_a_repeated_value_of_more_vectors_than_the_start_has_rows():
    spectrum = torch.cat([torch.ones(16), torch.full((484,), 0.9)])
    check_against_svd(with_spectrum(600, 500, spectrum), torch.zeros(4, 500), 16)


def test_a_start_without_the_leading_vectors():
    matrix = with_spectrum(260, N, SPECTRA["geometric"])
    vh = torch.linalg.svd(matrix, full_matrices=False).Vh
    check_against_svd(matrix, vh[-48:], 12)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_matrices_of_extreme_size(scale):
    matrix, start = ties_delta(256, 384)
    check_against_svd(matrix * scale, start * scale, 16)
    check_against_svd(matrix * scale, start, 64)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    m=st.sampled_from([1, 2, 3, 17, 97, 150, 311]),
    n=st.sampled_from([1, 2, 5, 31, 128, 263]),
    p=st.integers(0, 40),
    rank=st.sampled_from([1, 2, 5, 8, 17, 64, 400]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_any_shape_rank_and_start(seed, m, n, p, rank, dtype):
    g = generator(seed)
    start = torch.randn(p, n, generator=g).to(dtype)
    matrix = torch.randn(m, n, generator=g) * 0.1 + torch.randn(m, p, generator=g) @ start.float()
    check_against_svd(matrix, start, rank)


@pytest.mark.parametrize(
    ("seed", "m", "n", "p", "rank"),
    [(390708, 311, 263, 4, 5), (558077, 311, 263, 3, 5), (759126, 150, 263, 1, 2), (568239, 311, 128, 1, 2)],
)
def test_vectors_that_have_converged_do_not_spoil_the_rest(seed, m, n, p, rank):
    """Their residuals are rounding alone: kept in the space, they made it lose its orthogonality, and energy fell."""
    g = generator(seed)
    start = torch.randn(p, n, generator=g).bfloat16()
    matrix = torch.randn(m, n, generator=g) * 0.1 + torch.randn(m, p, generator=g) @ start.float()
    check_against_svd(matrix, start, rank)


@pytest.mark.parametrize("shape", [(260, 200), (1, 9), (9, 1), (30, 30)])
@pytest.mark.parametrize("energy", [None, 0.99])
def test_a_zero_matrix(shape, energy):
    result = from_matrix(torch.zeros(shape), torch.zeros(4, shape[1]), 5, energy)
    check_form(result, *shape, min(5, *shape) if energy is None else 1)
    assert result.energy == 1.0 and not result.B.any()


def test_a_matrix_of_any_strides():
    matrix, start = ties_delta(300, 260)
    strided = torch.zeros(520, 300)[::2].copy_(matrix.T).T
    assert not strided.is_contiguous()
    check_against_svd(strided, start, 8)
    check_against_svd(strided, start, 100)


@pytest.mark.parametrize("rank", [16, 60])
def test_the_result_is_a_function_of_the_input(rank):
    matrix, start = ties_delta(300, 400)
    kept = matrix.clone(), start.clone()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = from_matrix(matrix, start, rank)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = from_matrix(matrix, start, rank)
    assert torch.equal(first.A, second.A) and torch.equal(first.B, second.B) and first.energy == second.energy
    assert torch.equal(matrix, kept[0]) and torch.equal(start, kept[1])


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.75, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("kind", ["ties", "power", "rank 7", "flat"])
def test_energy_chooses_the_rank_of_a_matrix(kind, energy):
    matrix, start = ties_delta(420, 300) if kind == "ties" else (with_spectrum(260, N, SPECTRA[kind]), STARTS["random"])
    n = min(matrix.shape)
    squares = squares_of(matrix)
    kept = squares.cumsum(0) / squares.sum()
    for rank in (5, 40, n):
        result = from_matrix(matrix, start, rank, energy)
        k = len(result.A)
        check_form(result, *matrix.shape, k)
        # The captured energy is within the tolerance of the most that k can capture, and rounding is some 1e-8.
        slack = 1e-5 * (1 - float(kept[k - 1])) + 1e-7
        assert k == min(rank, n) or result.energy >= energy
        assert k == 1 or kept[k - 2] < energy + slack
        assert abs(result.energy - float(kept[k - 1])) <= slack
        check_energy(result, matrix, 1e-7)


def test_energy_is_found_by_growing_blocks(monkeypatch):
    """40 of 1000 vectors keep 99 %: the space grows from 16 to 40 or more, and no Gram matrix is made."""
    spectrum = torch.cat([torch.full((40,), 1.0), torch.full((960,), 0.02)])
    matrix = with_spectrum(1000, 1000, spectrum)
    squares = squares_of(matrix)
    kept = squares.cumsum(0) / squares.sum()
    monkeypatch.delattr(lowrank_krylov, "_eigen")
    result = from_matrix(matrix, torch.empty(0, 1000), 1000, 0.98)
    k = len(result.A)
    assert kept[k - 2] < 0.98 <= kept[k - 1]
    assert k == 40


def test_steps_that_do_not_suffice_are_reported(monkeypatch, caplog):
    matrix = with_spectrum(260, N, SPECTRA["linear"])
    with caplog.at_level(logging.WARNING):
        from_matrix(matrix, STARTS["random"], 2)
        assert not caplog.records
        monkeypatch.setattr(lowrank_krylov, "_MAX_STEPS", 3)
        check_form(from_matrix(matrix, STARTS["random"], 2), 260, N, 2)
    (record,) = caplog.records
    assert "after 3 steps" in record.getMessage() and "[260, 200]" in record.getMessage()


# --- what is refused


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
        ([torch.full((2, 3), 1e30)], [torch.full((4, 2), 1e30)], [1.0], "does not fit float32"),
    ],
)
def test_products_refused(As, Bs, weights, message):
    with pytest.raises(ValueError, match=message):
        from_products(As, Bs, weights, 2)


@pytest.mark.parametrize(
    ("matrix", "start", "options", "message"),
    [
        (torch.ones(4, 3).double(), torch.ones(2, 3), {}, "float64"),
        (torch.ones(4), torch.ones(2, 4), {}, r"matrix is \[4\]"),
        (torch.ones(0, 4), torch.ones(2, 4), {}, "no empty side"),
        (torch.ones(4, 3), torch.ones(2, 4), {}, r"start is \[2, 4\]"),
        (torch.full((4, 3), math.nan), torch.ones(2, 3), {}, "not finite"),
        (torch.ones(4, 3), torch.full((2, 3), math.inf), {}, "not finite"),
        (torch.ones(4, 3), torch.ones(2, 3), {"rank": 0}, "rank is 0"),
        (torch.ones(4, 3), torch.ones(2, 3), {"energy": 0.0}, "energy is 0.0"),
        (torch.ones(4, 3), torch.ones(2, 3), {"energy": 1.01}, "energy is 1.01"),
        (torch.ones(4, 3), torch.ones(2, 3), {"energy": math.nan}, "energy is nan"),
        (torch.ones(4, 3), torch.ones(2, 3), {"tolerance": 0.0}, "tolerance is 0.0"),
    ],
)
def test_matrices_refused(matrix, start, options, message):
    with pytest.raises(ValueError, match=message):
        from_matrix(matrix, start, **({"rank": 2} | options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 31, 4), (40, 9, 17)])
def test_product_norm_is_the_dense_one(shape, dtype):
    rows, columns, rank = shape
    generator = torch.Generator().manual_seed(rank)
    A, B = (torch.randn(*s, generator=generator).to(dtype) for s in ((rank, columns), (rows, rank)))
    # Two float64 sums of at most N and M terms: 1e-12 is far above their rounding.
    assert product_norm(A, B) == pytest.approx((B.double() @ A.double()).norm().item(), rel=1e-12)
    assert product_norm(A, torch.zeros_like(B)) == 0.0


# --- stacks whose weights change


def orthonormal(m: int, k: int, g: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64))[0]


def graded(seed: int, m: int, n: int, ranks: list[int], exponents: list[float], mixed: bool):
    """Factors in float64 of a matrix with singular values 10**exponents, split by ranks; mixed: none is one's own."""
    g = generator(seed)
    r = sum(ranks)
    s = 10.0 ** torch.tensor([exponents[i % len(exponents)] for i in range(r)], dtype=torch.float64)
    turn = orthonormal(r, r, g) if mixed else torch.eye(r, dtype=torch.float64)
    left = torch.randn(m, r, generator=g, dtype=torch.float64) if m < r else orthonormal(m, r, g)
    right = torch.randn(n, r, generator=g, dtype=torch.float64) if n < r else orthonormal(n, r, g)
    B, A = left * s @ turn, turn.T @ right.T
    return list(A.split(ranks)), list(B.split(ranks, dim=1))


def summands(As, Bs, weights) -> float:
    """sum |w_i| |B_i|_F |A_i|_F"""
    return sum(abs(w) * float(A.norm() * B.norm()) for A, B, w in zip(As, Bs, weights, strict=True))


# What float64 loses in core^2 moves the error by sqrt(2 k |core core^T - its eigenvectors'|): of a few units of U64
# each, for the ranks below, less than this share of |D|_F; and where products cancel, a few units of U64 of these.
SQUARED = 2.0**-25


@settings(max_examples=200, deadline=None)
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


@settings(max_examples=100, deadline=None)
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


def test_few_leading_vectors_are_those_of_a_full_svd():
    """Ranks on both sides of a quarter of the core, of values that are apart: found in the span of eigenvectors."""
    g = generator(11)
    core = orthonormal(64, 64, g) * torch.logspace(0, -3, 64, dtype=torch.float64) @ orthonormal(64, 50, g)
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    for rank in (1, 15, 16, 17, 50, 64):
        found = leading(core, rank, None)
        k = min(rank, 50)
        assert found.u.shape == (64, k) and found.s.shape == (k,) and found.vh.shape == (k, 50)
        want = u[:, :k] * s[:k] @ vh[:k]
        assert float((found.u * found.s @ found.vh - want).norm()) <= 1e-10
        assert torch.allclose(found.s, s[:k], rtol=1e-10, atol=0)
        assert found.kept == pytest.approx(float(s[:k].square().sum() / s.square().sum()), abs=1e-13)
        for vectors in (found.u.T, found.vh):
            assert torch.allclose(vectors @ vectors.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-13)


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


# --- rows beyond the rank that a sum has


def check_same(got: LowRank, want: LowRank) -> None:
    assert torch.equal(got.A, want.A) and torch.equal(got.B, want.B) and got.energy == want.energy


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


@pytest.mark.parametrize("scale", [1e-140, 1.0, 1e140])
def test_few_leading_vectors_of_a_core_of_any_size(scale):
    """As long as the squares of its values are float64."""
    core = orthonormal(32, 32, generator(24)) * torch.logspace(0, -2, 32, dtype=torch.float64) * scale
    core = core @ orthonormal(32, 32, generator(25))
    found, squares = leading(core, 5, None), squares_of(core / scale)
    assert torch.allclose(found.s, scale * squares[:5].sqrt(), rtol=1e-10, atol=0)
    assert found.kept == pytest.approx(float(squares[:5].sum() / squares.sum()), abs=1e-12)
    assert len(leading(core, 8, 0.9).s) == 1 + int((squares.cumsum(0) / squares.sum() < 0.9).sum())


# --- what an iteration begins with


@pytest.mark.parametrize("rows", [0, 3, 20, 60, 200])
@pytest.mark.parametrize("shape", [(300, 240), (240, 900)], ids=str)
@pytest.mark.parametrize("k", [1, 20])
def test_the_first_space(rows, shape, k):
    start = torch.randn(rows, shape[1], generator=generator(31), dtype=torch.float64)
    kept = start.clone()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    space = first_space(start, shape, k)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(start, kept)
    # 8 Gaussian rows beside the start, or as many as make it k + 8 wide; of more than 60 rows, 60 sums.
    assert space.shape == (max(min(rows, 60) + 8, k + 8), shape[1]) and space.dtype == torch.float64
    assert torch.allclose(space @ space.T, torch.eye(len(space), dtype=torch.float64), rtol=0, atol=1e-13)
    beside = torch.linalg.vector_norm(start - start @ space.T @ space, dim=1)
    if rows <= 60:
        assert bool((beside <= 1e-12 * torch.linalg.vector_norm(start, dim=1)).all())
    else:  # 60 directions of the start's, and those of 8 Gaussians
        inside = torch.linalg.matrix_rank(torch.cat([start, space])) - torch.linalg.matrix_rank(start)
        assert int(inside) == 8
    assert torch.equal(first_space(start, shape, k), space)


@pytest.mark.parametrize("start", STARTS)
def test_the_first_space_of_a_useless_start(start):
    space = first_space(STARTS[start].double(), (260, N), 12)
    assert torch.allclose(space @ space.T, torch.eye(len(space), dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("rank", "energy"), [(16, None), (16, 0.5), (30, 0.9)])
def test_a_space_that_is_known_changes_no_bit(rank, energy):
    """It is asked for once, with the start as given, even where the block grows; and it is left as it was."""
    matrix, start = ties_delta(500, 400)
    start, asked = start[:20], []
    want = from_matrix(matrix, start, rank, energy)

    def space(*asks):
        asked.append(asks)
        return known

    k = rank if energy is None else min(rank, 20)
    known = first_space(start.double(), (500, 400), k)
    before = known.clone()
    check_same(from_matrix(matrix, start, rank, energy, space=space), want)
    ((got, shape, width),) = asked
    assert torch.equal(got, start.double()) and shape == (500, 400) and width == k
    assert torch.equal(known, before)


# --- on one thread, where loops multiply


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("start", ["none", "random"])
def test_hard_spectra_on_one_thread(spectrum, start, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(door, "loops", lambda: None)
    matrix = with_spectrum(260, N, SPECTRA[spectrum])
    with threads(1):
        for each in (matrix, matrix.T.contiguous().T):
            check_against_svd(each, STARTS[start], 12)
        check_against_svd(matrix, STARTS[start], 40)  # by the Gram matrix


@pytest.mark.parametrize("shape", [(512, 768), (1100, 300)], ids=str)
def test_one_thread_and_two_agree(shape):
    """The iteration takes the same steps, and what it finds differs by the rounding of products in float32."""
    matrix, start = ties_delta(*shape)
    for rank in (4, 16):
        found = []
        for count in (1, 2):
            with threads(count):
                found.append(check_against_svd(matrix, start, rank))
        one, two = found
        assert one.energy == pytest.approx(two.energy, abs=2 * _BLUR)
        assert abs(error_of(one, matrix) / error_of(two, matrix) - 1) <= 1e-7
