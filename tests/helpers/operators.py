"""Counts torch's operators, as a GPU would launch them or wait for them."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """Inside the block every operator that torch dispatches is counted by its name, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.counts[str(function)] += 1
        return function(*arguments, **(options or {}))

    @property
    def total(self) -> int:
        return sum(self.counts.values())
