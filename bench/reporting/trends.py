"""How time and memory grow with a size: the kinds `elements` and `adapters`."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from bench.harness.row import Row
from bench.reporting.fit import Line, fit


@dataclass(frozen=True)
class Trend:
    """The rows of one contestant that differ only in the size `by` ("elements", "adapters"), smallest first."""

    by: str
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        first = self.rows[0]
        fixed = f"{first.adapters} adapters" if self.by == "elements" else f"{first.rows} x {first.columns}"
        return f"{first.contestant}, {fixed}"

    @property
    def xs(self) -> list[int]:
        return [getattr(row, self.by) for row in self.rows]

    @property
    def line(self) -> Line:
        return fit(self.xs, [row.seconds for row in self.rows])

    @property
    def memory(self) -> list[float | None]:
        """MiB at the peak, without the result."""
        return [row.extra_mib for row in self.rows]

    def __str__(self) -> str:
        line = self.line
        unit, scale = ("ns an element", 1e9) if self.by == "elements" else ("ms an adapter", 1e3)
        return (
            f"{self.name}: {self.by} {self.xs[0]} to {self.xs[-1]}: {line.slope * scale:.3g} {unit} "
            f"+ {line.intercept * 1e3:.2g} ms, off by {line.residual:.1%} at most"
        )


def trends(rows: Iterable[Row]) -> list[Trend]:
    """One trend for each contestant and each size that is held fixed, if there are at least two points."""
    found = []
    for by in ("elements", "adapters"):

        def fixed(row: Row, by: str = by) -> tuple[Any, ...]:
            return row.contestant, *((row.adapters,) if by == "elements" else (row.rows, row.columns))

        mine = sorted((row for row in rows if row.kind == by), key=lambda row: (fixed(row), getattr(row, by)))
        found += [Trend(by, tuple(group)) for _, group in groupby(mine, fixed)]
    return [trend for trend in found if len(set(trend.xs)) > 1]
