"""Products and norms of a large matrix, by loops and by torch's operators, against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_engine.loops import door
from merge_engine.lowrank.products import _in_float64, squared_norm, times
from merge_engine.runtime.threads import threads

U = 2.0**-24
GUARD = 33  # elements on each side of a tensor that must be neither read nor written


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
        got = times(block, matrix)
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
            got = times(block, matrix)
        assert torch.equal(got, block.double() @ matrix.double().T)


def test_sums_of_many_terms_are_as_good_as_those_of_blas():
    """Sums of 20000 terms of one sign, of which one accumulator in float32 would lose 1e-5."""
    if door.matrix_loops() is None:
        pytest.skip("needs Numba: of some BLAS such sums are off by 4e-6")
    matrix, block = torch.rand(8, 20000), torch.rand(4, 20000)
    for one, other in ((block, matrix), (torch.rand(4, 20000), torch.rand(20000, 8).T)):
        exact = one.double() @ other.double().T
        with threads(1):
            assert float((times(one, other) / exact - 1).abs().max()) < 2e-6


@pytest.mark.quick
@pytest.mark.parametrize("stride", [1, 2])
def test_squared_norm(stride):
    values = torch.randn(300, 2 * 129, generator=torch.Generator().manual_seed(2))[:, ::stride] * 1e18  # squares: 1e36
    exact = float(values.double().square().sum())
    for count in (1, 2):
        with threads(count):
            assert squared_norm(values) == pytest.approx(exact, rel=1e-13)
            assert squared_norm(values * 100) == pytest.approx(exact * 1e4, rel=1e-6)  # 1e40 is no float32


@pytest.mark.quick
def test_without_loops(monkeypatch):
    """The operators do the same."""
    matrix, block = torch.randn(40, 70), torch.randn(5, 70)
    with threads(1):
        ours = times(block, matrix), squared_norm(matrix)
        monkeypatch.setattr(door, "installed", lambda: False)
        theirs = times(block, matrix), squared_norm(matrix)
    assert bool(((ours[0] - theirs[0]).abs() <= 2 * bound(block, matrix)).all())
    assert ours[1] == pytest.approx(theirs[1], rel=1e-13)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(bad):
    matrix = torch.ones(20, 30)
    matrix[7, 11] = bad
    with threads(1):
        assert not torch.tensor(squared_norm(matrix)).isfinite()


def integers(*shape: int) -> torch.Tensor:
    """Small enough that float32 sums them without rounding, in any order."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(sum(shape))).float()


VIEWS = {
    "rows of a larger one": lambda m, n: integers(m + 5, n)[2 : m + 2],
    "columns of a larger one": lambda m, n: integers(m, n + 5)[:, 2 : n + 2],
    "every other row": lambda m, n: integers(2 * m, n)[::2],
    "every other column": lambda m, n: integers(m, 2 * n)[:, ::2],
    "one row many times": lambda m, n: integers(1, n).expand(m, n),
    "transposed rows": lambda m, n: integers(n + 5, m)[3 : n + 3].T,
    "transposed columns": lambda m, n: integers(n, m + 5)[:, 3 : m + 3].T,
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("shape", [(1, 20), (5, 9), (13, 7), (20, 1), (40, 264), (0, 9), (9, 0), (0, 0)], ids=str)
def test_any_view_of_any_shape(view, shape):
    matrix = view(*shape)
    for p in (0, 1, 4, 65):
        for block in (integers(p, shape[1]), integers(shape[1], p).T, integers(p, shape[1]).bfloat16()):
            with threads(1):
                got = times(block, matrix)
            assert got.dtype == torch.float64 and torch.equal(got, block.double() @ matrix.double().T)
    if matrix.numel():
        with threads(1):
            assert squared_norm(matrix) == float(matrix.double().square().sum())


@pytest.mark.parametrize("shape", [(6, 8), (11, 16), (13, 264), (100, 520)], ids=str)
@pytest.mark.parametrize("p", [4, 64, 68])
def test_loops_stay_within_their_tensors(shape, p):
    """NaN around what is read would show in the sums; what lies around what is written stays."""
    if door.matrix_loops() is None:
        pytest.skip("needs Numba")
    loops = door.matrix_loops()
    (m, n), around = shape, []

    def guarded(values: torch.Tensor) -> torch.Tensor:
        memory = torch.full((values.numel() + 2 * GUARD,), torch.nan, dtype=values.dtype)
        around.extend((memory[:GUARD], memory[-GUARD:]))
        return memory[GUARD:-GUARD].view(values.shape).copy_(values)

    vectors, matrix = integers(p, n), integers(m, n)
    exact, empty = vectors.double() @ matrix.double().T, torch.full((p, m), 7.0)
    rows, columns, part, ours = guarded(matrix), guarded(matrix.T), guarded(empty), guarded(vectors)
    by_rows, by_columns = guarded(empty.double()), guarded(empty.double())
    loops.times_rows(ours.numpy(), rows.numpy(), by_rows.numpy())
    loops.times_columns(ours.numpy(), columns.numpy(), part.numpy(), by_columns.numpy())
    assert torch.equal(by_rows, exact) and torch.equal(by_columns, exact)
    assert all(bool(edge.isnan().all()) for edge in around)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_bits_depend_on_the_values_alone(transposed):
    """Not on where the matrix lies, nor on what memory held before."""
    if door.matrix_loops() is None:
        pytest.skip("needs Numba: a BLAS may look at addresses")
    generator = torch.Generator().manual_seed(3)
    block, values = torch.randn(7, 1003, generator=generator), torch.randn(23 * 1003, generator=generator)
    found = []
    for offset in (0, 1, 3, 16):
        matrix = torch.cat([torch.full((offset,), torch.nan), values])[offset:]
        matrix = matrix.view(1003, 23).T if transposed else matrix.view(23, 1003)
        with threads(1):
            found.append(times(block, matrix))
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30, 1e36])
def test_values_of_extreme_size(scale):
    """Vectors are unit rows, so that a product is hardly larger than the matrix: it stays in float32."""
    generator = torch.Generator().manual_seed(4)
    block = torch.nn.functional.normalize(torch.randn(5, 300, generator=generator, dtype=torch.float64))
    for matrix in (torch.randn(40, 300, generator=generator), torch.randn(300, 40, generator=generator).T):
        matrix = matrix * scale
        subnormal = 300 * 2.0**-150  # half of the smallest float32, for each product
        with threads(1):
            got = times(block, matrix)
            norm = squared_norm(matrix)
        assert bool(((got - block @ matrix.double().T).abs() <= bound(block, matrix) + subnormal).all())
        assert norm == pytest.approx(float(matrix.double().square().sum()), rel=1e-13)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_gpus_products_are_those_of_float64(transposed):
    matrix, block = torch.randn(1100, 40), torch.randn(3, 1100 if transposed else 40)
    matrix = matrix.T if transposed else matrix
    exact = block.double() @ matrix.double().T
    torch.testing.assert_close(_in_float64(block, matrix), exact, rtol=1e-12, atol=1e-12)
