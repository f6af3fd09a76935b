"""Dense matrices, cut to a rank by a Krylov iteration, against a dense SVD in float64."""

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from low_rank import (
    SIDE,
    SPECTRA,
    STARTS,
    U32,
    check_energy,
    check_form,
    check_same,
    error_of,
    generator,
    least_error,
    squares_of,
    ties_delta,
    with_spectrum,
)
from torch import Tensor

from merge_engine.loops import door
from merge_engine.lowrank import krylov as lowrank_krylov
from merge_engine.lowrank.krylov import _BLUR, first_space, from_matrix
from merge_engine.lowrank.products import times
from merge_engine.lowrank.small_svd import LowRank
from merge_engine.runtime.threads import threads


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


@pytest.mark.quick
def test_ties_delta_needs_few_passes(monkeypatch):
    widths = []

    def counted(block: Tensor, matrix: Tensor) -> Tensor:
        widths.append(len(block))
        return times(block, matrix)

    monkeypatch.setattr(lowrank_krylov, "times", counted)
    check_against_svd(*ties_delta(512, 768), rank=16)
    assert widths == [48 + 8, *[20] * 5]
    widths.clear()
    check_against_svd(*ties_delta(300, 260), rank=16)  # it ends after half a step
    assert widths == [48 + 8, *[20] * 6]
    widths.clear()
    from_matrix(*ties_delta(300, 260), 16, tolerance=0.1)  # the third gain says that it suffices
    assert widths == [48 + 8, 20, 20, 20]


@pytest.mark.quick
def test_the_excess_is_of_the_error_and_not_of_the_whole():
    """Eight large values have all but 1e-5 of the energy: what is left is cut as well as if they were not there."""
    spectrum = torch.cat([torch.full((8,), 300.0), SPECTRA["geometric"][: SIDE - 8]])
    check_against_svd(with_spectrum(260, SIDE, spectrum), torch.zeros(0, SIDE), 12)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("rank", [1, 12])
def test_hard_spectra_and_useless_starts(spectrum, start, rank):
    check_against_svd(with_spectrum(260, SIDE, SPECTRA[spectrum]), STARTS[start], rank)


def test_a_repeated_value_of_more_vectors_than_the_start_has_rows():
    spectrum = torch.cat([torch.ones(16), torch.full((484,), 0.9)])
    check_against_svd(with_spectrum(600, 500, spectrum), torch.zeros(4, 500), 16)


def test_a_start_without_the_leading_vectors():
    matrix = with_spectrum(260, SIDE, SPECTRA["geometric"])
    vh = torch.linalg.svd(matrix, full_matrices=False).Vh
    check_against_svd(matrix, vh[-48:], 12)


@pytest.mark.parametrize(("first", "rank"), [(1, 1), (8, 4), (30, 12)])
@pytest.mark.parametrize("spectrum", ["linear", "geometric", "flat"])
def test_a_start_of_exact_vectors_that_are_not_the_leading_ones(spectrum, first, rank):
    """They have converged at once. Larger ones are found by what else is in the space, unless by a hair only."""
    matrix = with_spectrum(260, SIDE, SPECTRA[spectrum])
    vh = torch.linalg.svd(matrix.double(), full_matrices=False).Vh
    check_against_svd(matrix, vh[first : first + 40], rank)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_matrices_of_extreme_size(scale):
    matrix, start = ties_delta(256, 384)
    check_against_svd(matrix * scale, start * scale, 16)
    check_against_svd(matrix * scale, start, 64)


@settings(max_examples=60, deadline=None)
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


@pytest.mark.quick
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
    matrix, start = (
        ties_delta(420, 300) if kind == "ties" else (with_spectrum(260, SIDE, SPECTRA[kind]), STARTS["random"])
    )
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


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("energy", [1.0, 1 - 2.0**-30])
@pytest.mark.parametrize(("kind", "whole"), [("rank 7", 7), ("rank 12, repeated", 12), ("geometric", SIDE)])
def test_energy_1_is_the_numerical_rank_on_any_number_of_threads(kind, whole, energy, count):
    """Singular values down to 1e-4 of the largest are kept, though they are 1e-8 of its energy; rounding is not."""
    matrix = with_spectrum(260, SIDE, SPECTRA[kind])
    with threads(count):
        for rank in (5, 16, 40, SIDE):
            result = from_matrix(matrix, STARTS["random"], rank, energy)
            check_form(result, 260, SIDE, min(rank, whole))
            assert result.energy == 1 or rank <= whole
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
    matrix = with_spectrum(260, SIDE, SPECTRA["linear"])
    with caplog.at_level(logging.WARNING):
        from_matrix(matrix, STARTS["random"], 2)
        assert not caplog.records
        monkeypatch.setattr(lowrank_krylov, "_MAX_STEPS", 3)
        check_form(from_matrix(matrix, STARTS["random"], 2), 260, SIDE, 2)
    (record,) = caplog.records
    assert "after 3 steps" in record.getMessage() and "[260, 200]" in record.getMessage()


@pytest.mark.parametrize(
    ("matrix", "start", "options", "message"),
    [
        (torch.ones(4, 3).double(), torch.ones(2, 3), {}, "float64"),
        (torch.ones(4), torch.ones(2, 4), {}, r"matrix is \[4\]"),
        (torch.ones(0, 4), torch.ones(2, 4), {}, "no empty side"),
        (torch.ones(4, 3), torch.ones(2, 4), {}, r"start is \[2, 4\]"),
        (torch.full((4, 3), math.nan), torch.ones(2, 3), {}, "not finite"),
        (torch.ones(4, 3), torch.full((2, 3), math.inf), {}, "not finite"),
        (torch.full((4, 3), 2e38), torch.ones(2, 3), {}, "products overflow float32"),
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
    space = first_space(STARTS[start].double(), (260, SIDE), 12)
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


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("start", ["none", "random"])
def test_hard_spectra_on_one_thread(spectrum, start, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(door, "installed", lambda: False)
    matrix = with_spectrum(260, SIDE, SPECTRA[spectrum])
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
