"""A device that is pretended: its memory is the host's, but what comes back is not there before it is waited for."""

import threading
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class LateCopies:
    """See `engine.copies.Copies`. most: host memory, in bytes, that was held for copies at one time, by purpose."""

    def __init__(self) -> None:
        self._held = {"up": 0, "down": 0}
        self.most = {"up": 0, "down": 0}
        self._lock = threading.RLock()

    def staged(self, tensor: Tensor) -> Tensor:
        return self._counted(tensor.clone(), "up")

    def up(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.clone() for tensor in tensors]

    def down(self, tensor: Tensor) -> Callable[[], Tensor]:
        as_it_is_now = tensor.clone()
        copy = self._counted(torch.full_like(tensor, torch.nan), "down")

        def arrived() -> Tensor:
            return copy.copy_(as_it_is_now)

        return arrived

    def complete(self) -> None:
        """Kernels are interpreted: they have run."""

    def _counted(self, tensor: Tensor, purpose: str) -> Tensor:
        self._add(purpose, tensor.nbytes)
        weakref.finalize(tensor, self._add, purpose, -tensor.nbytes)
        return tensor

    def _add(self, purpose: str, nbytes: int) -> None:
        with self._lock:
            self._held[purpose] += nbytes
            self.most[purpose] = max(self.most[purpose], self._held[purpose])
