"""The comparison with an earlier report."""

from collections.abc import Callable

import pytest

from bench.harness.row import Row
from bench.reporting.compare import compare


@pytest.mark.quick
def test_only_changes_beyond_the_spread_are_reported(row: Callable[..., Row]) -> None:
    old = [row(workload=name, peak_mib=100.0) for name in "abcdef"]
    new = [
        row(workload="a", seconds=1.3, low=1.2, high=1.4, peak_mib=100.0),  # slower
        row(workload="b", seconds=1.3, low=1.05, high=1.4, peak_mib=100.0),  # quartiles overlap
        row(workload="c", seconds=0.5, low=0.4, high=0.6, peak_mib=100.0),  # faster
        row(workload="d", peak_mib=140.0),
        row(workload="e", peak_mib=105.0),
        row(workload="f", device="cuda", seconds=9.0, low=9.0, high=9.0),  # another device
        row(workload="g", seconds=9.0),  # new
    ]
    found = [(change.row.workload, change.what, change.factor) for change in compare(old, new)]
    assert found == [("d", "memory", 1.4), ("a", "time", 1.3), ("c", "time", 0.5)]
    assert str(compare(old, new)[1]) == "WORSE  deltas: a: tiled: time 1 -> 1.3 s (1.30x)"
    assert compare([row(low=1.0, high=1.0)], [row(seconds=1.04, low=1.04, high=1.04)]) == []  # below 5 %
