"""The plot of a sweep: the score along one swept field, with a line for every combination of the other fields."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from merge_engine.files.text import replaced
from merge_engine.report.charts import COLOURS, MARKERS, NAMED
from merge_engine.sweeps.goal import BEST
from merge_engine.sweeps.table import Row, SweepResult
from merge_engine.sweeps.trials import number_of, text_of

LOG_FROM = 8.0  # the axis is logarithmic where its highest value is this many times its lowest
Point = tuple[float, float]


def draw(outcome: SweepResult, path: Path) -> None:
    """Write the plot as a PNG, whole or not at all. Without a numeric field the scores are bars, one for each merge.

    Rows without a score are left out. A row without a value on the axis (linear, along density) is a dashed line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scored = [row for row in outcome.rows if row.score is not None]
    axis = best_axis(scored, outcome.axes)
    height = 4.5 if axis else max(2.0, 0.35 * len(scored) + 1)
    figure = Figure(figsize=(8, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    plot = figure.add_subplot()
    for side in ("top", "right"):
        plot.spines[side].set_visible(False)
    plot.grid(alpha=0.25)
    if axis is None:
        _draw_bars(plot, scored, outcome)
    else:
        _draw_lines(plot, scored, outcome, axis)
    with replaced(path) as partial:
        figure.savefig(partial, format="png")


def best_axis(rows: Sequence[Row], axes: Sequence[str]) -> str | None:
    """The numeric field with the most values; of several, the one along which the mean score changes most."""

    def spread(name: str) -> tuple[int, float]:
        scores: dict[float, list[float]] = {}
        for row in rows:
            value = number_of(row.trial.varied.get(name))
            if value is not None and row.score is not None:
                scores.setdefault(value, []).append(row.score)
        means = [fmean(each) for each in scores.values()]
        return len(means), max(means, default=0.0) - min(means, default=0.0)

    numeric = [name for name in axes if spread(name)[0] > 1]
    return max(numeric, key=spread, default=None)


def lines_of(rows: Sequence[Row], axes: Sequence[str], axis: str) -> dict[str, list[Point] | float]:
    """{combination of the other fields: its (value, score) points in order, or its one score without a value}."""
    lines: dict[str, Any] = {}
    for row in rows:
        value = number_of(row.trial.varied.get(axis))
        label = ", ".join(
            text_of(other) if name == "method" else f"{name} {text_of(other)}"
            for name, other in row.trial.varied.items()
            if name != axis or value is None  # rank=auto beside numbers gets a line of its own
        )
        if value is None:
            lines[label] = row.score
        else:
            lines.setdefault(label, []).append((value, row.score))
    return {label: sorted(line) if isinstance(line, list) else line for label, line in lines.items()}


def _draw_lines(plot: Any, rows: Sequence[Row], outcome: SweepResult, axis: str) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    lines = lines_of(rows, outcome.axes, axis)
    pick: Any = BEST[outcome.choose]
    tops = {label: pick(y for _, y in line) if isinstance(line, list) else line for label, line in lines.items()}
    ranked = sorted(tops, key=tops.__getitem__, reverse=outcome.choose == "highest")
    named = [label for label in lines if label in ranked[:NAMED]]  # colours in the order of the sweep
    for label in sorted(lines, key=lambda label: label in named):  # grey ones below
        line = lines[label]
        number = named.index(label) if label in named else None
        style: dict[str, Any] = {"color": "0.8", "linewidth": 1, "zorder": 1}
        if number is not None:
            colour = COLOURS[number % len(COLOURS)]
            style = {"color": colour, "linewidth": 1.6, "label": label or axis, "zorder": 2}
        if isinstance(line, list):
            marker = "." if number is None else MARKERS[number // len(COLOURS)]
            plot.plot(*zip(*line, strict=True), marker=marker, markersize=5, **style)
        else:
            plot.axhline(line, linestyle="--", **style)
    values = sorted({x for line in lines.values() if isinstance(line, list) for x, _ in line})
    if values[0] > 0 and values[-1] / values[0] >= LOG_FROM:
        plot.set_xscale("log")
        plot.xaxis.set_minor_locator(NullLocator())
        plot.xaxis.set_minor_formatter(NullFormatter())
    if len(values) <= 12:
        plot.set_xticks(values, [f"{value:g}" for value in values])
    plot.set_xlabel(axis)
    plot.set_ylabel("score")
    best = outcome.best()
    if best is not None:
        plot.set_title(f"best: {best.trial.name}, score {best.score:.6g}", fontsize=10, loc="left")
        x = number_of(best.trial.varied.get(axis))
        if x is not None:
            plot.plot([x], [best.score], "o", markersize=12, markerfacecolor="none", markeredgecolor="0.2", zorder=3)
    if len(lines) > 1:
        title = None if len(lines) <= NAMED else f"the best {NAMED} of {len(lines)}"
        plot.figure.legend(loc="outside right upper", fontsize=8, frameon=False, title=title, title_fontsize=8)


def _draw_bars(plot: Any, rows: Sequence[Row], outcome: SweepResult) -> None:
    best = outcome.best()
    scores = [row.score or 0.0 for row in rows]
    bars = plot.barh([row.trial.name for row in rows], scores, color=["#0072b2" if r is best else "0.7" for r in rows])
    plot.bar_label(bars, [f"{score:.6g}" for score in scores], padding=3, fontsize=8)
    plot.margins(x=0.12)
    plot.invert_yaxis()
    plot.tick_params(axis="y", labelsize=8)
    plot.grid(axis="y", visible=False)
    plot.set_xlabel("score")
