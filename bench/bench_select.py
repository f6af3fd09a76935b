"""The exact k-th magnitude of a delta, from its factors: against the bare product, torch.topk and torch.kthvalue."""

from typing import Any

KINDS = ("select",)


def test_select(case: Any, benchmark: Any) -> None:
    case.time(benchmark)
