"""Copies between host and device that nobody waits for: pinned memory, and a stream of its own for each way."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Copies(Protocol):
    """How tensors get to where kernels run, and back."""

    def staged(self, tensor: Tensor) -> Tensor:
        """The tensor in host memory that `up` reads without anybody waiting; for the thread that reads."""
        ...

    def up(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies on the device; what is launched next on the current stream waits for them."""
        ...

    def down(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Starts a copy to the host, after what was launched on the current stream. What it returns waits for the copy,
        on any thread, and gives it."""
        ...

    def complete(self) -> None:
        """Make what was launched complete for any thread that reads it on the default stream."""
        ...


class SameMemory:
    """Of kernels that are interpreted: nothing is copied."""

    def staged(self, tensor: Tensor) -> Tensor:
        return tensor

    def up(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors)

    def down(self, tensor: Tensor) -> Callable[[], Tensor]:
        return lambda: tensor

    def complete(self) -> None:
        """Nothing runs later than it is launched."""


class StreamCopies:
    """Of a CUDA or ROCm device.

    torch's allocators keep blocks of pinned and of device memory for the next tensor of their size, and hand none out
    before the copies from or to it are done: they are the ring of buffers.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._up, self._down = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def staged(self, tensor: Tensor) -> Tensor:
        with torch.cuda.device(self.device):  # the thread that reads has a current device of its own
            return tensor.pin_memory()

    def up(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._up):
            copies = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
        current.wait_stream(self._up)
        for copy in copies:
            copy.record_stream(current)
        return copies

    def down(self, tensor: Tensor) -> Callable[[], Tensor]:
        self._down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._down):
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            copy.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._down)
            done = self._down.record_event()

        def arrived() -> Tensor:
            done.synchronize()
            return copy

        return arrived

    def complete(self) -> None:
        """A caller's own stream is waited for, since other threads do not know of it."""
        stream = torch.cuda.current_stream(self.device)
        if stream != torch.cuda.default_stream(self.device):
            stream.synchronize()
