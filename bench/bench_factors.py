"""Merges of factors in a PEFT model of TinyLlama's shape: the drop-in against PEFT."""

from typing import Any

KINDS = ("factors",)


def test_factors(case: Any, benchmark: Any) -> None:
    case.time(benchmark)
