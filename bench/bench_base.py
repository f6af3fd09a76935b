"""Adapters into a base model, from disk to disk, by one process and by ranks."""

from typing import Any

KINDS = ("base", "ranks")


def test_base(case: Any, benchmark: Any) -> None:
    case.time(benchmark)
