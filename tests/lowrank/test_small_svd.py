"""Leading singular vectors of small cores against a full SVD in float64."""

import pytest
import torch
from low_rank import generator, orthonormal, squares_of

from merge_engine.lowrank.small_svd import leading, product_norm, rank_that_keeps


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 31, 4), (40, 9, 17)])
def test_product_norm_is_the_dense_one(shape, dtype):
    rows, columns, rank = shape
    generator = torch.Generator().manual_seed(rank)
    A, B = (torch.randn(*s, generator=generator).to(dtype) for s in ((rank, columns), (rows, rank)))
    # Two float64 sums of at most N and M terms: 1e-12 is far above their rounding.
    assert product_norm(A, B) == pytest.approx((B.double() @ A.double()).norm().item(), rel=1e-12)
    assert product_norm(A, torch.zeros_like(B)) == 0.0


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


@pytest.mark.parametrize("scale", [1e-140, 1.0, 1e140])
def test_few_leading_vectors_of_a_core_of_any_size(scale):
    """As long as the squares of its values are float64."""
    core = orthonormal(32, 32, generator(24)) * torch.logspace(0, -2, 32, dtype=torch.float64) * scale
    core = core @ orthonormal(32, 32, generator(25))
    found, squares = leading(core, 5, None), squares_of(core / scale)
    assert torch.allclose(found.s, scale * squares[:5].sqrt(), rtol=1e-10, atol=0)
    assert found.kept == pytest.approx(float(squares[:5].sum() / squares.sum()), abs=1e-12)
    assert len(leading(core, 8, 0.9).s) == 1 + int((squares.cumsum(0) / squares.sum() < 0.9).sum())


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.99, 1.0])
def test_the_rank_that_keeps_a_share_is_the_smallest(share):
    values = torch.logspace(2, -1, 12, dtype=torch.float64)
    squares = [float(value) ** 2 for value in values]
    kept = [sum(squares[:k]) / sum(squares) for k in range(1, 13)]
    k = rank_that_keeps(share, values)
    assert kept[k - 1] >= share * (1 - 1e-14) and (k == 1 or kept[k - 2] < share)
    assert rank_that_keeps(share, torch.zeros(3, dtype=torch.float64)) == 1
