"""Task tensors as the CPU backend sees them: products, and what is refused."""

import pytest
import torch
from cpu_merges import U, factors
from task_tensors import whole

from merge_engine.cpu.source import Product
from merge_engine.loops import door


@pytest.mark.quick
@pytest.mark.parametrize("rank", [1, 4, 8, 17, 64, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compiled", [True, False])
def test_products_are_exact_to_rounding(rank, dtype, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(door, "installed", lambda: False)
    generator = torch.Generator().manual_seed(rank)
    A, B = factors(generator, 67, 131, rank, dtype, integers=False)
    got = whole(Product(A, B, 0.7)).double()
    exact = 0.7 * (B.double() @ A.double())
    bound = (rank + 2) * U * 0.7 * (B.double().abs() @ A.double().abs())
    assert ((got - exact).abs() <= bound).all()


@pytest.mark.parametrize("A, B", [((8, 5), (4, 16)), ((8,), (4, 8))])
def test_factors_have_to_fit(A, B):
    with pytest.raises(ValueError, match="wanted \\[r, N\\] and \\[M, r\\] on the CPU"):
        Product(torch.ones(A), torch.ones(B), 1.0)
    with pytest.raises(ValueError, match="on the CPU"):
        Product(torch.ones(8, 5, device="meta"), torch.ones(4, 8, device="meta"), 1.0)
