"""Many recipes of the same adapters: one by one, at once, and in a session."""

from typing import Any

KINDS = ("many", "session")


def test_many(case: Any, benchmark: Any) -> None:
    case.time(benchmark)
