"""The figures to look at first."""

from collections.abc import Callable

import pytest

from bench.harness.row import Row
from bench.reporting.headlines import HEADLINES


@pytest.mark.quick
def test_headlines_are_ratios_of_rows(row: Callable[..., Row]) -> None:
    headline = next(each for each in HEADLINES if "times as fast" in each.name)
    mine = {"kind": headline.kind, "workload": headline.workload}
    rows = [row(**mine, seconds=0.5), row(**mine, contestant="PEFT", seconds=10.0), row(contestant="PEFT", seconds=1.0)]
    assert headline.value(rows) == 20.0
    assert headline.value(rows[:1]) is None
