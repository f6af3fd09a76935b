"""The plots of a report, as PNG. python -m bench.reporting.plots [REPORT.csv] draws them from what was measured."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness.row import Row
from bench.reporting.files import read_csv
from bench.reporting.headlines import OURS
from bench.reporting.trends import Trend, trends

SIZE, DPI = (7.0, 4.2), 150


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write peft.png, faster.png, elements.png, adapters.png and memory.png, as far as there are rows for them."""
    import matplotlib

    matplotlib.use("agg")
    found = trends(rows)
    cost = {by: [trend for trend in found if trend.by == by] for by in ("elements", "adapters")}
    known = [trend for trend in cost["adapters"] if None not in trend.memory]
    rivals = [row for row in rows if row.contestant in OURS and row.baseline.startswith("PEFT")]
    bars = [row for row in rivals if row.kind != "adapters"]
    folder.mkdir(parents=True, exist_ok=True)
    first = [_beside_peft(folder / "peft.png", panels)] if (panels := beside_peft(rows)) else []
    plots: dict[str, tuple[Sequence[Any], Callable[[Any, Any], None]]] = {
        "faster": (bars, _bars),
        "elements": (cost["elements"], _cost),
        "adapters": (cost["adapters"], _cost),
        "memory": (known, _memory),
    }
    return first + [_drawn(folder / f"{name}.png", draw, data) for name, (data, draw) in plots.items() if data]


@dataclass(frozen=True)
class Panel:
    """One pair of bars, from zero: PEFT's figure and ours."""

    title: str
    unit: str
    peft: float
    ours: float


def beside_peft(rows: Sequence[Row]) -> list[Panel]:
    """Time of a whole merge, and time and memory of one layer; empty where one of these was not measured."""
    wanted = (
        ("whole", "ties", "a whole merge of a 1.1B model's adapters (PEFT extrapolated)", "seconds", "seconds"),
        ("deltas", "ties", "one 4096 x 4096 layer", "seconds", "seconds"),
        ("deltas", "ties", "memory for that layer, beyond the result", "MiB", "extra_mib"),
    )
    panels = []
    for kind, method, title, unit, field in wanted:
        mine = [row for row in rows if row.kind == kind and row.method == method and (row.layers or row.rows == 4096)]
        ours = [getattr(row, field) for row in mine if row.contestant in OURS]
        peft = [getattr(row, field) for row in mine if row.contestant.startswith("PEFT")]
        if not ours or not peft or ours[0] is None or peft[0] is None:
            return []
        panels.append(Panel(title, unit, peft[0], ours[0]))
    return panels


def _beside_peft(path: Path, panels: Sequence[Panel]) -> Path:
    from matplotlib import pyplot

    figure, row = pyplot.subplots(len(panels), 1, figsize=(SIZE[0], 1.15 * len(panels) + 0.4), layout="constrained")
    for axes, panel in zip(row, panels, strict=True):
        axes.barh([1, 0], [panel.peft, panel.ours], color=["tab:gray", "tab:blue"])
        axes.set_yticks([1, 0], ["PEFT", "merge-engine"])
        for place, value in ((1, panel.peft), (0, panel.ours)):
            axes.annotate(
                f" {value:.3g} {panel.unit}" if value < 1000 else f" {value:.0f} {panel.unit}",
                (value, place),
                va="center",
                fontsize=8,
            )
        axes.set_title(panel.title, fontsize=9, loc="left")
        axes.set_xlim(0, 1.18 * panel.peft)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("ties of three adapters of rank 16, two CPU cores", fontsize=9)
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
    return path


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
        (drawn,) = axes.plot(trend.xs, [value or 0.0 for value in trend.memory], "o-", label=trend.name)
        stored = [x * trend.rows[0].elements * 4 / 2**20 for x in trend.xs]
        label = "if the adapters' deltas were stored in float32"
        axes.plot(trend.xs, stored, "--", linewidth=1, color=drawn.get_color(), label=label)
    axes.set_xlabel("adapters")
    axes.set_ylabel("peak memory beyond the result, MiB")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, frameon=False)


if __name__ == "__main__":
    source = Path(sys.argv[1] if len(sys.argv) > 1 else "bench/results/cpu.csv")
    for each in plot(read_csv(source), source.parent):
        print(each)
