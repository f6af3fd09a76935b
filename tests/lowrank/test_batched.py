"""Groups of dense matrices, cut to a rank at once, against a dense SVD in float64 of each."""

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
    error_of,
    generator,
    least_error,
    squares_of,
    ties_delta,
    with_spectrum,
)
from operators import Operators
from torch import Tensor

from merge_engine.lowrank import batched
from merge_engine.lowrank.batched import Cuts, _filtered, cut_matrices
from merge_engine.lowrank.krylov import from_matrix
from merge_engine.lowrank.small_svd import LowRank
from merge_engine.runtime.threads import threads


def check(result: LowRank, matrix: Tensor, rank: int) -> None:
    m, n = matrix.shape
    k = min(rank, m, n)
    check_form(result, m, n, k)
    norm = float(matrix.double().norm())
    least = least_error(squares_of(matrix), k)
    # What is promised: half of tolerance 1e-5 in the error, and 1e-4 is enough by far. Where the error is all rounding:
    # that of the factors, and as much again for an excess of 2**-46 |D|_F^2, which is not looked for.
    slack = 4.02 * U32 * norm
    assert least * (1 - 1e-9) - slack <= error_of(result, matrix) <= 1.0001 * least + slack
    check_energy(result, matrix, slack / max(norm, 1e-300))


def check_all(matrices: Tensor, cuts: Cuts, rank: int) -> list[bool]:
    """Checks all that were found; which were."""
    found = [cuts.of(i) for i in range(len(matrices))]
    for matrix, result in zip(matrices, found, strict=True):
        if result is not None:
            check(result, matrix, rank)
    return [result is not None for result in found]


def check_same(got: Cuts, i: int, want: Cuts, j: int) -> None:
    """The results of one module agree but for what rounding to float32 and sums in another order change."""
    assert got.ranks[i] == want.ranks[j]
    if got.ranks[i]:
        assert got.energies[i] == pytest.approx(want.energies[j], rel=1e-12)
        one, other = ((cuts.B[k].double() @ cuts.A[k].double()) for cuts, k in ((got, i), (want, j)))
        assert float((one - other).norm()) <= 4 * U32 * float(other.norm())


def ties_deltas(m: int, n: int) -> tuple[Tensor, Tensor]:
    pairs = [ties_delta(m, n, seed=seed, density=density) for seed, density in enumerate((0.2, 0.5, 0.8))]
    return torch.stack([matrix for matrix, _ in pairs]), torch.stack([start for _, start in pairs])


@pytest.mark.parametrize("shape", [(512, 768), (384, 1024), (1100, 300)])
@pytest.mark.parametrize("rank", [4, 16, 48])
def test_ties_deltas(shape, rank):
    matrices, start = ties_deltas(*shape)
    cuts = cut_matrices(matrices, start, rank)
    assert check_all(matrices, cuts, rank) == [True] * 3
    for matrix, rows, energy in zip(matrices, start, cuts.energies, strict=True):
        # Each is within the tolerance of the best, and the other's products in float32 blur what it captures.
        assert abs(energy - from_matrix(matrix, rows, rank).energy) <= 1e-5 * (1 - energy) + 2.0**-26


# Subspaces converge by the ratio of singular values: these spectra are as flat at the cut as 200 columns allow.
NOT_FOUND = {("linear", 1), ("linear", 12), ("12 repeated above a plateau", 1), ("12 repeated above a plateau", 12)}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("rank", [1, 12])
def test_hard_spectra_and_useless_starts(start, rank):
    """All in one group."""
    matrices = torch.stack([with_spectrum(260, SIDE, spectrum) for spectrum in SPECTRA.values()])
    cuts = cut_matrices(matrices, STARTS[start].expand(len(matrices), -1, -1), rank)
    found = check_all(matrices, cuts, rank)
    assert all(each or (name, rank) in NOT_FOUND for name, each in zip(SPECTRA, found, strict=True))


@pytest.mark.parametrize("shape", [(260, 200), (150, 263), (311, 97), (30, 30), (1, 9), (9, 1)])
@pytest.mark.parametrize("share", [1.0, 0.9, 0.3])
def test_ranks_near_the_smaller_side(shape, share):
    """By the Gram matrix of the shorter side: every matrix is found, whatever its spectrum."""
    rank = max(1, round(share * min(shape)))
    kinds = [with_spectrum(*shape, spectrum[: min(shape)]) for spectrum in SPECTRA.values()]
    matrices = torch.stack([*kinds, torch.zeros(shape)])
    cuts = cut_matrices(matrices, torch.zeros(len(matrices), 4, shape[1]), rank)
    assert all(check_all(matrices, cuts, rank))


def test_a_repeated_value_of_more_vectors_than_the_start_has_rows():
    matrix = with_spectrum(600, 500, torch.cat([torch.ones(16), torch.full((484,), 0.7)]))
    assert check_all(matrix[None], cut_matrices(matrix[None], torch.zeros(1, 4, 500), 16), 16) == [True]


@pytest.mark.parametrize("last", [16, 48])
def test_a_start_without_the_leading_vectors(last):
    matrix = with_spectrum(260, SIDE, SPECTRA["geometric"])
    start = torch.linalg.svd(matrix, full_matrices=False).Vh[-last:]
    assert check_all(matrix[None], cut_matrices(matrix[None], start[None], 12), 12) == [True]


def test_a_start_that_is_exactly_apart_from_the_leading_vectors():
    """No product and no rounding turns it to them: the noise in the start does."""
    matrix = torch.logspace(0, -4, SIDE).diag()
    assert check_all(matrix[None], cut_matrices(matrix[None], torch.eye(SIDE)[None, -48:], 12), 12) == [True]


def test_filters_are_polynomials_of_chebyshev():
    """T_3(x) = cos(3 arccos x) within [-1, 1], and cosh(3 arcosh x) above."""
    g = generator(7)
    u, v = (torch.linalg.qr(torch.randn(2, n, 9, generator=g, dtype=torch.float64)).Q for n in (12, 11))
    squares = torch.linspace(0.01, 4, 9, dtype=torch.float64)
    wide, rows = (u * squares.sqrt()) @ v.mT, torch.randn(2, 5, 9, generator=g, dtype=torch.float64) @ v.mT
    bounds = torch.tensor([1.0, 3.5], dtype=torch.float64)[:, None, None]
    x = 2 * squares / bounds - 1
    values = torch.where(x <= 1, torch.cos(3 * torch.acos(x.clamp(-1, 1))), torch.cosh(3 * torch.acosh(x.clamp(min=1))))
    got = _filtered(wide, rows, bounds)
    torch.testing.assert_close(got, (rows @ v) * values @ v.mT, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rank", [16, 64])
def test_matrices_of_extreme_size(rank):
    """In one group, from 1e-30 to 1e30, and a zero one: no module's numbers decide another's."""
    matrix, start = ties_delta(384, 400)
    scales = [1.0, 1e-30, 1e-20, 1e20, 1e30, 0.0]
    matrices, starts = torch.stack([matrix * x for x in scales]), torch.stack([start * x for x in scales])
    cuts = cut_matrices(matrices, starts, rank)
    assert all(check_all(matrices, cuts, rank))
    assert cuts.energies[:5] == pytest.approx([cuts.energies[0]] * 5, abs=2e-7) and cuts.energies[5] == 1.0
    assert not cuts.B[5].any()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    m=st.sampled_from([1, 2, 3, 17, 97, 150, 311]),
    n=st.sampled_from([1, 2, 5, 31, 128, 263]),
    p=st.integers(0, 40),
    rank=st.sampled_from([1, 2, 5, 8, 17, 64, 400]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_any_shape_rank_and_start(seed, m, n, p, rank, dtype):
    """A random matrix has no gap at a cut: what is not found says so. With a product in front, most are."""
    g = generator(seed)
    start = torch.randn(2, p, n, generator=g).to(dtype)
    noise = torch.tensor([0.1, 1e-3])[:, None, None] * torch.randn(2, m, n, generator=g)
    matrices = noise + torch.randn(2, m, p, generator=g) @ start.float()
    cuts = cut_matrices(matrices, start, rank)
    found = check_all(matrices, cuts, rank)
    k, least = min(rank, m, n), min(m, n)
    if 12 * k > least or 4 * (2 * k + 24) > least:
        assert all(found)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("rank", [16, 40])
def test_a_module_has_the_same_result_in_any_company(rank, count):
    """But for rounding; here some of the group take more steps, some are no numbers, and one is zero."""
    matrices, start = ties_deltas(512, 400)
    hard = with_spectrum(512, 400, 1 - torch.arange(400) / 400)
    matrices = torch.cat([matrices, hard[None], torch.full_like(hard, math.nan)[None], torch.zeros_like(hard)[None]])
    start = torch.cat([start, start])
    with threads(count):
        together = cut_matrices(matrices, start, rank)
        for i in (0, 1, 2, 3, 5):
            alone = cut_matrices(matrices[i : i + 1], start[i : i + 1], rank)
            check_same(alone, 0, together, i)
    # Its singular values fall by 1/400 each: only from the Gram matrix, at rank 40, are their vectors had at once.
    assert together.ranks == [rank] * 3 + [0 if rank == 16 else rank, 0, rank]


def test_what_is_no_number_is_not_found():
    matrix, start = ties_delta(400, 300)
    for rank in (8, 100):  # by iteration, and by the Gram matrix
        matrices, starts = matrix.repeat(5, 1, 1), start.repeat(5, 1, 1)
        matrices[1, 3, 4], matrices[2, 5, 6], starts[3, 7, 8] = math.nan, -math.inf, math.nan
        matrices[4] = 3e38  # of which the norm is no float32
        cuts = cut_matrices(matrices, starts, rank)
        assert check_all(matrices[:1], cuts, rank) == [True]
        assert [cuts.of(i) is None for i in range(1, 5)] == [True, True, rank == 8, True]


def test_it_waits_for_one_decision_or_two_and_for_the_result(monkeypatch):
    matrices, start = ties_deltas(512, 400)
    copies: list[torch.Size] = []
    to_host = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: (copies.append(self.shape), to_host(self))[1])
    for rank, expected in ((4, 2), (32, 3), (100, 2)):
        copies.clear()
        with Operators() as operators:
            assert min(cut_matrices(matrices, start, rank).ranks) == rank
        assert len(copies) == expected
        assert operators.counts["aten._local_scalar_dense.default"] == operators.counts["aten.nonzero.default"] == 0


def test_the_number_of_operators_does_not_depend_on_the_group():
    """For rank 16 from three adapters of rank 16 it is below 150, of any shape, and it may grow by steps alone."""
    totals = {}
    for shape in ((256, 256), (300, 640)):
        matrices = torch.stack([with_spectrum(*shape, torch.logspace(0, -6, 256), seed=seed) for seed in range(22)])
        start = torch.randn(22, 48, shape[1], generator=generator(5))
        cut_matrices(matrices[:1], start[:1], 16)  # identities are made once
        for count in (1, 8, 16, 22):
            with Operators() as operators:
                cuts = cut_matrices(matrices[:count], start[:count], 16)
            assert cuts.ranks == [16] * count
            totals[shape, count] = operators.total
    assert len(set(totals.values())) == 1 and max(totals.values()) < 150
    # More steps, or the Gram matrix: of any number of modules again.
    for rank, spectrum in ((16, torch.logspace(0, -1.5, 256)), (64, torch.logspace(0, -1, 256))):
        matrices = torch.stack([with_spectrum(256, 256, spectrum, seed=seed) for seed in range(9)])
        found = []
        cut_matrices(matrices[:1], start[:1, :, :256], rank)  # identities of this size
        for count in (3, 9):
            with Operators() as operators:
                assert cut_matrices(matrices[:count], start[:count, :, :256], rank).ranks == [rank] * count
            found.append(operators.total)
        assert found[0] == found[1] < 350


def test_parts_of_a_group(monkeypatch):
    matrices, start = ties_deltas(512, 400)
    sizes: list[int] = []

    def counted(function):
        def counting(part, *arguments):
            sizes.append(len(part))
            return function(part, *arguments)

        return counting

    for name in ("_iterated", "_by_gram"):
        monkeypatch.setattr(batched, name, counted(getattr(batched, name)))
    for rank in (16, 40):
        want = cut_matrices(matrices, start, rank)
        for at_a_time in (1, 2):
            width = 2 * rank + 24
            each = 8 * (512 * 400 + (8 * width * 912 if rank == 16 else 4 * 400**2 + 4 * rank * 912))
            monkeypatch.setattr(batched, "PART_BYTES", at_a_time * each)
            sizes.clear()
            got = cut_matrices(matrices, start, rank)
            assert sizes == [[1, 1, 1], [2, 1]][at_a_time - 1]
            for i in range(3):
                check_same(got, i, want, i)


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("rank", [5, 20, 200])
def test_energy_chooses_the_rank_of_each_matrix(energy, rank):
    spectra = [SPECTRA["power"], SPECTRA["rank 7"], SPECTRA["geometric"], SPECTRA["noise of a thousandth"]]
    matrices = torch.stack([with_spectrum(260, SIDE, spectrum) for spectrum in spectra])
    cuts = cut_matrices(matrices, STARTS["random"].expand(4, -1, -1), rank, energy)
    looked_for = min(rank, 24)  # the rows of the start
    for i, matrix in enumerate(matrices):
        squares = squares_of(matrix)
        kept = squares.cumsum(0) / squares.sum()
        result = cuts.of(i)
        if result is None:  # the rank is one that the iteration was not wide enough for
            assert kept[looked_for - 1] < energy + 1e-5 and rank > looked_for
            continue
        k = len(result.A)
        check_form(result, 260, SIDE, k)
        slack = 1e-5 * (1 - float(kept[k - 1])) + 2.0**-40
        assert k == rank or result.energy >= energy
        assert k == 1 or kept[k - 2] < energy + slack
        assert abs(result.energy - float(kept[k - 1])) <= slack


@pytest.mark.parametrize("rank", [5, 20, 200])
def test_energy_1_is_the_numerical_rank_of_each_matrix(rank):
    whole = [7, 12, SIDE]
    matrices = torch.stack(
        [with_spectrum(260, SIDE, SPECTRA[kind]) for kind in ("rank 7", "rank 12, repeated", "geometric")]
    )
    cuts = cut_matrices(matrices, STARTS["random"].expand(3, -1, -1), rank, 1.0)
    for i, (matrix, own) in enumerate(zip(matrices, whole, strict=True)):
        result = cuts.of(i)
        if result is None:  # left to `from_matrix`: there may be more directions than were looked for
            assert own > 24 < rank
            continue
        check_form(result, 260, SIDE, min(rank, own))
        assert result.energy == 1 or rank <= own
        check_energy(result, matrix, 1e-7)


def test_a_wide_start_is_reduced_to_random_sums():
    """Of 300 rows, which as one space would take the Gram matrix."""
    matrix, start = ties_delta(512, 768)
    mixed = torch.randn(300, 48, generator=generator(6)) @ start
    cuts = cut_matrices(matrix[None], mixed[None], 16)
    assert check_all(matrix[None], cuts, 16) == [True]


@pytest.mark.parametrize("rank", [16, 60])
def test_the_result_is_a_function_of_the_input(rank):
    matrices, start = ties_deltas(300, 400)
    kept = matrices.clone(), start.clone()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = cut_matrices(matrices, start, rank)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = cut_matrices(matrices, start, rank)
    assert torch.equal(first.A, second.A) and torch.equal(first.B, second.B) and first.energies == second.energies
    assert torch.equal(matrices, kept[0]) and torch.equal(start, kept[1])


def test_matrices_of_any_strides():
    matrices, start = ties_deltas(300, 260)
    strided = torch.zeros(3, 520, 300)[:, ::2].copy_(matrices.mT).mT
    assert not strided.is_contiguous()
    for rank in (8, 100):
        assert all(check_all(strided, cut_matrices(strided, start, rank), rank))


def test_a_loose_tolerance_takes_fewer_steps():
    matrices, start = ties_deltas(512, 400)
    with Operators() as few:
        loose = cut_matrices(matrices, start, 32, tolerance=1e-1)
    with Operators() as many:
        tight = cut_matrices(matrices, start, 32, tolerance=1e-7)
    assert few.total < many.total and loose.ranks == tight.ranks == [32] * 3
    for matrix, coarse, fine in zip(matrices, loose.energies, tight.energies, strict=True):
        squares = squares_of(matrix)
        best = float(squares[:32].sum() / squares.sum())
        assert best - 1e-7 * (1 - best) <= fine <= best + 1e-12 and best - 0.1 * (1 - best) <= coarse <= best - 1e-6


@pytest.mark.parametrize(
    ("matrices", "start", "options", "message"),
    [
        (torch.ones(2, 4, 3).double(), torch.ones(2, 2, 3), {}, "float64"),
        (torch.ones(4, 3), torch.ones(2, 3), {}, r"matrices is \[4, 3\]"),
        (torch.ones(0, 4, 3), torch.ones(0, 2, 3), {}, "none empty"),
        (torch.ones(2, 4, 3), torch.ones(2, 2, 4), {}, r"start is \[2, 2, 4\]"),
        (torch.ones(2, 4, 3), torch.ones(1, 2, 3), {}, r"wanted \[2, p, 3\]"),
        (torch.ones(2, 4, 3), torch.ones(2, 2, 3), {"rank": 0}, "rank is 0"),
        (torch.ones(2, 4, 3), torch.ones(2, 2, 3), {"energy": 1.01}, "energy is 1.01"),
        (torch.ones(2, 4, 3), torch.ones(2, 2, 3), {"tolerance": 0.0}, "tolerance is 0.0"),
    ],
)
def test_requests_refused(matrices, start, options, message):
    with pytest.raises(ValueError, match=message):
        cut_matrices(matrices, start, **({"rank": 2} | options))
