"""Merges of deltas, selection included: against PEFT and the textbook; by threads, elements and adapters."""

from typing import Any

KINDS = ("deltas", "threads", "parts", "elements", "adapters")


def test_deltas(case: Any, benchmark: Any) -> None:
    case.time(benchmark)
