"""What the kernels read: packed factors, dense tensors, and what is refused."""

import importlib.util

import pytest
import torch
from kernel_groups import FLOATS, WEIGHTS, exact, group, seen
from merge_engine.kernels.merge import merge_deltas
from merge_engine.kernels.select import model_trims
from merge_engine.kernels.source import Dense, Drop, Lora, pack


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("ranks", [(1,), (4, 17, 64), (128, 80)], ids=str)
def test_ranks(ranks: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    source = group((33, 47), ranks=ranks, dtype=dtype, device=device)
    want, bound = exact(source)
    assert bool(((seen(source).double() - want).abs() <= bound).all())


def test_tensors_that_are_not_contiguous(device: torch.device) -> None:
    lora = group(device=device)
    pairs = [(lora.A[0, i, :8].T.contiguous().T, lora.B[0, i, :, :8].T.contiguous().T) for i in range(3)]
    packed = pack([pairs], [lora.scaling[0].tolist()])
    assert torch.equal(packed.A, lora.A) and torch.equal(packed.B, lora.B)
    tensors = torch.randn(3, 2, 9, 40, device=device)[:, :, ::2, 3:30].transpose(0, 1)
    assert torch.equal(seen(Dense(tensors)), tensors)


@pytest.mark.quick
def test_padding_changes_no_bit(device: torch.device) -> None:
    alone = group(ranks=(8,), device=device)
    A, B = alone.A[0, 0, :8], alone.B[0, 0, :, :8]
    wide = pack([[(A, B), (torch.ones(30, 70), torch.ones(37, 30))]], [[0.5, 1.0]], device=device)
    assert wide.rank == 32
    assert torch.equal(seen(wide)[0, 0], seen(alone)[0, 0])


@pytest.mark.quick
def test_errors_say_what_was_wanted(device: torch.device) -> None:
    lora = group(device=device)
    with pytest.raises(ValueError, match="multiple of 16"):
        Lora(lora.A[:, :, :8].contiguous(), lora.B[..., :8].contiguous(), lora.scaling)
    with pytest.raises(ValueError, match="scaling is"):
        Lora(lora.A, lora.B, lora.scaling[:, :2])
    with pytest.raises(ValueError, match="wanted 1 in the last dimension"):
        Dense(lora.A.transpose(2, 3))
    with pytest.raises(ValueError, match=r"wanted \[r, 70\]"):
        pack([[(torch.ones(4, 70), torch.ones(37, 5))]], [[1.0]])
    with pytest.raises(ValueError, match="at least one"):
        pack([[]], [[]])
    with pytest.raises(ValueError, match="elect is 'most'"):
        merge_deltas(lora, [WEIGHTS], elect="most")
    with pytest.raises(ValueError, match="without an election"):
        merge_deltas(lora, [WEIGHTS], divisor="count")
    with pytest.raises(ValueError, match="wanted 3"):
        merge_deltas(lora, [[1.0, 1.0]])
    with pytest.raises(ValueError, match=r"out is \[1, 1, 2, 2\]"):
        merge_deltas(lora, [WEIGHTS], out=torch.empty(1, 1, 2, 2, device=device))
    with pytest.raises(ValueError, match="density <= 1"):
        drop = Drop(torch.zeros(1, 1, 3, dtype=torch.float64), [0], torch.tensor([0]), torch.arange(3))
        merge_deltas(lora, [WEIGHTS], drop)
    with pytest.raises(ValueError, match=r"order is \[1\], wanted 1 different numbers below 1"):
        model_trims([lora], torch.ones(1, 3, dtype=torch.int64), order=[1])


def test_kernels_is_not_a_top_level_package() -> None:
    """transformers probes for Hugging Face's package of that name."""
    found = importlib.util.find_spec("kernels")
    assert found is None or "merge" not in str(found.submodule_search_locations)
