"""Division in the kernels is rounded once, as IEEE says: for every count, and for sums of weights."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from merge_engine.kernels.merge import divided_by_count, merge_deltas
from merge_engine.kernels.source import Dense


@triton.jit
def _divide_kernel(out_ptr, x_ptr, n_ptr, size, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < size, other=0.0)
    n = tl.load(n_ptr + offs, mask=offs < size, other=1.0)
    tl.store(out_ptr + offs, divided_by_count(x, n), mask=offs < size)


def divided(x: torch.Tensor, n: torch.Tensor, device: torch.device) -> torch.Tensor:
    out = torch.empty_like(x, device=device)
    _divide_kernel[(triton.cdiv(x.numel(), 1 << 15),)](out, x.to(device), n.to(device), x.numel(), BLOCK=1 << 15)
    return out.cpu()


def numerators(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-100, 100, (size,), generator=generator)
    return torch.randn(size, generator=generator) * torch.exp2(exponents.float())


@pytest.mark.quick
def test_every_count_divides_as_ieee_says(device: torch.device) -> None:
    n = torch.arange(1, 1 << 15).float().repeat(8)
    x = numerators(n.numel(), 1)
    assert torch.equal(divided(x, n, device), x / n)


def test_quotients_next_to_where_rounding_turns(device: torch.device) -> None:
    """x = the nearest to n (q + 1/2 unit): the hardest numerators of each n."""
    n = torch.arange(1, 1 << 15).double().repeat(8)
    q = torch.randint(1 << 23, 1 << 24, n.shape, generator=torch.Generator().manual_seed(2)).double()
    x = (n * (q + 0.5)).float()
    for near in (x, torch.nextafter(x, torch.tensor(torch.inf)), torch.nextafter(x, torch.tensor(0.0))):
        assert torch.equal(divided(near, n.float(), device), near / n.float())


@pytest.mark.parametrize("units", [-4, -1, 1, 4])
def test_a_worse_estimate_of_the_root_changes_nothing(units: int) -> None:
    """A GPU's rsqrt may be off by two units: the same steps in numpy, with an fma in float64."""
    n = np.tile(np.arange(1, 1 << 15, dtype=np.float32), 4)
    x = numerators(n.size, 3).numpy()
    root = (1 / np.sqrt(n.astype(np.float64))).astype(np.float32)
    root = (root.view(np.int32) + units).view(np.float32)

    def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return (a.astype(np.float64) * b + c).astype(np.float32)

    inverse = root * root
    quotient = x * inverse
    assert np.array_equal(fma(fma(-n, quotient, x), inverse, quotient), x / n)


def test_shares_of_weights_divide_as_ieee_says(device: torch.device) -> None:
    """Two adapters that agree everywhere: (w a + v b) / (w + v), each step rounded once."""
    generator = torch.Generator().manual_seed(4)
    t = torch.rand(1, 2, 40, 50, generator=generator) + 0.5
    w, v = torch.tensor(0.3), torch.tensor(0.7001)
    out = merge_deltas(Dense(t.to(device)), [[0.3, 0.7001]], elect="total", divisor="weight", vote_weighted=True)[
        0, 0
    ].cpu()
    total = w * t[0, 0] + v * t[0, 1]
    # The elected side is (|S| + sum |w t|) / 2 = S here, exactly.
    assert torch.equal(out, total / (w + v))
