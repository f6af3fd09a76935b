"""A whole adapter of TinyLlama's shape, from disk to disk, and PEFT on one layer of each of its shapes."""

from typing import Any

KINDS = ("whole", "layer")


def test_whole(case: Any, benchmark: Any) -> None:
    case.time(benchmark)
