"""Combinations of columns by their triangle: what is safe, and the same bits whether it is looked at or not."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_engine.lowrank.small_svd import upper
from merge_engine.lowrank.triangle import Triangle


def triangle(rows, columns, seed, nearness, scales):
    """Of random columns, of which the last one is so near to the first, and whose lengths differ by so much."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    X[:, -1] = X[:, 0] + nearness * X[:, -1]
    X *= scales ** torch.linspace(0, 1, columns, dtype=torch.float64)
    return X, Triangle(upper(torch.geqrf(X)), torch.linalg.vector_norm(X, dim=0))


@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    rows=st.sampled_from([40, 64]),
    columns=st.sampled_from([1, 2, 17, 40]),
    nearness=st.sampled_from([1.0, 1e-2, 1e-4, 1e-5, 1e-6, 1e-8, 0.0]),
    scales=st.sampled_from([1.0, 1e-12, 1e12]),
    seed=st.integers(0, 3),
)
def test_a_triangle_that_is_safe_passes_the_checks_of_any_block(rows, columns, nearness, scales, seed):
    _, one = triangle(rows, columns, seed, nearness, scales)
    block = torch.randn(columns, 5, generator=torch.Generator().manual_seed(seed + 9), dtype=torch.float64)
    first, second = one.combination(block), one.combination(block)
    assert (first is None) == (second is None)
    if first is not None:
        assert torch.equal(first, second)
        missed = torch.linalg.vector_norm(one.upper @ second.T - block, dim=0)
        assert (missed <= 2.0**-30 * torch.linalg.vector_norm(block, dim=0)).all()
    # The worst block for it is along its weakest direction.
    weakest = torch.linalg.svd(one.upper).U[:, -1:]
    if one._is_safe:
        _, other = triangle(rows, columns, seed, nearness, scales)
        assert torch.equal(other.combination(weakest), one.combination(weakest))
    assert one._is_safe or nearness < 1e-2 or columns == 1


def test_combinations_give_q_times_the_block():
    X, one = triangle(300, 40, 0, 1e-2, 1e3)
    assert one._is_safe
    Q = torch.linalg.qr(X).Q
    Q *= torch.sign(torch.diagonal(Q.T @ X) * torch.diagonal(one.upper))  # as the reflectors turn them
    for seed in range(3):
        block = torch.randn(40, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = X @ one.combination(block).T
        assert (found - Q @ block).norm() <= 1e-11 * block.norm()


def test_the_second_use_looks_at_the_triangle_and_not_at_the_solution(monkeypatch):
    _, one = triangle(64, 17, 0, 1.0, 1.0)
    block = torch.eye(17, dtype=torch.float64)[:, :3]
    want = one.combination(block)
    monkeypatch.setattr("merge_engine.lowrank.triangle._solutions", lambda *_: iter(()))
    assert torch.equal(one.combination(block), want)
    _, singular = triangle(64, 17, 0, 0.0, 1.0)
    assert not singular._is_safe and singular.combination(block) is None
