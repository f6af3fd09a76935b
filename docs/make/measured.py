"""The page with every row of bench/results, made from its CSV files."""

import csv
from itertools import groupby
from pathlib import Path

REPORTS = ("cpu", "session", "image", "xeon")


def page(folder: Path) -> str:
    """One section a machine, one table a kind of benchmark."""
    parts = [
        "# Every row",
        "Made from the files in `bench/results` that `python -m bench.report` wrote. Times are medians; peak memory "
        'is that of a process of its own; "times as fast" is against the contestant with 1.',
    ]
    for name in REPORTS:
        with (folder / f"{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        about = rows[0]
        parts.append(f"## {about['machine']}")
        parts.append(
            f"{about['cores']} cores, torch {about['torch']}, PEFT {about['peft']}, Numba {about['numba']}, "
            f"{about['date'][:10]}. [All columns](bench/results/{name}.csv)."
        )
        for kind, group in groupby(rows, key=lambda row: row["kind"]):
            lines = [
                f"| {kind} | contestant | time | peak memory | times as fast |",
                "| --- | --- | ---: | ---: | ---: |",
            ]
            parts.append("\n".join(lines + [_line(row) for row in group]))
    return "\n\n".join(parts) + "\n"


def _line(row: dict[str, str]) -> str:
    peak = f"{float(row['peak_mib']):.0f} MiB" if row["peak_mib"] else ""
    ratio = f"{float(row['ratio']):.3g}" if row["ratio"] else ""
    return f"| {row['workload']} | {row['contestant']} | {_time(float(row['seconds']))} | {peak} | {ratio} |"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
