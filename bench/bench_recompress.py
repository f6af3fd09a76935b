"""Merges cut to a rank in a PEFT model of two layers: the drop-in against PEFT."""

from typing import Any

KINDS = ("recompress",)


def test_recompress(case: Any, benchmark: Any) -> None:
    case.time(benchmark)
