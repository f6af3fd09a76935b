"""What a report holds: tidy rows, written as CSV and JSON, compared with an older report, shown as Markdown."""

import csv
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

from bench.measure import Line, fit

OURS = ("tiled", "triton", "drop-in", "merge-engine")
EXTRAPOLATED = "PEFT, extrapolated from one layer of each shape"  # see `whole_merge.with_extrapolation`
NOTICED = 1.05  # quartiles that do not overlap, and a change of more than this, are no chance


@dataclass(frozen=True)
class Row:
    """One contestant of one workload.

    seconds, low, high: median and quartiles of `runs` runs. processor: the median of seconds of all threads on CPUs.
    peak_mib: of memory, above where the run began, or of the whole process where it had its own (kinds whole, base,
    many, session); extra_mib: beyond the result. ratio: seconds of the baseline / seconds. flops and nbytes: what no
    contestant can do without (`Workload`), and the shares of the machine's measured rates that this makes. excess: of
    the error over that of the best approximation, which is the best cut, or (kind base) the exact sum rounded once.
    kept_energy: the share of the merged deltas' that a cut kept. source: the rows that this one is computed from.
    """

    OF_WORKLOAD: ClassVar = ("method", "rows", "columns", "layers", "adapters", "rank", "density", "dtype", "elements")

    kind: str
    workload: str
    contestant: str
    method: str
    rows: int
    columns: int
    layers: int
    adapters: int
    rank: int
    density: float
    dtype: str
    elements: int
    device: str
    threads: int
    runs: int
    seconds: float
    low: float
    high: float
    processor: float | None = None
    peak_mib: float | None = None
    extra_mib: float | None = None
    baseline: str = ""
    ratio: float | None = None
    flops: int | None = None
    nbytes: int | None = None
    bandwidth_share: float | None = None
    matmul_share: float | None = None
    excess: float | None = None
    kept_energy: float | None = None
    source: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.kind, self.workload, self.contestant, self.device


@dataclass(frozen=True)
class Report:
    """about: machine, versions, commit, date. skipped, failed: names of workloads, with the reason."""

    about: dict[str, Any]
    rows: list[Row]
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def write(report: Report, folder: Path, name: str) -> None:
    """folder/name.csv, where each line says by itself what it is of, and folder/name.json; each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = [*report.about, *(each.name for each in fields(Row))]
    write_csv(folder / f"{name}.csv", columns, [report.about | asdict(row) for row in report.rows])
    _placed(folder / f"{name}.json", lambda path: path.write_text(json.dumps(asdict(report), indent=1) + "\n"))


def write_csv(path: Path, columns: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> None:
    """A CSV file of these columns, whole or not at all."""

    def write_it(part: Path) -> None:
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)

    _placed(path, write_it)


def _placed(path: Path, make: Callable[[Path], object]) -> None:
    part = path.with_name(f".{path.name}.part")
    make(part)
    os.replace(part, path)


def read(path: Path) -> Report:
    """A report from its JSON file."""
    found = json.loads(path.read_text())
    return Report(**found | {"rows": [Row(**row) for row in found["rows"]]})


def read_csv(path: Path) -> list[Row]:
    """The rows of a CSV file, numbers as numbers, and what is empty as None where that can be."""
    with path.open(newline="") as file:
        return [
            Row(**{each.name: _parsed(line[each.name], each.type) for each in fields(Row)})
            for line in csv.DictReader(file)
        ]


def _parsed(text: str, kind: Any) -> Any:
    if kind is str:
        return text
    if kind in (int, float):
        return kind(text)
    return None if text == "" else (int if kind == int | None else float)(text)


@dataclass(frozen=True)
class Change:
    """How one row differs from the same row before: `what` ("time", "memory"), new / old, and both."""

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
    """What changed beyond the spread, worst first: quartiles apart and 5 % of the time, or 10 % and 4 MiB of memory."""
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


@dataclass(frozen=True)
class Headline:
    """A figure to be found at once: field of a contestant, or its ratio to that of another; "ours" is whoever of us.

    wanted: (">=" or "<=", a number).
    """

    name: str
    kind: str
    workload: str
    above: tuple[str, str]
    below: tuple[str, str] | None
    wanted: tuple[str, float]

    def value(self, rows: Iterable[Row]) -> float | None:
        """None where a row is missing, or does not know."""
        mine = [row for row in rows if row.kind == self.kind and row.workload == self.workload]
        above = _figure(mine, *self.above)
        if above is None or self.below is None:
            return above
        below = _figure(mine, *self.below)
        return None if below is None else above / below


def _figure(rows: Sequence[Row], contestant: str, name: str) -> float | None:
    row = next(
        (row for row in rows if row.contestant == contestant or (contestant == "ours" and row.contestant in OURS)), None
    )
    value = None if row is None else getattr(row, name)
    return value if value is None or name != "extra_mib" else max(value, 1.0)  # pages are not counted finer


def _faster(name: str, kind: str, workload: str, rival: str, times: float) -> Headline:
    return Headline(name, kind, workload, (rival, "seconds"), ("ours", "seconds"), (">=", times))


LARGE, INTO = "3x r16 4096x4096 d0.2 fp32", "3x r16 12 layers of Llama-134M d0.2 fp32"
HEADLINES = [
    _faster("ties of deltas: times as fast as PEFT", "deltas", f"ties {LARGE}", "PEFT", 20),
    Headline(
        "ties of deltas: PEFT's extra memory / ours",
        "deltas",
        f"ties {LARGE}",
        ("PEFT", "extra_mib"),
        ("ours", "extra_mib"),
        (">=", 20),
    ),
    _faster("dare_ties of deltas: times as fast as PEFT", "deltas", f"dare_ties {LARGE}", "PEFT", 6),
    Headline(
        "dare_ties of deltas: PEFT's extra memory / ours",
        "deltas",
        f"dare_ties {LARGE}",
        ("PEFT", "extra_mib"),
        ("ours", "extra_mib"),
        (">=", 20),
    ),
    Headline(
        "selection: time / that of the bare product",
        "select",
        "magnitude_prune 1x r16 4096x4096 d0.2 fp32",
        ("tiled", "seconds"),
        ("bare product", "seconds"),
        ("<=", 8),
    ),
    Headline(
        "ties of deltas: 1 thread's time / that of 2",
        "threads",
        f"ties {LARGE}",
        ("1 thread", "seconds"),
        ("2 threads", "seconds"),
        (">=", 1.7),
    ),
    _faster("svd: times as fast as PEFT", "recompress", "svd 3x r16 2048x2048 d0.2 fp32", "PEFT", 300),
    _faster("ties_svd: times as fast as PEFT", "recompress", "ties_svd 3x r16 2048x2048 d0.2 fp32", "PEFT", 25),
    *(
        Headline(
            f"{method}: excess of the error over the best cut's",
            "recompress",
            f"{method} 3x r16 2048x2048 d0.2 fp32",
            ("ours", "excess"),
            None,
            ("<=", 1e-3),
        )
        for method in ("svd", "ties_svd")
    ),
    Headline(
        "whole TinyLlama, ties cut to rank 16: seconds",
        "whole",
        "ties 3x r16 22 layers d0.2 fp32",
        ("merge-engine", "seconds"),
        None,
        ("<=", 25),
    ),
    _faster(
        "whole TinyLlama: times as fast as PEFT, extrapolated",
        "whole",
        "ties 3x r16 22 layers d0.2 fp32",
        EXTRAPOLATED,
        1,
    ),
    *(
        _faster(f"{method} into a base: times as fast as mergekit-yaml", "base", f"{method} {INTO}", "mergekit-yaml", n)
        for method, n in (("ties", 10), ("dare_ties", 6))
    ),
    Headline(
        "ties into a 22-layer TinyLlama: 1 rank's time / that of 2, of one thread each",
        "ranks",
        "ties 3x r16 22 layers d0.2 fp32",
        ("1 rank", "seconds"),
        ("2 ranks", "seconds"),
        (">=", 1.6),
    ),
    *(
        Headline(
            f"16 recipes, {grid}: one by one / merge_many, {what}",
            "many",
            f"{grid} 8x r16 1 layers d0.2 fp32",
            ("singly", name),
            ("merge_many", name),
            (">=", 3),
        )
        for grid in ("ties, density x scale", "ties, density x weights")
        for what, name in (("time", "seconds"), ("CPU time", "processor"))
    ),
    *(
        Headline(
            f"{what}, other weights only: a merge of its own / one in a Session",
            "session",
            f"{what}, other weights 8x r16 1 layers d0.2 fp32",
            ("singly", "seconds"),
            ("Session", "seconds"),
            (">=", 4),
        )
        for what in ("linear", "ties of factors", "ties")
    ),
]


@dataclass(frozen=True)
class Trend:
    """What grows with a size: one contestant's rows of one workload that differ in `by`, smallest first."""

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
        return [row.extra_mib for row in self.rows]

    def __str__(self) -> str:
        line = self.line
        unit, scale = ("ns an element", 1e9) if self.by == "elements" else ("ms an adapter", 1e3)
        return (
            f"{self.name}: {self.by} {self.xs[0]} to {self.xs[-1]}: {line.slope * scale:.3g} {unit} "
            f"+ {line.intercept * 1e3:.2g} ms, off by {line.residual:.1%} at most"
        )


def trends(rows: Iterable[Row]) -> list[Trend]:
    """All that the kinds `elements` and `adapters` hold."""
    found = []
    for by in ("elements", "adapters"):

        def alike(row: Row, by: str = by) -> tuple[Any, ...]:
            return row.contestant, *((row.adapters,) if by == "elements" else (row.rows, row.columns))

        mine = sorted((row for row in rows if row.kind == by), key=lambda row: (alike(row), getattr(row, by)))
        found += [Trend(by, tuple(group)) for _, group in groupby(mine, alike)]
    return [trend for trend in found if len(set(trend.xs)) > 1]


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
    """Dataclass rows as Markdown, a column each field."""
    lines = [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in astuple(row)] for row in rows]
    return _markdown([each.name for each in fields(rows[0])], lines)


def headline_table(rows: Sequence[Row]) -> str:
    lines = []
    for headline in HEADLINES:
        value = headline.value(rows)
        if value is not None:
            way, limit = headline.wanted
            met = value >= limit if way == ">=" else value <= limit
            lines.append([headline.name, f"{value:.3g}", f"{way} {limit:g}", "yes" if met else "NO"])
    return _markdown(["figure", "measured", "wanted", "met"], lines) if lines else ""


def table(rows: Iterable[Row]) -> str:
    """All rows, a line each."""
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
    """PEFT beside the drop-in, a line a type."""
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


def machine_differs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What of the machine and the versions is not as it was: then times may differ for that reason."""
    ignored = ("commit", "date", "load", "bandwidth_gb_s", "matmul_gflop_s")
    return [
        f"{name}: {old.get(name)} -> {new[name]}" for name in new if name not in ignored and old.get(name) != new[name]
    ]
