"""Kernels with known bugs, which ttsem must find: only then does it mean something that it finds none in ours.

    pip install --no-deps --ignore-requires-python ttsem==0.1.0
    python -m ttsem.sanitize tests/helpers/kernel_faults.py        (prints what was found; fails if one is missed)
    TRITON_INTERPRET=0 python -m ttsem.sanitize pytest tests/kernels -q        (finds nothing)

This is run by hand, and pytest does not collect it; ttsem is no dependency.
"""

import sys
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _reads_past_the_end(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs), mask=offs < n)


@triton.jit
def _writes_past_the_end(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < n, other=0.0))


@triton.jit
def _races(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.load(out_ptr + tl.arange(0, BLOCK)) + tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    tl.store(out_ptr + tl.arange(0, BLOCK), sums)


@triton.jit
def _adds_to_what_was_never_written(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    sums = tl.load(out_ptr + offs, mask=mask, other=0.0) + tl.load(x_ptr + offs, mask=mask, other=0.0)
    tl.store(out_ptr + offs, sums, mask=mask)


def found(kernel: Callable[..., None], out: Tensor) -> str | None:
    """What ttsem says of a launch, or that the result has a NaN, with which it fills torch.empty; None if neither."""
    x = torch.ones(1000)
    try:
        kernel[(4,)](x, out, 1000, BLOCK=256)  # type: ignore[index]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "NaN in the result" if bool(out.isnan().any()) else None


def main() -> int:
    missed = 0
    for kernel, out in (
        (_reads_past_the_end, torch.zeros(1000)),
        (_writes_past_the_end, torch.zeros(1000)),
        (_races, torch.zeros(256)),
        (_adds_to_what_was_never_written, torch.empty(1000)),
    ):
        said = found(kernel, out)
        missed += said is None
        sys.stdout.write(f"{kernel.__name__}: {(said or 'NOT FOUND').splitlines()[0][:200]}\n")
    return missed


if __name__ == "__main__":
    sys.exit(main())
