"""Adapters into a base model, from disk to disk."""

from typing import Any

KINDS = ("base",)


def test_base(case: Any, benchmark: Any) -> None:
    case.time(benchmark)
