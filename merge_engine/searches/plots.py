"""The plots of a search: its history, what mattered, and the trials as lines through their values."""

import math
from itertools import accumulate
from pathlib import Path
from typing import Any

from merge_engine.errors import some
from merge_engine.files.text import replaced
from merge_engine.report.charts import COLOURS
from merge_engine.searches.result import SearchResult, Tried
from merge_engine.sweeps.trials import number_of, text_of

HISTORY, IMPORTANCES, PARALLEL = "history.png", "importances.png", "parallel.png"
_TOP = 0.1  # share of the trials that are drawn in front


def draw(outcome: SearchResult) -> list[Path]:
    """Write the plots beside the table, each as a PNG, whole or not at all; importances only where there are some."""
    scored = [trial for trial in outcome.trials if trial.score is not None]
    written = [_written(outcome.folder / HISTORY, (8, 4), lambda plot: _history(plot, scored, outcome))]
    if outcome.importances:
        height = 1.2 + 0.32 * len(outcome.importances)
        written.append(_written(outcome.folder / IMPORTANCES, (8, height), lambda plot: _importances(plot, outcome)))
    axes = list(dict.fromkeys(name for trial in scored for name in trial.values))
    width = max(8.0, 1.6 * (len(axes) + 1))
    written.append(_written(outcome.folder / PARALLEL, (width, 5), lambda plot: _parallel(plot, scored, outcome, axes)))
    return written


def _written(path: Path, size: tuple[float, float], fill: Any) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    plot = figure.add_subplot()
    for side in ("top", "right"):
        plot.spines[side].set_visible(False)
    fill(plot)
    with replaced(path) as partial:
        figure.savefig(partial, format="png")
    return path


def _history(plot: Any, scored: list[Tried], outcome: SearchResult) -> None:
    best = outcome.best
    groups: dict[str, list[Tried]] = {}
    for trial in scored:
        groups.setdefault(str(trial.values.get("method", "trials")), []).append(trial)
    for number, (method, own) in enumerate(groups.items()):
        points = [trial.number for trial in own], [trial.score for trial in own]
        plot.plot(*points, ".", markersize=8, color=COLOURS[number % len(COLOURS)], label=method)
    so_far = list(accumulate([trial.score or 0.0 for trial in scored], max if outcome.choose == "highest" else min))
    plot.step([trial.number for trial in scored], so_far, where="post", color="0.3", linewidth=1.2, label="best so far")
    plot.grid(alpha=0.25)
    plot.set_xlabel("trial")
    plot.set_ylabel("score")
    if best is not None:
        plot.set_title(f"best: trial {best.number}, score {best.score:.6g}", fontsize=10, loc="left")
        plot.plot([best.number], [best.score], "o", markersize=12, markerfacecolor="none", markeredgecolor="0.2")
    plot.figure.legend(loc="outside right upper", fontsize=8, frameon=False)


def _importances(plot: Any, outcome: SearchResult) -> None:
    names = sorted(outcome.importances, key=outcome.importances.__getitem__)
    bars = plot.barh(names, [outcome.importances[name] for name in names], color=COLOURS[0])
    plot.bar_label(bars, [f"{outcome.importances[name]:.2f}" for name in names], padding=3, fontsize=8)
    plot.margins(x=0.12)
    plot.tick_params(axis="y", labelsize=8)
    plot.set_xlabel("importance for being among the best (PED-ANOVA)")


def _parallel(plot: Any, scored: list[Tried], outcome: SearchResult, axes: list[str]) -> None:
    """A line for each trial through its values, from each axis' lowest to its highest; the best ones in colour."""
    columns: dict[str, list[Any]] = {name: [trial.values.get(name) for trial in scored] for name in axes}
    columns["score"] = [trial.score for trial in scored]
    heights = {name: _heights(values) for name, values in columns.items()}
    order = sorted(range(len(scored)), key=lambda place: scored[place].score or 0.0)
    if outcome.choose == "lowest":
        order.reverse()
    front = set(order[-max(1, round(_TOP * len(order))) :])
    for place in order:
        line = [heights[name][place] for name in columns]
        is_best = place == order[-1]
        style = {"color": "0.82", "linewidth": 0.8, "zorder": 1}
        if place in front:
            style = {"color": COLOURS[1] if is_best else COLOURS[0], "linewidth": 2.2 if is_best else 1.2, "zorder": 2}
        plot.plot(range(len(line)), line, marker=".", markersize=4, **style)
    for x, values in enumerate(columns.values()):
        plot.axvline(x, color="0.6", linewidth=0.8, zorder=0)
        for height, text in _ticks(values):
            plot.annotate(text, (x, height), (4, 0), textcoords="offset points", fontsize=7, va="center", zorder=3)
    labels = [name.replace(" of ", " of\n").replace(" in ", "\nin ") for name in columns]
    plot.set_xticks(range(len(labels)), labels, fontsize=8)
    plot.set_yticks([])
    plot.spines["left"].set_visible(False)
    plot.set_xlim(-0.2, len(labels) - 0.5)
    plot.set_title(
        f"the best {len(front)} of {some(len(scored), 'trial')} in colour, the best one in orange",
        fontsize=10,
        loc="left",
    )


def _heights(values: list[Any]) -> list[float]:
    """Each value's place from 0 (lowest) to 1 (highest); a value that is missing has no point."""
    numbers = [number_of(value) for value in values]
    if all(number is not None or value is None for number, value in zip(numbers, values, strict=True)):
        found = [number for number in numbers if number is not None]
        low, high = min(found), max(found)
        return [math.nan if n is None else (n - low) / (high - low) if high > low else 0.5 for n in numbers]
    kinds = list(dict.fromkeys(text_of(value) for value in values))
    return [kinds.index(text_of(value)) / max(len(kinds) - 1, 1) for value in values]


def _ticks(values: list[Any]) -> list[tuple[float, str]]:
    """(height, text) of the lowest and highest number, or of every word."""
    heights = _heights(values)
    shown: dict[str, float] = {}
    numbers = [number_of(value) for value in values if value is not None]
    for height, value in zip(heights, values, strict=True):
        if value is not None and (height in (0.0, 0.5, 1.0) or None in numbers):
            shown.setdefault(text_of(value) if None in numbers else f"{value:.3g}", height)
    if None not in numbers:
        shown = {text: height for text, height in shown.items() if height in (0.0, 1.0) or len(set(heights)) == 1}
    return [(height, text) for text, height in shown.items()]
