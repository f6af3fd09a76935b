"""Cores against dense deltas: singular values, norms, inner products, ranks; computed once, whoever asks."""

import math
import threading

import pytest
import spectral_textbook as textbook
import torch
from hypothesis import given, settings
from small_adapters import adapters, drawn, generator

from merge_engine.lowrank.cores import Cores, gram_of, norms_of
from merge_engine.lowrank.stack import Stack

TRIPLE = drawn(1, 20, 30, [3, 6, 2])


def cores_of(given) -> Cores:
    return Cores(Stack(given.As, given.Bs), given.scalings)


def products(given) -> float:
    """What rounding is measured by: the largest s |B| |A|."""
    return max(
        abs(s) * float(A.double().norm() * B.double().norm())
        for A, B, s in zip(given.As, given.Bs, given.scalings, strict=True)
    )


@pytest.mark.quick
def test_norms_and_inner_products():
    wanted = textbook.gram(TRIPLE.deltas)
    cores = cores_of(TRIPLE)
    for found in (cores.gram, gram_of(TRIPLE.As, TRIPLE.Bs, TRIPLE.scalings)):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-13 * float(wanted.max()))
    for norms in (cores.norms.tolist(), norms_of(TRIPLE.As, TRIPLE.Bs, TRIPLE.scalings)):
        assert norms == pytest.approx(wanted.diag().sqrt().tolist(), rel=1e-13)


@settings(max_examples=80)
@given(given=adapters())
def test_any_cores(given):
    stack, cores, deltas = Stack(given.As, given.Bs), cores_of(given), given.deltas
    size = products(given)
    R = sum(len(A) for A in given.As)
    lost = 4 * R * 2.0**-53 * max(size, 1e-300)  # of QR and of an SVD, of R columns
    assert cores.shape == (min(R, len(given.Bs[0])), min(R, given.As[0].shape[1]))
    u, _, v = cores.vectors
    assert torch.allclose(cores.gram, textbook.gram(deltas), rtol=0, atol=4 * lost * size)
    assert torch.allclose(
        gram_of(given.As, given.Bs, given.scalings), textbook.gram(deltas), rtol=0, atol=4 * lost * size
    )
    exact = [float(delta.norm()) for delta in deltas]
    assert torch.allclose(cores.norms, torch.tensor(exact, dtype=torch.float64), rtol=0, atol=lost)
    assert cores.norms.tolist() == pytest.approx(norms_of(given.As, given.Bs, given.scalings), rel=1e-9, abs=lost)
    start = 0
    for t, (thin, delta) in enumerate(zip(cores.svds, deltas, strict=True)):
        values = textbook.svd(delta)[1]
        k = len(values)
        assert len(thin.s) == k and torch.allclose(thin.s, values, rtol=0, atol=lost)
        for side, whole in ((thin.u, u), (thin.v, v)):
            assert side.shape[1] == k
            assert torch.allclose(side.T @ side, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-13)
            assert torch.equal(side, whole[:, start : start + k])
        left, right = cores.factors(t)
        assert left.shape[1] == len(given.As[t])
        assert float((left @ right.T - (thin.u * thin.s) @ thin.v.T).norm()) <= lost + 2.0**-20 * k * float(
            values.max() if k else 0
        )
        start += k
    found = stack.columns(cores.combined(given.weights)) @ stack.rows(torch.eye(cores.shape[1], dtype=torch.float64))
    total = textbook.linear(deltas, given.weights)
    assert float((found - total).norm()) <= 1e-12 * size


def test_a_direction_of_too_little_counts_as_none():
    """A thousandth of the limit falls, a thousand times the limit stays, and so does the limit of a smaller adapter."""
    given = drawn(2, 30, 20, [2, 2], dtype=torch.float64)
    limit = 2.0**-20
    u, v = torch.linalg.qr(given.Bs[0])[0], torch.linalg.qr(given.As[0].T)[0]
    for value, k in ((1e-3 * limit, 1), (1e3 * limit, 2)):
        small = given._replace(As=[v.T, given.As[1]], Bs=[u * torch.tensor([1e-9, 1e-9 * value]), given.Bs[1]])
        cores = cores_of(small)
        assert [len(svd.s) for svd in cores.svds] == [k, 2]
        # Of both adapters together the first is nothing.
        assert cores.left_basis.vectors.shape[1] == 2
        assert cores.polars([True, True])[0].rank == k + 2
    wider = Cores(Stack(small.As, small.Bs), small.scalings, tolerance=2e3 * limit)
    assert [len(svd.s) for svd in wider.svds] == [1, 2]


def test_what_float64_loses_in_a_product_is_no_direction():
    """B A = b a - b a + c d: of |B| |A| only a share of 1e-16 is left of the first two, and c d is all there is."""
    g = generator(3)
    b, c = torch.randn(40, 2, generator=g, dtype=torch.float64), torch.randn(40, 1, generator=g, dtype=torch.float64)
    a, d = torch.randn(2, 30, generator=g, dtype=torch.float64), torch.randn(1, 30, generator=g, dtype=torch.float64)
    for share, k in ((1.0, 1), (1e-11, 1), (0.0, 0)):
        B, A = torch.cat([b, -b, share * c], dim=1), torch.cat([a, a, d])
        (svd,) = Cores(Stack([A], [B]), [1.0]).svds
        assert len(svd.s) == k
        # 1e-16 of products of some 50 each.
        assert svd.s.tolist() == pytest.approx([share * float(c.norm() * d.norm())][:k], abs=1e-13)


@pytest.mark.parametrize("sides", [(25, 35), (35, 25), (6, 35), (35, 6), (6, 7)])
def test_bases(sides):
    given = drawn(4, *sides, [3, 4, 3])
    (_, left), (_, right) = textbook.bases(given.deltas)
    cores = cores_of(given)
    for basis, values in ((cores.left_basis, left), (cores.right_basis, right)):
        assert torch.allclose(basis.values, values, rtol=1e-12, atol=0)
        k = len(values)
        assert torch.allclose(basis.vectors.T @ basis.vectors, torch.eye(k).double(), rtol=0, atol=1e-13)


def test_polar_factors():
    cores = cores_of(TRIPLE)
    for used in ([True] * 3, [True, False, True]):
        u, _, vh = textbook.unit_directions(TRIPLE.deltas, [float(x) for x in used])
        for polar, unit in zip(cores.polars(used), (u, vh.T), strict=True):
            s = torch.linalg.svdvals(unit)
            assert torch.allclose(polar.values, s, rtol=0, atol=1e-13)
            assert polar.rank == len(s) and polar.smallest == pytest.approx(float(s[-1]), rel=1e-12)
            n = unit.shape[1]
            assert torch.allclose(polar.factor.T @ polar.factor, torch.eye(n).double(), rtol=0, atol=1e-12)
    empty, _ = cores.polars([False] * 3)
    assert empty.factor.shape == (11, 0) and empty.rank == 0 and empty.smallest == 1.0


def test_noise_is_what_sums_may_lose():
    given = drawn(5, 20, 30, [3, 3], scalings=[2.0, 0.5])
    cores = cores_of(given)
    sizes = [
        s * float((A.double().norm(dim=1) * B.double().norm(dim=0)).sum())
        for A, B, s in zip(given.As, given.Bs, given.scalings, strict=True)
    ]
    assert cores.noise([1.0, -2.0]) == pytest.approx(2.0**-51 * 8 * (sizes[0] + 2 * sizes[1]), rel=1e-12)
    copies = Cores(Stack(given.As[:1] * 2, given.Bs[:1] * 2), [2.0, 2.0])
    nothing = torch.linalg.svdvals(copies.combined([1.0, -1.0]))
    assert float(nothing[0]) <= copies.noise([1.0, -1.0]) < 1e-12 * float(copies.norms[0])


# --- once, for all threads


def test_what_is_known_is_computed_once(monkeypatch):
    cores = cores_of(drawn(6, 60, 50, [4] * 5))
    calls, real = [], Cores._thin
    monkeypatch.setattr(Cores, "_thin", lambda self, t: (calls.append(t), real(self, t))[1])
    start, results = threading.Barrier(8), []

    def ask(number: int) -> None:
        start.wait()
        if number % 2:
            results.append((cores.gram, cores.polars([True] * 5)[0].factor, cores.left_basis.vectors))
        else:
            basis, polar = cores.left_basis.vectors, cores.polars([True] * 5)[0].factor
            results.append((cores.gram, polar, basis))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(calls) == list(range(5)) and len(results) == 8
    for result in results:
        assert all(part is first for part, first in zip(result, results[0], strict=True))


def held(value, seen) -> int:
    """Bytes of all tensors in there, storages counted once."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        new = storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        return storage.nbytes() if new else 0
    if isinstance(value, dict):
        return sum(held(part, seen) for part in value.values())
    if isinstance(value, list | tuple):
        return sum(held(part, seen) for part in value)
    return 0


@pytest.mark.parametrize("ranks", [[4] * 5, [9, 1], [7], [0, 3]])
def test_bytes_are_no_more_than_told(ranks):
    given = drawn(7, 12, 40, ranks)
    cores = cores_of(given)
    before = cores.nbytes
    cores.polars([True] * len(ranks))
    assert cores.gram is cores.gram and cores.norms is cores.norms
    assert cores.row_products is cores.row_products
    assert cores.left_basis is cores.left_basis and cores.right_basis is cores.right_basis
    taken = held(vars(cores), set())
    assert 0.8 * before <= taken <= before == cores.nbytes


def test_the_stack_and_its_long_sides_are_not_held():
    cores = cores_of(drawn(8, 2000, 3000, [2, 2]))
    cores.polars([True, True])
    assert held(vars(cores), set()) < 8 * 2000


# --- requests


def test_scalings_that_do_not_fit():
    stack = Stack(TRIPLE.As, TRIPLE.Bs)
    with pytest.raises(ValueError, match="got 2 scalings, wanted 3"):
        Cores(stack, [1.0, 1.0])
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="scaling"):
            Cores(stack, [1.0, wrong, 1.0])


def test_another_left_side():
    cores = cores_of(TRIPLE)
    assert cores.norms.numel() == 3
    twice = cores.with_left(2 * cores.left)
    assert torch.allclose(twice.norms, 2 * cores.norms, rtol=1e-14, atol=0)
    with pytest.raises(ValueError, match="left is"):
        cores.with_left(cores.left[:, 1:])
