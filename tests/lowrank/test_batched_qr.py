"""Orthonormal rows by Cholesky factors: the defining equations, on blocks that plain Cholesky QR fails for."""

import pytest
import torch
from low_rank import U64, generator, orthonormal

from merge_engine.lowrank.batched_qr import gaussians, nearly_orthonormal_rows, orthonormal_rows

P, N = 24, 300
CPU = torch.device("cpu")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def graded(exponent):
    """Mixed rows of singular values from 1 to 10**-exponent."""
    return (
        normal(P, P, seed=1)
        @ (torch.logspace(0, -exponent, P, dtype=torch.float64) * orthonormal(N, P, generator(2))).T
    )


def near(share):
    """Half of the rows are the other half, but for a share of them."""
    block = normal(P, N)
    block[12:] = block[:12] + share * normal(12, N, seed=3)
    return block


BLOCKS = {
    "gaussian": normal(P, N),
    "equal rows": near(0.0),
    "rows near each other": near(1e-4),
    "rows very near each other": near(1e-7),
    "zero": torch.zeros(P, N, dtype=torch.float64),
    "two zero rows": torch.cat([torch.zeros(2, N, dtype=torch.float64), normal(P - 2, N)]),
    "rank 5": normal(P, 5) @ normal(5, N, seed=4),
    "ones": torch.ones(P, N, dtype=torch.float64),
    "graded to 1e-6": graded(6),
    "graded to 1e-12": graded(12),
    "rows of all sizes": normal(P, N) * torch.logspace(-100, 100, P, dtype=torch.float64)[:, None],
    "huge": normal(P, N) * 1e140,
    "tiny": normal(P, N) * 1e-90,
}


@pytest.fixture(scope="module")
def found():
    return orthonormal_rows(torch.stack(list(BLOCKS.values())), gaussians(P, N, CPU))


@pytest.mark.parametrize("kind", BLOCKS)
def test_rows_are_orthonormal_and_span_the_block(found, kind):
    block, rows = BLOCKS[kind], found.rows[list(BLOCKS).index(kind)]
    # N terms an inner product, and P of them a row: a bound on rounding that is some times what it comes to.
    rounding = 2 * (N + P) * U64
    assert float((rows @ rows.T - torch.eye(P, dtype=torch.float64)).abs().max()) <= rounding
    lengths = torch.linalg.vector_norm(block, dim=1)
    missed = torch.linalg.vector_norm(block - block @ rows.T @ rows, dim=1)
    assert bool((missed <= 10 * rounding * lengths).all())


@pytest.mark.parametrize("kind", ["gaussian", "rank 5", "huge"])
def test_inner_products_come_along(found, kind):
    block, gram = BLOCKS[kind], found.gram[list(BLOCKS).index(kind)]
    torch.testing.assert_close(gram, block @ block.T, rtol=1e-12, atol=0)


def test_a_row_that_is_apart_by_less_than_1e_8_loses_that_share():
    for share in (1e-9, 1e-11):
        block = near(share)
        rows = orthonormal_rows(block[None], gaussians(P, N, CPU)).rows[0]
        missed = torch.linalg.vector_norm(block - block @ rows.T @ rows, dim=1) / torch.linalg.vector_norm(block, dim=1)
        assert float(missed.max()) <= 2 * share
        assert float((rows @ rows.T - torch.eye(P, dtype=torch.float64)).abs().max()) <= 2 * (N + P) * U64


@pytest.mark.parametrize("exponent", [16, 40, 300])
def test_no_factor_fails_where_rounding_decides(exponent):
    """Rows beyond rounding are of no use, but numbers, and orthonormal to the shift."""
    block = graded(exponent)
    rows = orthonormal_rows(block[None], gaussians(P, N, CPU)).rows[0]
    assert float((rows @ rows.T - torch.eye(P, dtype=torch.float64)).abs().max()) <= 1e-5
    missed = torch.linalg.vector_norm(block - block @ rows.T @ rows, dim=1)
    assert bool((missed <= 1e-7 * torch.linalg.vector_norm(block, dim=1)).all())


def test_a_block_that_is_not_finite_touches_no_other():
    blocks = torch.stack([normal(P, N), normal(P, N, seed=5), normal(P, N)])
    want = orthonormal_rows(blocks, gaussians(P, N, CPU)).rows
    blocks[1, 3, 7] = torch.nan
    got = orthonormal_rows(blocks, gaussians(P, N, CPU)).rows
    assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2]) and bool(got[1].isnan().any())


def test_as_many_rows_as_columns():
    block = normal(1, 30, 30)
    block[0, 20:] = block[0, :10]
    rows = orthonormal_rows(block, gaussians(30, 30, CPU)).rows[0]
    assert float((rows @ rows.T - torch.eye(30, dtype=torch.float64)).abs().max()) <= 1e-13
    assert float((rows.T @ rows - torch.eye(30, dtype=torch.float64)).abs().max()) <= 1e-13


def test_nearly_orthonormal_rows_are_better_conditioned_and_span_the_same():
    block = graded(5)
    rows, gram = nearly_orthonormal_rows(block[None])
    torch.testing.assert_close(gram[0], block @ block.T, rtol=1e-12, atol=0)
    # P_1 P_1^T = I - L_1^-1 S L_1^-T, S = s diag(P P^T): the squared lengths sum up to p at most.
    condition = float(torch.linalg.cond(block))
    shift = U64 * P * (N + P + 1)
    assert 1e4 < condition and float(torch.linalg.cond(rows[0])) <= (1 + shift * P * condition**2) ** 0.5
    q = torch.linalg.qr(rows[0].T).Q.T
    assert float((block - block @ q.T @ q).norm()) <= 1e-12 * float(block.norm())


def test_gaussians_are_the_same_at_every_call():
    torch.manual_seed(1)
    state, first = torch.get_rng_state(), gaussians(7, 40, CPU)
    torch.manual_seed(2)
    assert torch.equal(gaussians(7, 40, CPU), first)
    torch.manual_seed(1)
    gaussians(3, 3, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    # Squared lengths are sums of 4000 squares over 4000: 1 with a standard deviation of sqrt(2 / 4000).
    squares = gaussians(50, 4000, CPU).square().sum(1)
    assert bool(((squares - 1).abs() <= 5 * (2 / 4000) ** 0.5).all())
