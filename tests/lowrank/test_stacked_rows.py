"""Stacked rows against one matrix in float64."""

import pytest
import torch
from low_rank import generator

from merge_engine.lowrank import stacked_rows
from merge_engine.lowrank.stacked_rows import StackedRows

WIDTHS = [1, 5, 99, 100, 101, 700]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


@pytest.mark.quick
@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_of_the_stacked_matrix(n, dtype, monkeypatch):
    monkeypatch.setattr(stacked_rows, "_AT_A_TIME", 705)  # 100 columns
    rows = [drawn(0, 3, n, dtype=dtype), drawn(1, 0, n, dtype=dtype), drawn(2, n, 4, dtype=dtype).T]
    stacked, exact = StackedRows(rows), torch.cat([each.double() for each in rows])
    assert stacked.shape == (7, n) and torch.equal(stacked.wide(), exact)
    assert stacked.nbytes == (8 if dtype == torch.float64 else 4) * 7 * n
    combination = drawn(3, 5, 7)
    wanted = combination @ exact
    # A sum of 7 products in float64, in any order.
    bound = 7 * 2.0**-53 * (combination.abs() @ exact.abs())
    found = stacked.combined(combination, torch.float64)
    assert found.is_contiguous() and ((found - wanted).abs() <= bound).all()
    turned = stacked.combined(combination, torch.float32, turned=True)
    assert turned.shape == (n, 5) and turned.is_contiguous()
    assert torch.equal(turned, found.float().T)
    assert torch.equal(stacked.combined(combination, torch.float32), found.float())


def test_mixed_dtypes_are_kept_in_the_widest():
    narrow, middle, wide = (drawn(i, 2, 600, dtype=dtype) for i, dtype in enumerate(DTYPES[::-1][1:]))
    assert StackedRows([narrow, middle]).nbytes == 4 * 4 * 600
    all_three = StackedRows([narrow, middle, wide])
    assert all_three.nbytes == 8 * 6 * 600
    assert torch.equal(all_three.wide(), torch.cat([narrow.double(), middle.double(), wide]))


def test_results_have_memory_of_their_own():
    """Buffers are used again: earlier results must not change."""
    stacked = StackedRows([drawn(0, 4, 700)])
    first = stacked.combined(torch.eye(4).double(), torch.float64)
    kept = first.clone()
    stacked.combined(drawn(1, 4, 4), torch.float64)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_an_empty_side_is_refused(shape):
    with pytest.raises(ValueError, match="no empty side"):
        StackedRows([torch.ones(shape)])
