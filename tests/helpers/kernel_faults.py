"""Kernels with known bugs, which ttsem must find: only then does it mean something that it finds none in ours.

Four small ones, and copies of ours with one line changed.

    pip install --no-deps --ignore-requires-python ttsem==0.1.0
    python -m ttsem.sanitize tests/helpers/kernel_faults.py        (prints what was found; fails if one is missed)
    TRITON_INTERPRET=0 python -m ttsem.sanitize pytest tests/kernels -q        (finds no fault)

This is run by hand, and pytest does not collect it; ttsem is no dependency. It pretends that tensors are on a GPU, also
after `.cpu()` and not in other threads: so the tests fail that count operators (`test_framework_operators_of_a_group`),
that ask the torch backend (`of_the_torch_backend`), and that count in threads
(`test_thresholds_of_several_processes_are_those_of_one`).
"""

import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

KERNELS = Path(__file__).parents[2] / "kernels"


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


class Planted(NamedTuple):
    """Lines of our kernels, and what they become. search: "trims", or "model" for thresholds that span a model."""

    file: str
    old: str
    new: str
    search: str = "trims"


_MERGE = "left, right = tl.split"
AS_THEY_ARE = [Planted("merge.py", _MERGE, _MERGE, search) for search in ("trims", "model")]  # with no fault
PLANTED = [
    Planted("task_tile.py", "b = tl.load(b_ptrs, mask=mask_m[:, None], other=0.0)", "b = tl.load(b_ptrs)"),
    Planted("task_tile.py", "a = tl.load(a_ptrs, mask=mask_n[None, :], other=0.0)", "a = tl.load(a_ptrs)"),
    Planted("search.py", "tl.store(state + HELD, held)", "tl.store(state_ptr + HELD, held)"),
]


def planted(number: int, fault: Planted, folder: Path) -> str | None:
    """What ttsem says of a search and a merge by a copy of our kernels with the fault; None if nothing."""
    package = f"kernels_{number}"
    shutil.copytree(KERNELS, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    changed = folder / package / fault.file
    text = changed.read_text()
    if fault.old not in text:
        raise ValueError(f"{fault.file} has no {fault.old!r}")
    changed.write_text(text.replace(fault.old, fault.new))
    try:
        return merged_by(package, fault.search)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def merged_by(package: str, search: str) -> str | None:
    """A `ties` of two modules with many ties by the kernels of a package: None where no number is NaN."""
    names = "source", "trims", "select", "merge"
    source, trims, select, merge = (importlib.import_module(f"{package}.{name}") for name in names)
    generator = torch.Generator().manual_seed(1)

    def factor(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).float()

    pairs = [[(factor(8, 70), factor(37, 8)) for _ in range(2)] for _ in range(2)]
    lora = source.pack(pairs, [[0.5, 1.0]] * 2)
    kept = torch.full((1, 2, 2), 1000)
    if search == "trims":
        keep = trims.trims(lora, kept)
    else:
        (keep,) = select.model_trims([lora], torch.full((1, 2), 2000), adapters=[(0, 1)], order=[0, 1], modules=2)
    out = merge.merge_deltas(lora, [[1.0, 0.5]], keep, elect="total", divisor="count")
    return "NaN in the result" if bool(out.isnan().any()) else None


def main() -> int:
    missed = 0

    def tell(name: str, said: str | None, wanted: bool = True) -> None:
        nonlocal missed
        missed += (said is None) == wanted
        sys.stdout.write(f"{name}: {(said or ('NOT FOUND' if wanted else 'nothing')).splitlines()[0][:200]}\n")

    for kernel, out in (
        (_reads_past_the_end, torch.zeros(1000)),
        (_writes_past_the_end, torch.zeros(1000)),
        (_races, torch.zeros(256)),
        (_adds_to_what_was_never_written, torch.empty(1000)),
    ):
        tell(kernel.__name__, found(kernel, out))
    with TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        for number, fault in enumerate((*AS_THEY_ARE, *PLANTED)):
            said = planted(number, fault, Path(folder))
            tell(f"{fault.file} ({fault.search}): {fault.new}", said, wanted=fault.old != fault.new)
    return missed


if __name__ == "__main__":
    sys.exit(main())
