"""The loops of whole tensors give the bits of the operators that do their work without Numba."""

import pytest
import torch

from merge_engine.cpu import mask
from merge_engine.loops import door
from merge_engine.whole_tensors import group, stock

pytest.importorskip("numba")

SIZES = [(1, 1), (3, 341), (1, 1024), (7, 733)]


@pytest.fixture
def both(monkeypatch):
    """both(work): what work() gives by the loops, and by operators."""
    assert door.load()

    def run(work):
        compiled = work()
        with monkeypatch.context() as without:
            for name in ("loops", "whole_loops"):
                without.setattr(door, name, lambda work=0: None)
            return compiled, work()

    return run


def drawn(count, shape, kind):
    found = torch.randn((count, *shape), generator=torch.Generator().manual_seed(count))
    if kind == "alike":  # zeros, equal values, and opposite ones
        found = (2 * found).round() / 2
    return found


@pytest.mark.parametrize("kind", ["normal", "alike"])
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_steps_of_sce(count, shape, kind, both):
    def variance():
        return stock._variance(drawn(count, shape, kind), torch.empty(shape))

    compiled, operators = both(variance)
    assert torch.equal(compiled.view(torch.int32), operators.view(torch.int32))
    exact = drawn(count, shape, kind).double().var(0, correction=0)
    assert torch.allclose(compiled.double(), exact, rtol=1e-5, atol=1e-12)

    def chosen():
        found = drawn(count, shape, kind)
        stock._choose(found, (compiled - 0.3).clamp(min=0))
        return found

    first, second = both(chosen)
    assert torch.equal(first, second) and torch.equal(first, drawn(count, shape, kind) * (compiled > 0.3))

    weights = torch.rand(count, generator=torch.Generator().manual_seed(7)).numpy()
    for floor in (0.0, 1e-6, 0.9):
        first, second = both(
            lambda floor=floor: stock._onto_agreeing(torch.ones(shape), drawn(count, shape, kind), weights, floor)
        )
        assert torch.equal(first.view(torch.int32), second.view(torch.int32))


@pytest.mark.parametrize("columns", [slice(None), slice(5, 90)])
def test_differences_of_stored_dtypes(columns, both):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        base, one, two = (torch.randn(9, 100, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3))
        part = (slice(2, 8), columns)
        first, second = both(lambda of=(one, two), base=base, part=part: group.differences(of, part, base).clone())
        assert torch.equal(first, second)
        assert torch.equal(first[1], (two.float() - base.float())[part])


@pytest.mark.parametrize("columns", [slice(0, 1), slice(0, 64), slice(3, 130), slice(6, 7)])
def test_random_words(columns, both):
    where = {"seed": 2**63 + 5, "stream": 77, "adapter": 3, "rows": slice(2**20, 2**20 + 5), "columns": columns}
    first, second = both(lambda: mask.random_words(**where))
    assert first.shape == second.shape and (first == second).all()
