"""The plots of a comparison, as PNG: heat maps by pair of adapters, and line plots by layer."""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from merge_engine.report.charts import COLOURS, MARKERS, NAMED

DPI = 192  # twice the pixels of a page, for sharp screens
LABELLED = 12  # up to so many adapters have their names on the axes
ANNOTATED = 9  # up to so many adapters, every cell shows its number
MARKED = 20  # up to so many layers, every point has a marker
LONGEST = 16  # letters of a label
LIMITS = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)  # of a colour scale


class Scale(NamedTuple):
    """How a figure by pair is shown.

    colours: matplotlib's name of the colour map. centre: the value of its middle colour, None for a map that begins
    at 0. limit: the largest distance from the centre, or from 0. factor: multiplies values for display. number: the
    format of a number in a cell.
    """

    colours: str
    centre: float | None
    limit: float
    factor: float
    number: str


SCALES = {
    "cosine": Scale("RdBu_r", 0.0, 1.0, 1, ".2f"),
    "conflict": Scale("PuOr_r", 0.5, 0.5, 100, ".0f"),  # white: as unrelated deltas
    "overlap": Scale("Blues", None, 1.0, 100, ".0f"),
}
Lines = Mapping[str, Mapping[int, float]]  # {line: {layer: value}}


def heat_map(matrix: np.ndarray, names: Sequence[str], what: str) -> bytes:
    """A figure by pair [n, n]; the diagonal and undefined values are grey. what: a row of `SCALES`."""
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    scale, count = SCALES[what], len(names)
    values = np.where(np.eye(count, dtype=bool), np.nan, matrix)
    centre = scale.centre or 0.0
    furthest = np.nanmax(np.abs(values - centre))
    limit = min(next((limit for limit in LIMITS if furthest <= limit), LIMITS[-1]), scale.limit)
    low = 0.0 if scale.centre is None else centre - limit

    figure, plot = _figure(4.0, 4.3)
    image = plot.imshow(
        scale.factor * np.ma.masked_invalid(values),
        cmap=matplotlib.colormaps[scale.colours].with_extremes(bad="0.88"),
        vmin=scale.factor * low,
        vmax=scale.factor * (centre + limit),
    )
    if count <= LABELLED:
        plot.set_yticks(range(count), [f"{i} {short(name)}" for i, name in enumerate(names, 1)], parse_math=False)
        plot.set_xticks(range(count), [str(i) for i in range(1, count + 1)])
    else:
        step = 5 if count <= 50 else 10
        places = range(step - 1, count, step)
        for axis in (plot.xaxis, plot.yaxis):
            axis.set_ticks(places, [str(place + 1) for place in places])
    plot.xaxis.tick_top()
    plot.tick_params(length=0)
    for i, j in np.argwhere(~np.isnan(values)) if count <= ANNOTATED else ():
        dark = abs(values[i, j] - centre) > 0.6 * limit
        text = format(scale.factor * values[i, j], scale.number).replace("-0.00", "0.00")
        plot.text(
            j, i, text, ha="center", va="center", fontsize=9 if count <= 6 else 7, color="white" if dark else "black"
        )
    for spine in plot.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(
        image, ax=plot, orientation="horizontal", shrink=0.8, aspect=30, pad=0.02, ticks=MaxNLocator(4)
    )
    bar.ax.tick_params(labelsize=9)
    bar.outline.set_visible(False)
    return _png(figure)


def layer_plot(lines: Lines, what: str) -> bytes:
    """Lines of values by layer. Of more than ten lines, the ten that reach highest are named, the others are grey."""
    from matplotlib.ticker import MaxNLocator

    tops = sorted(lines, key=lambda name: max(lines[name].values()), reverse=True)[:NAMED]
    named = [name for name in lines if name in tops]
    figure, plot = _figure(5.0, 3.1 + 0.19 * -(-len(named) // 3))
    marked = max(map(len, lines.values())) <= MARKED
    handles = []
    for name in sorted(lines, key=lambda name: name in tops):  # grey lines first, below the others
        style: dict[str, Any] = {"color": "0.8", "linewidth": 1, "marker": ".", "markersize": 4 * marked}
        if name in tops:
            number = named.index(name)
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            style = {"color": colour, "linewidth": 1.5, "marker": marker, "markersize": 4 * marked}
        (line,) = plot.plot(*zip(*sorted(lines[name].items()), strict=True), **style)
        if name in tops:
            handles.append(line)
    for side in ("top", "right"):
        plot.spines[side].set_visible(False)
    plot.grid(alpha=0.25)
    plot.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    plot.set_xlabel("layer")
    plot.set_ylabel(what)
    title = None if len(lines) <= NAMED else f"the highest {NAMED} of {len(lines)}"
    legend = figure.legend(
        handles,
        ["x"] * len(handles),
        loc="outside lower center",
        ncols=3,
        fontsize=9,
        frameon=False,
        title=title,
        title_fontsize=9,
    )
    for text, name in zip(legend.get_texts(), [name for name in lines if name in tops], strict=True):
        text.set_parse_math(False)
        text.set_text(short(name))  # set only here: matplotlib's legend leaves out names that begin with _
    return _png(figure)


def by_layer(names: Sequence[str]) -> dict[str, dict[int, list[str]]]:
    """{kind: {layer: modules}}. The layer is the first number in a module's name. The kind is the name without numbers,
    shortened to as many of its last parts as tell the kinds apart. Modules without a number are left out.
    """
    groups: dict[tuple[str, ...], dict[int, list[str]]] = {}
    for name in names:
        parts = name.split(".")
        numbers = [int(part) for part in parts if re.fullmatch("[0-9]{1,9}", part)]
        if numbers:
            kind = tuple(part for part in parts if not re.fullmatch("[0-9]{1,9}", part))
            groups.setdefault(kind, {}).setdefault(numbers[0], []).append(name)
    length = 1
    while len({kind[-length:] for kind in groups}) < len(groups):
        length += 1
    return {".".join(kind[-length:]): layers for kind, layers in groups.items()}


def lines_by_kind(kinds: Mapping[str, Mapping[int, Sequence[str]]], of: Callable[[Sequence[str]], float]) -> Lines:
    """of(modules) for every kind and layer; undefined values are left out."""
    lines = {kind: {layer: of(modules) for layer, modules in layers.items()} for kind, layers in kinds.items()}
    return defined(lines)


def defined(lines: Lines) -> Lines:
    """The lines without their NaN values; lines of nothing else are left out."""
    kept = {name: {at: value for at, value in line.items() if not np.isnan(value)} for name, line in lines.items()}
    return {name: line for name, line in kept.items() if line}


def short(name: str) -> str:
    """The name on one line, with its middle left out if it is long."""
    name = " ".join(name.encode(errors="replace").decode().split())
    half = (LONGEST - 1) // 2
    return name if len(name) <= LONGEST else f"{name[:half]}…{name[-half:]}"


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of this size in inches, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    plot = figure.add_subplot()
    plot.tick_params(labelsize=9)
    return figure, plot


def _png(figure: Any) -> bytes:
    with io.BytesIO() as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # the adapter's number is still shown
        figure.savefig(file, format="png", metadata={"Software": None}, bbox_inches="tight", pad_inches=0.02)
        return file.getvalue()
