"""Memory: large tensors, scratch buffers of a thread, and sizes as text."""

import math
import mmap
import re
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from merge_engine.errors import RecipeError

HUGE = 8 << 20  # tensors of at least so many bytes get huge pages
KEPT = 512 << 20  # bytes of freed memory that are kept for later tensors, at most
# Freed memory, the oldest first. Threads share it without a lock: each change is one call, which is atomic in Python.
_free: list[mmap.mmap] = []


def new_tensor(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised tensor on the CPU.

    A large one gets huge pages where the system has them: the first write to 64 MiB takes 29 ms in small pages, one
    thread at a time, and 6 ms in huge ones. Or it reuses the memory of an earlier large tensor that is gone, which has
    been written to before: some that is large enough, but not more than twice, or else the largest of the smaller ones,
    which is made larger.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=dtype)
    memory = _take(nbytes) or _map(nbytes)
    lent = np.frombuffer(memory, np.uint8, nbytes)  # lives as long as any tensor that uses the memory
    weakref.finalize(lent, _give_back, memory).atexit = False
    return torch.from_numpy(lent).view(dtype).view(*shape)


def _map(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _take(nbytes: int) -> mmap.mmap | None:
    """The smallest free memory of this size or up to twice that, or the largest smaller one, made larger.

    The rest stays free for later tensors. None where there is neither: then free memory is given up, the oldest first,
    until it makes room for what will be mapped.
    """
    free = sorted(_free, key=len)
    fitting = [memory for memory in free if nbytes <= len(memory) <= 2 * nbytes]
    for memory in fitting + [memory for memory in reversed(free) if len(memory) < nbytes]:
        with suppress(ValueError):  # another thread was faster
            _free.remove(memory)
            if len(memory) >= nbytes or _is_made_larger(memory, nbytes):
                return memory
    with suppress(IndexError):  # no more are free
        while nbytes > 0:
            nbytes -= len(_free.pop(0))
    return None


def _is_made_larger(memory: mmap.mmap, nbytes: int) -> bool:
    """Whether there was room. Its pages may get another address, but are not copied."""
    try:
        memory.resize(nbytes)
    except (BufferError, OSError):  # BufferError: another thread has not quite freed the array that used it
        return False
    return True


def _give_back(memory: mmap.mmap) -> None:
    _free.append(memory)
    while sum(map(len, _free)) > KEPT:
        with suppress(IndexError):  # another thread has made room
            _free.pop(0)


SCRATCH = 1 << 19  # elements of the smallest scratch buffer: one tile

_local = threading.local()


def scratch(name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """This thread's buffer of that name, as a tensor of ``shape``; its content is undefined."""
    buffers: dict[str, Tensor] = _local.__dict__
    size = math.prod(shape)
    buffer = buffers.get(name)
    if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
        buffer = buffers[name] = torch.empty(max(size, SCRATCH), dtype=dtype)
    return buffer[:size].view(shape)


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def size_text(nbytes: int, *, up: bool = False) -> str:
    """Bytes as "3.21 GB", or "12 bytes": in the largest unit of which there is one, rounded down, or up.

    Of two sizes the larger one, rounded up, never reads like the smaller one, rounded down.
    """
    for unit in ("TB", "GB", "MB", "KB"):
        if nbytes >= _UNITS[unit]:
            hundredth = _UNITS[unit] // 100
            hundreds = -(-nbytes // hundredth) if up else nbytes // hundredth
            return f"{hundreds // 100}.{hundreds % 100:02} {unit}"
    return f"{nbytes} bytes"


def parse_size(size: int | str, option: str) -> int:
    """Bytes in a size such as "5GB" or "200MB" (powers of 1000, as transformers counts), or in a plain number.

    Raises RecipeError, which names ``option``, where it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?B|)", str(size).strip().upper())
    parsed = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    if parsed < 1:
        raise RecipeError(f"{option}: wanted a size such as 5GB or 200MB, got {size!r}")
    return parsed
