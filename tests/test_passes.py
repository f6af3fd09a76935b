"""Passes over a large matrix, by loops and by torch's operators, against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_engine import jit, passes
from merge_engine.pipeline import threads

U = 2.0**-24


def bound(block: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Of the error of each element: rounding the block, and the sums, in parts of 1024 at most, that are then added."""
    terms = min(matrix.shape[1], 1024) + matrix.shape[1] // 256 + 8
    return (terms + 1) * U * (block.double().abs() @ matrix.double().abs().T) + 1e-300


@given(
    seed=st.integers(0, 2**31),
    m=st.integers(1, 300),
    n=st.integers(1, 600),
    p=st.integers(1, 70),
    transposed=st.booleans(),
    count=st.integers(1, 2),
)
def test_products_are_those_of_float64(seed, m, n, p, transposed, count):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(*((n, m) if transposed else (m, n)), generator=generator)
    matrix = matrix.T if transposed else matrix
    block = torch.randn(p, n, generator=generator, dtype=torch.float64)
    with threads(count):
        got = passes.times(block, matrix)
    assert got.dtype == torch.float64 and got.shape == (p, m)
    assert bool(((got - block @ matrix.double().T).abs() <= bound(block, matrix)).all())


@pytest.mark.parametrize("shape", [(5, 9), (6, 8), (7, 8), (257, 8), (512, 3000), (1031, 1025)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_edges_of_the_blocks(shape, transposed):
    """Integers are summed without rounding: every row, column and vector counts once."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randint(-8, 9, shape, generator=generator).float()
    matrix = matrix.T if transposed else matrix
    for p in (1, 3, 4, 5, 16, 65):
        block = torch.randint(-8, 9, (p, matrix.shape[1]), generator=generator).float()
        with threads(1):
            got = passes.times(block, matrix)
        assert torch.equal(got, block.double() @ matrix.double().T)


def test_sums_of_many_terms_are_as_good_as_those_of_blas():
    """Sums of 20000 terms of one sign, of which one accumulator in float32 would lose 1e-5."""
    matrix, block = torch.rand(8, 20000), torch.rand(4, 20000)
    for one, other in ((block, matrix), (torch.rand(4, 20000), torch.rand(20000, 8).T)):
        exact = one.double() @ other.double().T
        with threads(1):
            assert float((passes.times(one, other) / exact - 1).abs().max()) < 2e-6


@pytest.mark.parametrize("stride", [1, 2])
def test_squared_norm(stride):
    values = torch.randn(300, 2 * 129, generator=torch.Generator().manual_seed(2))[:, ::stride] * 1e18  # squares: 1e36
    exact = float(values.double().square().sum())
    for count in (1, 2):
        with threads(count):
            assert passes.squared_norm(values) == pytest.approx(exact, rel=1e-13)
            assert passes.squared_norm(values * 100) == pytest.approx(exact * 1e4, rel=1e-6)  # 1e40 is no float32


def test_without_loops(monkeypatch):
    """The operators do the same."""
    matrix, block = torch.randn(40, 70), torch.randn(5, 70)
    with threads(1):
        ours = passes.times(block, matrix), passes.squared_norm(matrix)
        monkeypatch.setattr(jit, "loops", lambda: None)
        theirs = passes.times(block, matrix), passes.squared_norm(matrix)
    assert bool(((ours[0] - theirs[0]).abs() <= 2 * bound(block, matrix)).all())
    assert ours[1] == pytest.approx(theirs[1], rel=1e-13)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(bad):
    matrix = torch.ones(20, 30)
    matrix[7, 11] = bad
    with threads(1):
        assert not torch.tensor(passes.squared_norm(matrix)).isfinite()
