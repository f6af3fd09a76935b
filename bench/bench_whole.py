"""A whole adapter of TinyLlama's shape, from disk to disk: against PEFT, extrapolated from one layer of each shape."""

from typing import Any

KINDS = ("whole",)


def test_whole(case: Any, benchmark: Any) -> None:
    case.time(benchmark)
