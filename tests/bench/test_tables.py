"""Trends and tables."""

from collections.abc import Callable

import pytest

from bench.harness.row import Row
from bench.reporting.files import Report
from bench.reporting.tables import drop_in_table, markdown
from bench.reporting.trends import trends

pytestmark = pytest.mark.quick


def test_trends_are_fitted_and_listed(row: Callable[..., Row]) -> None:
    sizes = [row(kind="adapters", adapters=count, seconds=0.5 * count, extra_mib=2.0) for count in (8, 4, 16)]
    (trend,) = trends([*sizes, row()])
    assert trend.xs == [4, 8, 16]
    assert trend.line.slope == pytest.approx(0.5)
    assert "500 ms an adapter" in markdown(Report({}, sizes))


def test_the_drop_in_stands_beside_peft(row: Callable[..., Row]) -> None:
    paired = [
        row(kind="factors", contestant=name, seconds=s, peak_mib=m)
        for name, s, m in (("PEFT", 6.0, 40.0), ("drop-in", 0.05, 8.0))
    ]
    assert drop_in_table(paired).splitlines()[-1] == "| `ties` | 6 s | 50 ms | 120x | 40 and 8 MiB |"
