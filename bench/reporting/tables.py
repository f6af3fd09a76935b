"""Tables as Markdown, and rows as lines of text."""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields
from typing import Any

from bench.harness.row import Row
from bench.reporting.files import Report
from bench.reporting.headlines import HEADLINES
from bench.reporting.trends import trends


def markdown(report: Report) -> str:
    """The tables of a README."""
    about = ", ".join(f"{name} {value}" for name, value in report.about.items())
    parts = [about, headline_table(report.rows), "\n".join(f"- {trend}" for trend in trends(report.rows))]
    kinds = dict.fromkeys(row.kind for row in report.rows)
    parts += [f"### {kind}\n\n{table([row for row in report.rows if row.kind == kind])}" for kind in kinds]
    for row in report.rows:
        if row.source:
            parts.append(f"{row.contestant}, {row.workload}: {_time(row.seconds)} = {row.source}")
    paired = [row for row in report.rows if row.kind in ("factors", "recompress")]
    if paired:
        parts.append(f"### The drop-in\n\n{drop_in_table(paired)}")
    if report.skipped:
        parts.append("Not run: " + "; ".join(f"{name} ({reason})" for name, reason in report.skipped.items()))
    return "\n\n".join(part for part in parts if part) + "\n"


def plain_table(rows: Sequence[Any]) -> str:
    """Dataclass rows as Markdown, one column for each field."""
    lines = [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in astuple(row)] for row in rows]
    return _markdown([each.name for each in fields(rows[0])], lines)


def headline_table(rows: Sequence[Row]) -> str:
    """The headlines that the rows have; empty if none."""
    lines = []
    for headline in HEADLINES:
        value = headline.value(rows)
        if value is not None:
            way, limit = headline.wanted
            met = value >= limit if way == ">=" else value <= limit
            lines.append([headline.name, f"{value:.3g}", f"{way} {limit:g}", "yes" if met else "NO"])
    return _markdown(["figure", "measured", "wanted", "met"], lines) if lines else ""


def table(rows: Iterable[Row]) -> str:
    """One line for each row."""
    heads = [
        "workload",
        "contestant",
        "median",
        "quartiles",
        "CPU",
        "faster",
        "peak MiB",
        "beyond the result",
        "copy",
        "matmul",
    ]
    return _markdown(
        heads,
        [
            [
                row.workload,
                row.contestant,
                _time(row.seconds),
                f"{_time(row.low)} to {_time(row.high)}",
                "" if row.processor is None else _time(row.processor),
                _or_dash(row.ratio, "{:.3g}x"),
                _or_dash(row.peak_mib, "{:.0f}"),
                _or_dash(row.extra_mib, "{:.0f}"),
                _or_dash(row.bandwidth_share, "{:.1%}"),
                _or_dash(row.matmul_share, "{:.1%}"),
            ]
            for row in rows
        ],
    )


def drop_in_table(rows: Sequence[Row]) -> str:
    """PEFT and the drop-in side by side, one line for each combination type."""
    by = {(row.kind, row.method, row.contestant): row for row in rows}
    lines = []
    for kind, method in dict.fromkeys((row.kind, row.method) for row in rows):
        theirs, ours = (by.get((kind, method, name)) for name in ("PEFT", "drop-in"))
        if theirs is not None and ours is not None:
            memory = " and ".join(_or_dash(row.peak_mib, "{:.0f}") for row in (theirs, ours))
            ratio = theirs.seconds / ours.seconds
            lines.append([f"`{method}`", _time(theirs.seconds), _time(ours.seconds), f"{ratio:.3g}x", f"{memory} MiB"])
    return _markdown(["type", "PEFT", "drop-in", "faster", "peak memory"], lines)


def _markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines))


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{seconds * 1e3:.3g} ms"


def _or_dash(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def line_of(row: Row) -> str:
    """One row as a line of text."""
    parts = [f"{row.seconds:.4g} s ({row.low:.4g} to {row.high:.4g}, {row.runs} runs)"]
    if row.ratio is not None and row.contestant != row.baseline:
        parts.append(f"{row.ratio:.3g}x as fast as {row.baseline}")
    if row.peak_mib is not None:
        beyond = "" if row.extra_mib is None else f", {row.extra_mib:.0f} beyond the result"
        parts.append(f"peak {row.peak_mib:.0f} MiB{beyond}")
    if row.bandwidth_share is not None and row.matmul_share is not None:
        parts.append(f"{row.bandwidth_share:.1%} of a copy, {row.matmul_share:.1%} of a matmul")
    if row.processor is not None:
        parts.append(f"{row.processor:.4g} CPU seconds")
    if row.written_mib is not None:
        parts.append(f"writes {row.written_mib:.0f} MiB")
    if row.excess is not None:
        parts.append(f"error {row.excess:+.1e} relative to the best")
    if row.kept_energy is not None:
        parts.append(f"keeps {row.kept_energy:.1%} of the energy")
    if row.source:
        parts.append(f"= {row.source}")
    return f"{row.contestant:20} {row.workload}: {'; '.join(parts)}"
