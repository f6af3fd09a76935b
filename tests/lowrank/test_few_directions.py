"""Methods on cores where a cut needs few of the singular vectors: against the dense textbook, and the whole SVD."""

import pytest
import spectral_textbook as textbook
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from low_rank import ROUNDING, SQUARED, least_error, orthonormal, squares_of
from small_adapters import Adapters, adapters, drawn, generator

from merge_engine.lowrank import core_methods
from merge_engine.lowrank.core_methods import CORE_METHODS, MergedCore
from merge_engine.lowrank.cores import TOLERANCE, Cores
from merge_engine.lowrank.small_svd import LowRank, Svd, leading_of, leading_svd, svd_of
from merge_engine.lowrank.stack import Stack

METHODS = sorted(CORE_METHODS)
FLAT = ("iso_c", "tsv_iso")


def cut(method: str, given: Adapters, rank: int, **options) -> tuple[MergedCore, LowRank]:
    stack = Stack(given.As, given.Bs)
    found = CORE_METHODS[method](Cores(stack, given.scalings), given.weights, rank, **options)
    return found, stack.unfold_svd(found.svd, rank, noise=found.noise)[0]


def whole(method: str, given: Adapters, **options) -> MergedCore:
    return CORE_METHODS[method](Cores(Stack(given.As, given.Bs), given.scalings), given.weights, **options)


def product(result: LowRank) -> torch.Tensor:
    return result.B.double() @ result.A.double()


def with_values(values: list[float]) -> Adapters:
    """One adapter, in float64, of these singular values."""
    g, n = generator(5), len(values)
    B = orthonormal(n + 30, n, g) * torch.tensor(values, dtype=torch.float64)
    return Adapters([orthonormal(n + 20, n, g).T.contiguous()], [B], [1.0], [1.0])


@pytest.fixture
def whole_svds(monkeypatch) -> list[int]:
    """Filled by one for each core that few vectors did not serve for."""
    calls: list[int] = []

    def made(core, count, real=core_methods.leading_svd):
        calls.extend([1] if count is None else [])
        return real(core, count)

    monkeypatch.setattr(core_methods, "leading_svd", made)
    return calls


@pytest.mark.quick
@pytest.mark.parametrize("method", METHODS)
def test_few_directions_are_those_of_the_textbook(method, whole_svds):
    given = drawn(0, 53, 61, [9, 11, 4], [0.7, -1.2, 0.4])
    u, s, vh = textbook.svd(textbook.METHODS[method](given.deltas, given.weights))
    for rank in (1, 3, 6):
        found, result = cut(method, given, rank)
        assert found.svd.u.shape == (24, rank) and not whole_svds
        if method in FLAT:  # the order of its directions is that of what is made flat
            dense = textbook.linear if method == "iso_c" else textbook.tsv
            u, _, vh = textbook.svd(dense(given.deltas, given.weights))
        wanted = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert float((product(result) - wanted).norm()) <= ROUNDING * float(wanted.norm())
        assert found.rank == 24
        assert result.energy == pytest.approx(float(s[:rank].square().sum() / s.square().sum()), abs=1e-12)
        assert torch.allclose(found.svd.s, s, rtol=1e-9, atol=0)
        assert found.norm == pytest.approx(float(s.norm()), rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(method=st.sampled_from(METHODS), given=adapters(), rank=st.integers(1, 11))
def test_any_cut_is_as_good_as_that_of_the_whole_svd(method, given, rank):
    """Shared A, equal adapters, zero ones, negative weights and those of 0."""
    found, result = cut(method, given, rank)
    exact = whole(method, given)
    assert found.rank == exact.rank and len(found.svd.s) == len(exact.svd.s)
    if exact.smallest is not None:
        # By squares: off by 2**-52 n of the largest, and so by half of that divided by the value itself.
        assert found.smallest == pytest.approx(exact.smallest, abs=45 * 2.0**-53 / max(exact.smallest, 2**-20))
    stack, k = Stack(given.As, given.Bs), min(rank, *exact.core.shape)
    delta, least = stack.rows(stack.columns(exact.core).T), float(exact.svd.s[k:].norm())
    slack = (ROUNDING + SQUARED) * exact.norm + k * exact.noise
    assert least - slack <= float((product(result) - delta).norm()) <= least + slack
    if exact.norm > 1e6 * exact.noise:
        assert found.norm == pytest.approx(exact.norm, rel=1e-9)
        assert result.energy == pytest.approx(1 - (least / exact.norm) ** 2, abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("energy", [0.2, 0.5, 0.9, 1.0])
def test_an_energy_is_met_by_as_many_directions(method, energy):
    given = drawn(1, 50, 60, [12, 12], [0.7, 1.2])
    stack = Stack(given.As, given.Bs)
    few, all_of_them = (CORE_METHODS[method](Cores(stack, given.scalings), given.weights, rank) for rank in (6, None))
    one, other = (stack.unfold_svd(each.svd, 6, energy, each.noise)[0] for each in (few, all_of_them))
    assert few.svd.u.shape[1] == 6 and len(one.A) == len(other.A)
    assert one.energy == pytest.approx(other.energy, abs=1e-12)


# --- values near the limit, and directions that are hardly apart


@pytest.mark.parametrize("method", ["iso_c", "karcher"])
@pytest.mark.parametrize(("above", "rank"), [(1e-7, 24), (-1e-7, 23), (1e-4, 24), (-1e-4, 23), (0.5, 24), (-0.5, 23)])
def test_a_value_near_the_limit_is_counted_by_the_whole_svd(method, above, rank, whole_svds):
    """Its square, as an eigenvalue, is off by up to 24 * 2**-52 of the largest: 2**-7 of the limit's square."""
    given = with_values([*torch.logspace(0, -3, 23).tolist(), TOLERANCE * (1 + above)])
    found = cut(method, given, 4)[0]
    assert bool(whole_svds) == (abs(above) < 0.5)
    assert found.rank == whole(method, given).rank == rank


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("copies", [1, 3])
def test_directions_that_are_zero_are_certain(method, copies, whole_svds):
    """Copies of an adapter of less than its rank: null directions are told from others by their squares."""
    given = drawn(8, 51, 47, [12], dtype=torch.float64)
    Bs = [given.Bs[0] * (torch.arange(12) < 7)]
    many = Adapters(given.As * copies, Bs * copies, [1.0] * copies, [1.0] * copies)
    for rank in (1, 2):
        assert cut(method, many, rank)[0].rank == 7
    assert not whole_svds


@pytest.mark.parametrize(
    ("values", "rank", "few"),
    [
        ([1.0, 0.9, 0.8, 0.79, *[0.1] * 12], 3, True),
        ([1.0, 0.9, 0.8, 0.8 * (1 - 1e-9), *[0.1] * 12], 3, False),
        ([1.0, 1e-2, 1e-5, 5e-6, *[1e-6] * 12], 3, False),  # half of it, and yet the squares hardly differ
        ([1.0, 1e-2, 1e-3, 1e-4, *[0.0] * 12], 4, False),  # all there is
        ([1.0, 0.5, *[0.0] * 14], 4, True),
    ],
)
def test_a_flat_spectrum_is_cut_where_directions_are_apart(values, rank, few, whole_svds):
    given = with_values(values)
    found, result = cut("iso_c", given, rank)
    assert bool(whole_svds) != few
    u, s, vh = textbook.svd(given.deltas[0])
    k = min(rank, len(s))
    wanted = float(s.mean()) * u[:, :k] @ vh[:k]
    if values[3] != 0.8 * (1 - 1e-9):  # else any of two directions may be the third
        assert float((product(result) - wanted).norm()) <= 2 * ROUNDING * float(wanted.norm())
    assert found.rank == len(s) and result.energy == pytest.approx(k / len(s), abs=1e-12)


def test_what_squares_say_of_a_decomposition():
    core = orthonormal(32, 32, generator(1)) * torch.logspace(0, -9, 32, dtype=torch.float64)
    found = leading_svd(core, 8)
    exact = torch.linalg.svdvals(core)
    assert ((found.s.square() - exact.square()).abs() <= 32 * 2.0**-52).all()
    assert not found.s[exact < 2.0**-24].any() and torch.equal(found.s, found.s.sort(descending=True).values)
    above = {limit: int((found.s > limit).sum()) for limit in (1e-3, 1e-9, float(exact[10]))}
    assert [found.tells(k, limit) for limit, k in above.items()] == [True, False, False]
    for whole_one in (svd_of(core), leading_svd(core, None)):
        assert all(whole_one.tells(k, limit) for limit, k in above.items())
    for scale in (1e-200, 1e200):
        other = leading_svd(scale * core, 8)
        assert [other.tells(k, scale * limit) for limit, k in above.items()] == [True, False, False]
    nothing = leading_svd(torch.zeros(9, 9, dtype=torch.float64), 2)
    assert not nothing.tells(0, 0.0) and nothing.tells(0, 1e200)


@pytest.mark.parametrize("weakest", [0.9, 2.0**-5.9, 2.0**-6.1, 1e-5, 1e-9, 0.0])
def test_vectors_are_orthogonal_however_weak(weakest):
    """The last of three values to be found is near the share of 2**-6, whose square decides how."""
    g = generator(9)
    values = torch.tensor([1.0, 0.95, weakest, *[weakest / 2] * 9], dtype=torch.float64)
    core = orthonormal(20, 12, g) * values @ orthonormal(15, 12, g).T
    found = leading_svd(core, 3)
    for side in (found.u.T, found.vh):
        assert float((side @ side.T - torch.eye(3, dtype=torch.float64)).abs().max()) < 2.0**-33
    assert torch.allclose(found.s[:3], values[:3], rtol=0, atol=2.0**-26)
    error = float((core - found.u * found.s[:3] @ found.vh).norm())
    assert error == pytest.approx(1.5 * weakest, abs=2.0**-26)


def test_vectors_that_are_not_known_are_not_cut():
    core = torch.eye(12, dtype=torch.float64)
    few = leading_svd(core, 3)
    assert isinstance(few, Svd) and few.u.shape == (12, 3) and len(leading_of(few, 3, None).s) == 3
    with pytest.raises(ValueError, match="3 singular vectors are known, wanted 4"):
        leading_of(few, 4, None)


@pytest.mark.parametrize("shape", [(40, 3), (3, 40), (40, 20), (1, 1), (8, 2)])
def test_cores_of_any_shape(shape):
    core = torch.randn(*shape, generator=generator(3), dtype=torch.float64)
    for count in (1, 2, 10):
        found = leading_svd(core, count)
        assert torch.allclose(found.s, torch.linalg.svdvals(core), rtol=1e-9, atol=0)
        k = min(count, *shape)
        assert found.u.shape[1] >= k and found.u.shape[1] == len(found.vh)
        error = float((core - found.u[:, :k] * found.s[:k] @ found.vh[:k]).norm())
        assert error == pytest.approx(least_error(squares_of(core), k), abs=1e-12 * float(core.norm()))


# --- actmat by a linear system


@pytest.fixture
def systems(monkeypatch) -> list[bool]:
    """For each merge by actmat whether a linear system made it."""
    found: list[bool] = []

    def made(*args, real=core_methods._by_products):
        result = real(*args)
        found.append(result is not None)
        return result

    monkeypatch.setattr(core_methods, "_by_products", made)
    return found


@pytest.mark.parametrize("ridge", [0.01, 0.3, 1.0, 30.0])
@pytest.mark.parametrize("ranks", [[3, 5, 4], [9], [1, 1]])
def test_actmat_by_a_linear_system(ridge, ranks, systems):
    given = drawn(4, 43, 37, ranks, [0.7, -1.2, 0.4][: len(ranks)])
    found = whole("actmat", given, ridge=ridge)
    wanted = textbook.actmat(given.deltas, given.weights, ridge)
    assert systems == [True]
    stack = Stack(given.As, given.Bs)
    delta = stack.rows(stack.columns(found.core).T)
    # A condition of at most 2**12 here, and what 12 columns lose in float64.
    assert float((delta - wanted).norm()) <= 1e-11 * float(wanted.norm())
    assert found.rank == sum(ranks)
    assert found.smallest == pytest.approx(smallest_of_rows(given.deltas, given.weights), rel=1e-9)


def smallest_of_rows(deltas: list[torch.Tensor], weights: list[float]) -> float:
    """The smallest singular value of the adapters' unit directions among the rows."""
    return float(torch.linalg.svdvals(textbook.unit_directions(deltas, weights)[2])[-1])


@pytest.mark.parametrize("weights", [[1.0, 0.0, 0.5], [0.0, 0.0, 2.0], [1.0, -1e-3, 1e-5]])
@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_how_parallel_adapters_are_does_not_depend_on_their_weights(weights, ridge):
    """But that a weight of 0 leaves an adapter out."""
    given = drawn(4, 43, 37, [3, 5, 4], weights)
    used = [1.0 if w else 0.0 for w in weights]
    assert whole("actmat", given, ridge=ridge).smallest == pytest.approx(smallest_of_rows(given.deltas, used), rel=1e-9)


@pytest.mark.parametrize(
    ("near", "weak", "eigenvalues", "solved"),
    [
        (1.0, 0.1, 0, True),
        (1e-3, 0.1, 0, True),
        (1e-3, 1e-3, 1, True),  # the bounds are products of the least of each
        (1e-3, 1e-6, 1, False),
    ],
)
def test_eigenvalues_are_found_where_bounds_do_not_tell(near, weak, eigenvalues, solved, monkeypatch, systems):
    """Two directions that are nearly parallel, and a weak one far from both."""
    calls: list[torch.Tensor] = []

    def counted(matrix, real=torch.linalg.eigvalsh):
        calls.append(matrix)
        return real(matrix)

    rows, columns = torch.eye(9, dtype=torch.float64), torch.eye(8, dtype=torch.float64)
    As = [rows[[0, 2]], (rows[0] + near * rows[1])[None]]
    given = Adapters(As, [columns[:, :2] * torch.tensor([1.0, weak]), columns[:, 2:3]], [1.0, 1.0], [1.0, 0.8])
    monkeypatch.setattr(torch.linalg, "eigvalsh", counted)
    found = whole("actmat", given, ridge=1.0)
    assert (len(calls), systems) == (eigenvalues, [solved])
    wanted = torch.linalg.svdvals(textbook.actmat(given.deltas, given.weights, 1.0))[:3]
    assert torch.allclose(found.svd.s, wanted, rtol=0, atol=1e-12)


def near(apart: float) -> Adapters:
    shared = drawn(1, 30, 30, [4, 4], [1.0, 0.6], dtype=torch.float64)
    return shared._replace(As=[shared.As[0], shared.As[0] + apart * shared.As[1]])


@pytest.mark.parametrize(
    ("given", "ridge", "solved"),
    [
        (near(1.0), 1.0, True),
        (near(1e-3), 1.0, True),
        (near(1e-6), 1.0, False),  # its squares do not tell how near
        (near(0.0), 1.0, False),
        (near(1e-3), 1e-4, False),  # ill-conditioned
        (near(1.0), 0.0, False),
        (near(1.0)._replace(weights=[1.0, 0.0]), 1.0, False),
        (near(1.0)._replace(weights=[0.0, 0.0]), 1.0, False),
        (drawn(2, 20, 6, [4, 5]), 1.0, False),  # more columns than rows
    ],
)
def test_when_actmat_solves_a_linear_system(given, ridge, solved, systems):
    found = whole("actmat", given, ridge=ridge)
    assert systems == [solved]
    wanted = textbook.actmat(given.deltas, given.weights, ridge)
    stack = Stack(given.As, given.Bs)
    grown = max(1.0, 1e-3 / textbook.condition("actmat", given.deltas, given.weights)) ** 2
    delta = stack.rows(stack.columns(found.core).T)
    assert float((delta - wanted).norm()) <= 1e-10 * grown * float(wanted.norm())


@pytest.mark.parametrize("times", [1e-300, 1e300])
@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_actmat_with_weights_of_any_size(times, ridge):
    given = drawn(4, 43, 37, [3, 5], [0.7, -1.2])
    larger = whole("actmat", given._replace(weights=[times * w for w in given.weights]), ridge=ridge)
    wanted = whole("actmat", given, ridge=ridge).core
    assert float((larger.core - wanted).norm()) <= 1e-12 * float(wanted.norm())
