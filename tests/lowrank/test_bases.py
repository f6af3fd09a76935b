"""Spaces of knots and cores: task tensors, and merged ones lifted back, against dense deltas."""

import math

import pytest
import spectral_textbook as textbook
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_adapters import Adapters, adapters, drawn, generator, orthonormal

from merge_engine.lowrank.bases import core_factors, knots_factors, lift_core, lift_knots, nearness
from merge_engine.lowrank.cores import Cores
from merge_engine.lowrank.small_svd import LowRank
from merge_engine.lowrank.stack import Stack

U32 = 2.0**-24
ROUNDING = 2.01 * U32  # of factors B = U S and orthonormal A to float32, as a share of their product
TRIPLE = drawn(1, 25, 35, [3, 6, 2], [0.9, -0.4, 1.3])


def opened(given: Adapters) -> tuple[Stack, Cores]:
    stack = Stack(given.As, given.Bs)
    return stack, Cores(stack, given.scalings)


def product(result: LowRank) -> torch.Tensor:
    return result.B.double() @ result.A.double()


def task_tensors(space: str, given: Adapters, cores: Cores) -> list[torch.Tensor]:
    As, Bs = knots_factors(cores, given.As) if space == "knots" else core_factors(cores)
    return [B.double() @ A.double() for A, B in zip(As, Bs, strict=True)]


def lifted(space: str, stack: Stack, cores: Cores, merged: torch.Tensor, rank: int, energy=None) -> LowRank:
    return (lift_knots if space == "knots" else lift_core)(stack, cores, merged, rank, energy)


def summands(given: Adapters) -> float:
    """sum |w s| |B| |A|: rounding of the projected factors is a share of it."""
    return sum(
        abs(w * s) * float(A.double().norm() * B.double().norm())
        for A, B, s, w in zip(given.As, given.Bs, given.scalings, given.weights, strict=True)
    )


@pytest.mark.quick
@pytest.mark.parametrize("space", ["knots", "core"])
def test_linear_in_a_space_is_linear(space):
    stack, cores = opened(TRIPLE)
    merged = textbook.linear(task_tensors(space, TRIPLE, cores), TRIPLE.weights)
    assert merged.shape == (11, 35 if space == "knots" else 11)
    found = lifted(space, stack, cores, merged, 11)
    wanted = textbook.linear(TRIPLE.deltas, TRIPLE.weights)
    assert float((product(found) - wanted).norm()) <= 4 * U32 * summands(TRIPLE)


@settings(max_examples=80)
@given(given=adapters(), space=st.sampled_from(["knots", "core"]))
def test_any_adapters(given, space):
    (u, left), (v, right) = textbook.bases(given.deltas)
    stack, cores = opened(given)
    K, L = len(left), len(right)
    if K == 0:
        return
    tensors = task_tensors(space, given, cores)
    assert all(tensor.shape == (K, given.As[0].shape[1] if space == "knots" else L) for tensor in tensors)
    # Rotations apart, which are open where singular values are equal: all inner products are those of the deltas.
    bound = max(
        abs(s) * float(A.double().norm() * B.double().norm())
        for A, B, s in zip(given.As, given.Bs, given.scalings, strict=True)
    )
    assert torch.allclose(textbook.gram(tensors), textbook.gram(given.deltas), rtol=0, atol=8 * U32 * bound**2)
    merged = textbook.linear(tensors, given.weights).float()
    result = lifted(space, stack, cores, merged, K)
    wanted = textbook.linear(given.deltas, given.weights)
    limit = 6 * U32 * summands(given)  # of projected factors, of their merge, of what is unfolded
    assert float((product(result) - wanted).norm()) <= limit
    assert abs(float(merged.double().norm()) - float(wanted.norm())) <= limit
    left_of_it = wanted - u @ u.T @ wanted @ v @ v.T
    assert float(left_of_it.norm()) <= 1e-9 * summands(given)  # the textbook's own bases hold all of it


def test_knots_are_projections():
    """U^T tau: rows are coordinates in U, of descending strength, each right but for its sign."""
    stack, cores = opened(TRIPLE)
    (u, values), (v, _) = textbook.bases(TRIPLE.deltas)
    assert float((values[1:] / values[:-1]).max()) < 0.99  # so that vectors are determined
    U, V = stack.columns(cores.left_basis.vectors), stack.rows(cores.right_basis.vectors).T
    for found, exact in ((U, u), (V, v)):
        assert torch.allclose((found.T @ exact).abs(), torch.eye(11).double(), rtol=0, atol=1e-10)
    for space, right in (("knots", torch.eye(35, dtype=torch.float64)), ("core", V)):
        for tensor, delta in zip(task_tensors(space, TRIPLE, cores), TRIPLE.deltas, strict=True):
            wanted = U.T @ delta @ right
            assert float((tensor - wanted).norm()) <= 8 * U32 * float(delta.norm())


@pytest.mark.parametrize("space", ["knots", "core"])
def test_how_deltas_are_split_does_not_matter(space):
    wide = drawn(2, 25, 35, [3, 6, 2], [0.9, -0.4, 1.3], dtype=torch.float64)
    As, Bs = [], []
    for t, (A, B) in enumerate(zip(wide.As, wide.Bs, strict=True)):
        G = torch.randn(len(A), len(A), generator=generator(t), dtype=torch.float64)
        As.append(torch.linalg.solve(G, A))
        Bs.append(B @ G)
    other = wide._replace(As=As, Bs=Bs)
    one, two = (task_tensors(space, given, opened(given)[1]) for given in (wide, other))
    values = opened(wide)[1].left_basis.values
    assert float((values[1:] / values[:-1]).max()) < 0.99
    bound = max(summands(wide), summands(other))
    for first, second in zip(one, two, strict=True):
        assert float((first.abs() - second.abs()).norm()) <= 8 * U32 * bound


def test_copies_add_no_rows():
    one = drawn(3, 25, 35, [4])
    many = Adapters(one.As * 3, one.Bs * 3, one.scalings * 3, [1.0] * 3)
    stack, cores = opened(many)
    for space in ("knots", "core"):
        tensors = task_tensors(space, many, cores)
        assert all(len(tensor) == 4 and torch.equal(tensor, tensors[0]) for tensor in tensors)
        result = lifted(space, stack, cores, tensors[0].float(), 20)
        assert len(result.A) == 4
        assert float((product(result) - one.deltas[0]).norm()) <= 6 * U32 * float(one.deltas[0].norm()) * 4


@pytest.mark.parametrize("space", ["knots", "core"])
@pytest.mark.parametrize(("rank", "energy"), [(4, None), (11, 0.7), (3, 0.99), (11, 1.0), (40, None)])
def test_a_cut_is_the_best_there_is(space, rank, energy):
    """Of a merged tensor that is no sum of the task tensors, and dense."""
    stack, cores = opened(TRIPLE)
    U, V = stack.columns(cores.left_basis.vectors), stack.rows(cores.right_basis.vectors)
    merged = torch.randn(11, 35 if space == "knots" else 11, generator=generator(7))
    dense = U @ merged.double() @ (V if space == "core" else torch.eye(35, dtype=torch.float64))
    values = torch.linalg.svdvals(dense)[:11]
    shares = values.square().cumsum(0) / values.square().sum()
    k = min(rank, 11)
    if energy is not None:
        k = min(k, 1 + int((shares < energy - 1e-12).sum()))
    result = lifted(space, stack, cores, merged, rank, energy)
    assert result.A.shape == (k, 35) and result.B.shape == (25, k)
    assert result.energy == pytest.approx(float(shares[k - 1]), abs=1e-7)
    norm, least = float(dense.norm()), float(values[k:].norm())
    assert least - ROUNDING * norm <= float((product(result) - dense).norm()) <= least + ROUNDING * norm
    for factor in (result.A, result.B):
        assert factor.dtype == torch.float32 and factor.is_contiguous()
        assert factor.untyped_storage().nbytes() == 4 * factor.numel()
    if space == "core" or rank < 11 or energy is not None:
        gram = result.A.double() @ result.A.double().T
        assert torch.allclose(gram, torch.eye(k, dtype=torch.float64), rtol=0, atol=2.1 * U32)


def test_knots_keep_what_was_merged_to_the_bit():
    stack, cores = opened(TRIPLE)
    merged = torch.randn(11, 35, generator=generator(8))
    result = lift_knots(stack, cores, merged, 11)
    assert torch.equal(result.A, merged) and result.A.data_ptr() != merged.data_ptr()
    assert torch.allclose(result.B.double().T @ result.B.double(), torch.eye(11).double(), rtol=0, atol=2.1 * U32)


@pytest.mark.parametrize("space", ["knots", "core"])
def test_zero_adapters_span_nothing(space):
    zero = TRIPLE._replace(Bs=[0 * B for B in TRIPLE.Bs])
    stack, cores = opened(zero)
    tensors = task_tensors(space, zero, cores)
    assert all(tensor.numel() == 0 for tensor in tensors)
    result = lifted(space, stack, cores, tensors[0].float(), 5)
    assert result.A.shape == (1, 35) and result.B.shape == (25, 1) and not result.B.any() and result.energy == 1
    nothing = lifted(space, *opened(TRIPLE), torch.zeros(11, 35 if space == "knots" else 11), 5, 0.9)
    assert not nothing.B.any() and nothing.energy == 1


# --- how nearly parallel


def test_orthogonal_adapters_are_far_from_parallel():
    left, right = orthonormal(1, 30, 6), orthonormal(2, 20, 6)
    given = Adapters([right[:, :2].T, 3 * right[:, 2:].T], [left[:, :2], left[:, 2:]], [1.0, 0.1], [1.0, 1.0])
    assert nearness(opened(given)[1]) == pytest.approx((1, 1, 1), abs=1e-12)


@pytest.mark.parametrize("apart", [1e-2, 1e-4])
def test_an_a_that_was_drawn_once(apart):
    """Rows of two adapters at an angle of about ``apart`` each: B tells nothing of it."""
    given = drawn(4, 200, 300, [4, 4])
    rows = torch.linalg.qr(given.As[0].double().T)[0].T
    other = torch.linalg.qr(given.As[1].double().T - rows.T @ (rows @ given.As[1].double().T))[0].T
    given = given._replace(As=[rows, rows + apart * other])
    found = nearness(opened(given)[1])
    # cos = 1 / sqrt(1 + apart^2) between the two, and 1 - cos = apart^2 / 2: its smallest value is sqrt(1 - cos). Their
    # singular vectors are other rows of the same spans, turned by B: no nearer.
    assert found.rows == pytest.approx(apart / math.sqrt(2), rel=1e-3)
    _, _, vh = textbook.unit_directions(given.deltas, [1.0, 1.0])
    assert found.rows == pytest.approx(float(torch.linalg.svdvals(vh)[-1]), rel=1e-8)
    assert found.columns > 0.5 and found.polar == found.rows


def test_copies_are_parallel_and_harm_no_polar_factor():
    one = drawn(5, 30, 40, [3])
    twice = nearness(opened(Adapters(one.As * 2, one.Bs * 2, [1.0, 1.0], [1.0, 1.0]))[1])
    assert twice.rows < 1e-15 and twice.columns < 1e-15 and twice.polar == pytest.approx(math.sqrt(2), rel=1e-12)
    wide = nearness(opened(drawn(6, 4, 40, [3, 3]))[1])  # six columns of four elements
    assert wide.columns == 0 and wide.rows > 0.1 and wide.polar > 0
    zero = nearness(opened(one._replace(Bs=[0 * one.Bs[0]]))[1])
    assert zero == (1, 1, 1)


# --- requests


def test_requests_that_do_not_fit():
    stack, cores = opened(TRIPLE)
    for lift, shape in ((lift_knots, (11, 35)), (lift_core, (11, 11))):
        lift(stack, cores, torch.zeros(shape), 1)
        with pytest.raises(ValueError, match="merged is"):
            lift(stack, cores, torch.zeros(11, 34), 1)
        with pytest.raises(ValueError, match="merged is"):
            lift(stack, cores, torch.zeros(10, shape[1]), 1)
        with pytest.raises(ValueError, match="rank is 0"):
            lift(stack, cores, torch.zeros(shape), 0)
        with pytest.raises(ValueError, match="energy is 0"):
            lift(stack, cores, torch.zeros(shape), 1, 0.0)
        with pytest.raises(ValueError, match="merged is not finite"):
            lift(stack, cores, torch.full(shape, math.nan), 1)
    large = TRIPLE._replace(scalings=[1.0, 1e39, 1.0])
    for project in (core_factors, lambda cores: knots_factors(cores, large.As)):
        with pytest.raises(ValueError, match=r"does not fit torch\.float32"):
            project(opened(large)[1])
    assert knots_factors(opened(large)[1], large.As, torch.float64).Bs[1].dtype == torch.float64
