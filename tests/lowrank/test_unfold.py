"""`Stack.unfold`: factors of a merged core, against the dense delta in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_adapters import Adapters, adapters, drawn, generator

from merge_engine.lowrank import stack as lowrank_stack
from merge_engine.lowrank.small_svd import LowRank
from merge_engine.lowrank.stack import Stack

U32 = 2.0**-24
# Rounding B = U S and the orthonormal rows of A to float32 moves the product by 2 U32 |B A|_F, to first order.
ROUNDING = 2.01 * U32


def random_core(stack: Stack, seed: int) -> torch.Tensor:
    """R_B G R_A^T: what methods make are sums of the adapters' columns and rows."""
    left, right = stack.triangles
    g = torch.randn(left.shape[1], right.shape[1], generator=generator(seed), dtype=torch.float64)
    return left @ g @ right.T


def dense(given: Adapters, seed: int) -> torch.Tensor:
    B = torch.cat([B.double() for B in given.Bs], dim=1)
    A = torch.cat([A.double() for A in given.As])
    return B @ torch.randn(B.shape[1], len(A), generator=generator(seed), dtype=torch.float64) @ A


def product(result: LowRank) -> torch.Tensor:
    return result.B.double() @ result.A.double()


def least_error(matrix: torch.Tensor, k: int) -> float:
    return float(torch.linalg.svdvals(matrix)[k:].norm())


@pytest.mark.quick
def test_a_core_is_unfolded_exactly():
    given = drawn(1, 70, 30, [4, 7])
    stack = Stack(given.As, given.Bs)
    wanted = dense(given, 3)
    result = stack.unfold(random_core(stack, 3), 11)
    assert result.A.shape == (11, 30) and result.B.shape == (70, 11) and result.energy == 1.0
    assert float((product(result) - wanted).norm()) <= ROUNDING * float(wanted.norm())
    assert torch.allclose(result.A.double() @ result.A.double().T, torch.eye(11).double(), rtol=0, atol=2.1 * U32)


@settings(max_examples=100)
@given(given=adapters(), seed=st.integers(0, 10**6), rank=st.integers(1, 60))
def test_any_core_is_cut_as_by_a_dense_svd(given, seed, rank):
    stack = Stack(given.As, given.Bs)
    wanted = dense(given, seed)
    result = stack.unfold(random_core(stack, seed), rank)
    k = min(rank, *map(len, stack.triangles))
    assert result.A.shape == (k, wanted.shape[1]) and result.B.shape == (wanted.shape[0], k)
    for factor in (result.A, result.B):
        assert factor.dtype == torch.float32 and factor.is_contiguous() and factor.isfinite().all()
        assert factor.untyped_storage().nbytes() == 4 * factor.numel()
    norm, least = float(wanted.norm()), least_error(wanted, k)
    error = float((wanted - product(result)).norm())
    # The textbook's sum of products loses 45 * 2**-53 of summands that may be some times larger.
    slack = (ROUNDING + 1e-12) * norm
    assert least - slack <= error <= least + slack
    kept = 1 - (least / norm) ** 2 if norm else 1.0
    assert result.energy == pytest.approx(kept, abs=1e-7)
    gram = result.A.double() @ result.A.double().T
    assert torch.allclose(gram, torch.eye(k, dtype=torch.float64), rtol=0, atol=2.1 * U32)


def test_cores_of_sums_unfold_as_sums_are_cut():
    given = drawn(2, 50, 60, [3, 8, 5])
    stack = Stack(given.As, given.Bs)
    left, right = stack.triangles
    columns = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64).repeat_interleave(torch.tensor([3, 8, 5]))
    core = (left * columns) @ right.T
    for rank, energy in [(16, None), (5, None), (16, 0.9), (4, 0.5), (16, 1.0)]:
        cut, unfolded = stack.cut([0.3, -1.2, 2.0], rank, energy), stack.unfold(core, rank, energy)
        assert cut.energy == pytest.approx(unfolded.energy, abs=1e-12) and len(cut.A) == len(unfolded.A)
        assert float((product(cut) - product(unfolded)).norm()) <= 2 * ROUNDING * float(product(cut).norm())


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.99])
def test_energy_chooses_the_smallest_rank(energy):
    given = drawn(3, 40, 44, [6, 6])
    stack = Stack(given.As, given.Bs)
    shares = torch.linalg.svdvals(dense(given, 5)).square()
    shares = (shares.cumsum(0) / shares.sum())[:12]
    wanted = 1 + int((shares < energy).sum())
    result = stack.unfold(random_core(stack, 5), 40, energy)
    assert len(result.A) == wanted and result.energy == pytest.approx(float(shares[wanted - 1]), abs=1e-10)
    fewer = stack.unfold(random_core(stack, 5), wanted - 1, energy) if wanted > 1 else None
    assert fewer is None or len(fewer.A) == wanted - 1


def count_reflectors(monkeypatch) -> list[int]:
    """Filled by one for each time that a Q is applied by its reflectors."""
    calls: list[int] = []
    monkeypatch.setattr(
        lowrank_stack, "q_times", lambda *args, real=lowrank_stack.q_times: (calls.append(1), real(*args))[1]
    )
    return calls


@pytest.mark.parametrize("kind", ["shared A", "repeated", "zero", "wide", "apart"])
def test_sums_of_stacked_rows_serve_where_rows_depend_on_each_other(kind, monkeypatch):
    given = drawn(4, 30, 8 if kind == "wide" else 40, [4, 4, 4])
    if kind in ("shared A", "repeated"):
        given = given._replace(As=[given.As[0]] * 3)
    if kind == "repeated":
        given = given._replace(Bs=[given.Bs[0]] * 3)
    if kind == "zero":
        given.Bs[1].zero_()
    calls = count_reflectors(monkeypatch)
    stack = Stack(given.As, given.Bs)
    wanted = dense(given, 6)
    result = stack.unfold(random_core(stack, 6), 12)
    assert float((product(result) - wanted).norm()) <= ROUNDING * float(wanted.norm())
    assert not calls


@pytest.mark.parametrize("apart", [1e-4, 1e-8, 1e-12])
def test_rows_that_nearly_cancel_are_made_by_reflectors(apart, monkeypatch):
    """A direction that is the difference of two rows: their sum would lose 1 / apart of what float64 has."""
    given = drawn(5, 50, 60, [3, 3], dtype=torch.float64)
    given = given._replace(
        As=[given.As[0], given.As[0] + apart * given.As[1]], Bs=[given.Bs[0], given.Bs[0] + apart * given.Bs[1]]
    )
    calls = count_reflectors(monkeypatch)
    stack = Stack(given.As, given.Bs)
    # Unit cores: each of six directions as large as any other.
    core = torch.randn(6, 6, generator=generator(7), dtype=torch.float64)
    result = stack.unfold(core, 6)
    Q_B, Q_A = (torch.linalg.qr(torch.cat(side, dim=1))[0] for side in (given.Bs, [A.T for A in given.As]))
    # Q itself is known to 2**-53 / apart here and in the stack: what is compared is norms and angles.
    exact = Q_B @ core @ Q_A.T
    assert float((product(result) - exact).norm()) <= (ROUNDING + 1e-14 / apart) * float(core.norm())
    gram = result.A.double() @ result.A.double().T
    assert torch.allclose(gram, torch.eye(6, dtype=torch.float64), rtol=0, atol=2.1 * U32)
    assert torch.linalg.svdvals(product(result))[:6].tolist() == pytest.approx(
        torch.linalg.svdvals(core).tolist(), rel=10 * U32
    )
    assert len(calls) == (0 if apart == 1e-4 else 2)


def test_sums_that_cancel_are_seen_though_they_solve_exactly(monkeypatch):
    """b and b + 1e-9 e: (second - first) / 1e-9 is exact in the triangle, and loses a billion times more in the sum."""
    e, b = torch.eye(40, 1, dtype=torch.float64), torch.rand(40, 1, generator=generator(1), dtype=torch.float64)
    calls = count_reflectors(monkeypatch)
    stack = Stack(
        [torch.eye(2, 30, dtype=torch.float64)[:1], torch.eye(2, 30, dtype=torch.float64)[1:]], [b, b + 1e-9 * e]
    )
    result = stack.unfold(torch.eye(2, dtype=torch.float64), 2)
    assert torch.linalg.svdvals(product(result))[:2].tolist() == pytest.approx([1, 1], abs=2.1 * U32)
    assert len(calls) == 1


def test_a_core_of_more_than_the_adapters_span():
    """Q has columns that no sum of the stacked ones gives where these depend on each other."""
    given = drawn(9, 30, 40, [3, 3])
    given.Bs[1].zero_()
    stack = Stack(given.As, given.Bs)
    core = torch.randn(6, 6, generator=generator(2), dtype=torch.float64)
    values = torch.linalg.svdvals(product(stack.unfold(core, 6)))[:6]
    assert values.tolist() == pytest.approx(torch.linalg.svdvals(core).tolist(), rel=10 * U32)


def test_columns_and_rows_are_q_times_a_block():
    given = drawn(6, 35, 45, [4, 4, 2])
    stack = Stack(given.As, given.Bs)
    left, right = stack.triangles
    B, A = torch.cat(given.Bs, dim=1).double(), torch.cat(given.As).double()
    # Q R = X: the stacked factors are Q times their triangles.
    assert float((stack.columns(left) - B).norm()) <= 1e-13 * float(B.norm())
    assert float((stack.rows(right) - A).norm()) <= 1e-13 * float(A.norm())
    for block, side in ((torch.eye(10).double(), stack.columns), (torch.eye(10).double(), lambda x: stack.rows(x).T)):
        Q = side(block)
        assert float((Q.T @ Q - block).norm()) <= 1e-12
    assert stack.columns(torch.zeros(10, 0, dtype=torch.float64)).shape == (35, 0)
    assert torch.equal(stack.columns(torch.zeros(10, 2, dtype=torch.float64)), torch.zeros(35, 2, dtype=torch.float64))


def test_sizes_are_those_of_the_stacked_columns_and_rows():
    given = drawn(6, 5, 6, [2, 3])
    wanted = torch.cat(
        [B.double().norm(dim=0) * A.double().norm(dim=1) for A, B in zip(given.As, given.Bs, strict=True)]
    )
    assert torch.allclose(Stack(given.As, given.Bs).sizes, wanted, rtol=1e-14, atol=0)
    assert Stack(given.As, given.Bs).width == 6


def test_zero_and_what_is_below_the_noise():
    given = drawn(7, 20, 30, [3, 2])
    stack = Stack(given.As, given.Bs)
    zero = stack.unfold(torch.zeros(5, 5, dtype=torch.float64), 4)
    assert zero.A.shape == (4, 30) and not zero.B.any() and zero.energy == 1.0
    core = torch.diag(torch.tensor([3.0, 1.0, 1e-3, 1e-6, 1e-17], dtype=torch.float64))
    assert int((stack.unfold(core, 5).B != 0).any(0).sum()) == 4  # 1e-17 is rounding of 3
    cut = stack.unfold(core, 5, noise=1e-5)
    assert int((cut.B != 0).any(0).sum()) == 3
    lengths = torch.linalg.vector_norm(cut.B.double(), dim=0).tolist()
    assert lengths == pytest.approx([3, 1, 1e-3, 0, 0], rel=2 * U32)
    assert cut.A.shape == (5, 30)
    assert torch.allclose(cut.A.double() @ cut.A.double().T, torch.eye(5).double(), rtol=0, atol=2.1 * U32)


def test_requests_that_do_not_fit():
    given = drawn(8, 4, 9, [3, 3])
    stack = Stack(given.As, given.Bs)
    core = torch.zeros(4, 6, dtype=torch.float64)
    stack.unfold(core, 1)
    for wrong in (core.T, core[:3], core.float(), core.flatten()):
        with pytest.raises(ValueError, match=r"core is .* wanted \[4, 6\] float64"):
            stack.unfold(wrong, 1)
    with pytest.raises(ValueError, match="rank is 0"):
        stack.unfold(core, 0)
    with pytest.raises(ValueError, match=r"energy is 1\.5"):
        stack.unfold(core, 1, 1.5)
    core[1, 2] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        stack.unfold(core, 1)
    with pytest.raises(ValueError, match="overflows float32"):
        stack.unfold(torch.full((4, 6), 1e39, dtype=torch.float64), 1)
