"""The plots of a report, as PNG."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.harness.row import Row
from bench.reporting.headlines import OURS
from bench.reporting.trends import Trend, trends

SIZE, DPI = (7.0, 4.2), 150


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write faster.png, elements.png, adapters.png and memory.png, as far as there are rows for them."""
    import matplotlib

    matplotlib.use("agg")
    found = trends(rows)
    cost = {by: [trend for trend in found if trend.by == by] for by in ("elements", "adapters")}
    known = [trend for trend in cost["adapters"] if None not in trend.memory]
    rivals = [row for row in rows if row.contestant in OURS and row.baseline.startswith("PEFT")]
    bars = [row for row in rivals if row.kind != "adapters"]
    plots: dict[str, tuple[Sequence[Any], Callable[[Any, Any], None]]] = {
        "faster": (bars, _bars),
        "elements": (cost["elements"], _cost),
        "adapters": (cost["adapters"], _cost),
        "memory": (known, _memory),
    }
    folder.mkdir(parents=True, exist_ok=True)
    return [_drawn(folder / f"{name}.png", draw, data) for name, (data, draw) in plots.items() if data]


def _drawn(path: Path, draw: Callable[[Any, Any], None], data: Sequence[Any]) -> Path:
    from matplotlib import pyplot

    height = max(SIZE[1], 0.28 * len(data) + 1) if draw is _bars else SIZE[1]
    figure, axes = pyplot.subplots(figsize=(SIZE[0], height), layout="constrained")
    draw(axes, data)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
    return path


def _bars(axes: Any, rows: Sequence[Row]) -> None:
    places = range(len(rows))[::-1]
    ratios = [row.ratio or 0.0 for row in rows]
    axes.barh(places, ratios)
    axes.set_yticks(places, [f"{row.kind}: {row.workload}" for row in rows], fontsize=7)
    for place, ratio in zip(places, ratios, strict=True):
        axes.annotate(f" {ratio:.3g}x", (ratio, place), va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("times as fast as PEFT")


def _cost(axes: Any, found: Sequence[Trend]) -> None:
    per, unit = (1e6, "million elements") if found[0].by == "elements" else (1.0, "adapters")
    for trend in found:
        line, last = trend.line, trend.xs[-1]
        seconds = [row.seconds for row in trend.rows]
        spread = [[row.seconds - row.low for row in trend.rows], [row.high - row.seconds for row in trend.rows]]
        (drawn,) = axes.plot([0, last / per], [line.intercept, line.intercept + line.slope * last], linewidth=1)
        label = f"{trend.name}; off the line by {line.residual:.1%} at most"
        axes.errorbar([x / per for x in trend.xs], seconds, spread, fmt="o", color=drawn.get_color(), label=label)
    axes.set_xlabel(unit)
    axes.set_ylabel("seconds")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, frameon=False, loc="upper left")


def _memory(axes: Any, found: Sequence[Trend]) -> None:
    for trend in found:
        axes.plot(trend.xs, [max(value or 0.0, 1.0) for value in trend.memory], "o-", label=trend.name)
    axes.set_xlabel("adapters")
    axes.set_ylabel("peak memory beyond the result, MiB")
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.legend(fontsize=7, frameon=False)
