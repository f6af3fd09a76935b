"""Sums of products of any weights, cut from one decomposition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_engine.lowrank.stack import Stack

U = 2**-24  # unit roundoff of float32


@given(
    shape=st.sampled_from([(1, 7), (13, 5), (31, 41), (97, 29)]),
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rank=st.integers(1, 40),
    seed=st.integers(0, 99),
)
@settings(max_examples=30)
def test_a_stack_cuts_sums_of_products_as_a_dense_svd_does(shape, ranks, dtype, rank, seed):
    """Against numpy's SVD of the dense sum in float64; factors of any weights come from one decomposition."""
    generator = torch.Generator().manual_seed(seed)
    As = [torch.randn(r, shape[1], generator=generator).to(dtype) for r in ranks]
    Bs = [torch.randn(shape[0], r, generator=generator).to(dtype) for r in ranks]
    stack = Stack(As, Bs)
    for weights in torch.randn(2, len(ranks), generator=generator, dtype=torch.float64).tolist():
        dense = sum(w * (B.double() @ A.double()) for w, A, B in zip(weights, As, Bs, strict=True)).numpy()
        s = np.linalg.svd(dense, compute_uv=False)
        A, B, energy = stack.cut(weights, rank)
        k = min(rank, *shape, sum(ranks))
        assert A.shape == (k, shape[1]) and B.shape == (shape[0], k)
        assert energy == pytest.approx((s[:k] ** 2).sum() / (s**2).sum(), abs=1e-12)
        error = np.linalg.norm(dense - B.double().numpy() @ A.double().numpy())
        best = math.sqrt((s[k:] ** 2).sum())
        # The factors' rounding moves the product by 2 u |D_k|, and what of it lies in the rest adds in quadrature.
        assert error <= best + 2 * U * math.sqrt((s[:k] ** 2).sum()) + 1e-12 * s[0]
        wanted = 0.8
        least = 1 + int((np.cumsum(s**2) / (s**2).sum() < wanted).sum())
        assert len(stack.cut(weights, sum(ranks), wanted).A) == min(least, sum(ranks))


def test_a_stack_whose_products_cancel_is_zero():
    A, B = torch.randn(3, 17), torch.randn(11, 3)
    result = Stack([A, A], [B, B]).cut([0.7, -0.7], 4)
    assert not result.B.any() and result.energy == 1.0


def test_a_stack_refuses_what_does_not_fit():
    A, B = torch.randn(3, 17), torch.randn(11, 3)
    for As, Bs in (([], []), ([A], [B, B]), ([A], [B.T]), ([A, A[:, 1:]], [B, B]), ([A * math.inf], [B])):
        with pytest.raises(ValueError, match=r"wanted|not finite"):
            Stack(As, Bs)
    for weights, rank in (([], 1), ([1.0], 0), ([math.nan], 1)):
        with pytest.raises(ValueError, match=r"wanted|not finite"):
            Stack([A], [B]).cut(weights, rank)
    with pytest.raises(ValueError, match="overflows float32"):
        Stack([A], [B]).cut([1e39], 3)
