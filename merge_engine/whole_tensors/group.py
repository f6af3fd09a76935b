"""The tensors that become one tensor of the output, and sweeps over them in blocks.

Sweeps work on blocks that fit a core's cache, each widened to float32 when it is looked at: the tensors stay in the
dtype in which they are stored, and memory beside them does not grow with their size. Blocks are fixed by the shape
alone, each is computed on one thread, and sums of blocks are added up in their order: results do not depend on the
number of threads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from merge_engine.loops import door
from merge_engine.runtime.memory import scratch
from merge_engine.runtime.threads import for_each

R = TypeVar("R")
BLOCK = 1 << 17  # elements of a block


@dataclass(frozen=True)
class Group:
    """What a method gets: tensors of one shape, any float dtypes, and where the result goes.

    tensors: the models, without the base where the method knows one. base: the base, or None.
    out: the result, of the output's dtype; contiguous. options: as in `rules.whole_methods`, a tuple where there is one
    for each of the tensors. name: of the output's tensor; seed: with it, decides random drops. published: the method
    as published, else with mergekit's floors and shortcuts.
    """

    name: str
    tensors: Sequence[Tensor]
    base: Tensor | None
    out: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    published: bool = True

    @property
    def columns(self) -> int:
        """The length of a row: of the last dimension; a vector is one row."""
        return self.out.shape[-1] if self.out.ndim else 1

    def rows_of(self, tensor: Tensor) -> Tensor:
        """The tensor as [rows, columns]."""
        return tensor.reshape(-1, self.columns) if tensor.numel() else tensor.reshape(0, 1)


def sweep(shape: Sequence[int], work: Callable[[slice], R]) -> list[R]:
    """work(slice) for blocks of whole lines, of a matrix [lines, width]; results in order."""
    count, width = shape
    step = max(1, BLOCK // max(1, width))
    return for_each([slice(start, min(start + step, count)) for start in range(0, count, step)], work)


def flat(group: Group, work: Callable[[slice], R]) -> list[R]:
    """work(slice) for blocks of the flattened tensors."""
    return sweep((group.out.numel(), 1), work)


def block(tensor: Tensor, part: slice, base: Tensor | None = None) -> Tensor:
    """A new float32 block of a flattened tensor, or of a matrix by rows; less the base's, where there is one."""
    values = tensor[part].to(torch.float32, copy=True)
    return values if base is None else values.sub_(base[part])


def widened(tensor: Tensor, part: Any, name: str) -> Tensor:
    """A float32 block in this thread's buffer of that name, which the next block of the name overwrites."""
    stored = tensor[part]
    return scratch(name, stored.shape).copy_(stored)


def differences(tensors: Sequence[Tensor], part: Any, base: Tensor) -> Tensor:
    """float32 [n, ...]: blocks of n tensors, less the base's, in this thread's buffer "differences"."""
    under = widened(base, part, "base")
    found = scratch("differences", (len(tensors), *under.shape))
    loops = door.whole_loops(found.numel() if door.loops() else 0)  # it does not pay to import Numba for them
    for values, tensor in zip(found, tensors, strict=True):
        stored = tensor[part]
        if loops and stored.dtype == torch.bfloat16 and stored.is_contiguous():
            loops.subtract(_bits(stored), under.view(-1).numpy(), values.view(-1).numpy())
        else:
            values.copy_(stored).sub_(under)
    return found


def _bits(stored: Tensor) -> np.ndarray:
    """The bits of a contiguous tensor of two bytes an element: uint16 [n]."""
    return stored.view(-1).view(torch.int16).numpy().view(np.uint16)


def gram(tensors: Sequence[Tensor], base: Tensor | None) -> np.ndarray:
    """G_ij = <t_i, t_j> in float64, of tensors of any one shape, or of their float32 differences from the base."""
    lines = [tensor.reshape(-1) for tensor in tensors]
    under = None if base is None else base.reshape(-1)

    def products(part: slice) -> np.ndarray:
        values = scratch("float64", (len(lines), part.stop - part.start), torch.float64)
        if under is not None:
            values.copy_(differences(lines, part, under))
        else:
            for row, line in zip(values, lines, strict=True):
                row.copy_(line[part])
        return (values @ values.t()).numpy()

    return sum(sweep((len(lines[0]), 1), products), np.zeros((len(lines), len(lines))))


def combination(group: Group, factors: Sequence[float], of_base: float = 0.0) -> None:
    """out = of_base * base + sum_i factors[i] * tensors[i], in float32 and in this order."""
    lines = [tensor.reshape(-1) for tensor in group.tensors]
    base = group.base.reshape(-1) if group.base is not None and of_base else None
    out = group.out.reshape(-1)

    def combine(part: slice) -> None:
        total = scratch("total", out[part].shape) if base is None else widened(base, part, "total")
        total.mul_(of_base) if base is not None else total.zero_()
        for line, factor in zip(lines, factors, strict=True):
            if factor:
                total.add_(widened(line, part, "block"), alpha=factor)
        out[part] = total

    flat(group, combine)


def onto(group: Group, factors: Sequence[float]) -> None:
    """out = base + sum_i factors[i] * (tensors[i] - base), in float32 and in this order; without a base, of 0."""
    if group.base is None:
        combination(group, factors)
        return
    lines, base, out = [tensor.reshape(-1) for tensor in group.tensors], group.base.reshape(-1), group.out.reshape(-1)

    def add(part: slice) -> None:
        under, total = widened(base, part, "base"), scratch("total", out[part].shape).zero_()
        for line, factor in zip(lines, factors, strict=True):
            if factor:
                total.add_(widened(line, part, "block").sub_(under), alpha=factor)
        out[part] = total.add_(under)

    flat(group, add)
