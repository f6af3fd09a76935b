"""What changed since an earlier report."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.harness.row import Row

NOTICED = 1.05  # a change of more than this, with quartiles that do not overlap, is not chance


@dataclass(frozen=True)
class Change:
    """One row against the same row before. what: "time" or "memory"; factor: after / before."""

    row: Row
    what: str
    factor: float
    before: float
    after: float

    def __str__(self) -> str:
        unit = "s" if self.what == "time" else "MiB"
        verdict = "WORSE" if self.factor > 1 else "better"
        of = f"{self.row.kind}: {self.row.workload}: {self.row.contestant}"
        return f"{verdict}  {of}: {self.what} {self.before:.4g} -> {self.after:.4g} {unit} ({self.factor:.2f}x)"


def compare(old: Iterable[Row], new: Iterable[Row]) -> list[Change]:
    """What changed beyond the spread, worst first.

    Time: the quartiles do not overlap, and the medians differ by more than 5 %. Memory: more than 10 % and 4 MiB.
    """
    before = {row.key: row for row in old}
    changes = []
    for row in new:
        was = before.get(row.key)
        if was is None:
            continue
        factor = row.seconds / was.seconds
        if (row.low > was.high and factor > NOTICED) or (row.high < was.low and factor < 1 / NOTICED):
            changes.append(Change(row, "time", factor, was.seconds, row.seconds))
        if was.peak_mib is not None and row.peak_mib is not None:
            gap = abs(row.peak_mib - was.peak_mib)
            if gap > max(4.0, 0.1 * was.peak_mib):
                factor = row.peak_mib / max(was.peak_mib, 1.0)
                changes.append(Change(row, "memory", factor, was.peak_mib, row.peak_mib))
    return sorted(changes, key=lambda change: -change.factor)


def machine_differs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs in machine and versions, one line each: times may differ for that reason."""
    ignored = ("commit", "date", "load", "bandwidth_gb_s", "matmul_gflop_s")
    return [
        f"{name}: {old.get(name)} -> {new[name]}" for name in new if name not in ignored and old.get(name) != new[name]
    ]
