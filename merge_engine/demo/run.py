"""``merge-engine demo``: merges the bundled adapters by several methods, loads each result by PEFT and measures it."""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from merge_engine.demo import measure
from merge_engine.demo.measure import REPORTED, TUNING, Figures
from merge_engine.demo.sets import DEMO_SETS, HALF_KNOWN, DemoSet

SCALES = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)

NAME_WIDTH, KNOWN_WIDTH = 30, 13
LEGEND = {
    "d": "density: share of the elements that a method keeps (dare: at random)",
    "auto": 'scale="auto": each merged layer is as large as the adapters\' are on average; other scales multiply it',
    "knots": "the products' coordinates in the column space that all adapters share are merged",
    "factors": "A and B are merged separately, as by PEFT's linear and ties; the other rows merge the products B @ A",
    "rank 8": "the result is cut to rank 8; it has up to 48, the sum of the adapters' ranks, in the other rows",
}
SCALE = f"""\
scale    multiplies the merged adapter; all is at scale 1 but the columns "there", at the best scale of
         {", ".join(f"{scale:g}" for scale in SCALES)}, chosen on a sample of its own
"""


@dataclass(frozen=True)
class Row:
    """One line of the table; figures in percent by task.

    kind: "accuracy" (share of letters that are right) or "relative" (this, divided by that of the task's own adapter).
    figures: at scale 1. best_scale: the scale of `SCALES` with the highest mean. best: the figures at that scale.
    group: of the adapters. known: accuracy in the tasks that the base knows, at the best scale if there is one.
    """

    name: str
    kind: str
    figures: Figures
    best_scale: float | None = None
    best: Figures = field(default_factory=dict)
    group: str = ""
    known: float | None = None

    @property
    def mean(self) -> float:
        """Mean over tasks at scale 1, in percent."""
        return measure.mean(self.figures)

    @property
    def best_mean(self) -> float:
        """Mean over tasks at the best scale, in percent."""
        return measure.mean(self.best)


def run(print_line: Callable[[str], object], name: str = HALF_KNOWN) -> list[Row]:
    """Merge and measure; call ``print_line`` with each line of the table as soon as it is known. Returns the rows.

    name: of a set of `DEMO_SETS`. Raises MergeError if transformers or peft is not installed.
    """
    from merge_engine import merge

    measure.require()
    started, shown = time.perf_counter(), DEMO_SETS[name]
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        print_line(_line(row))

    with measure.quiet(), tempfile.TemporaryDirectory() as folder:
        groups, base = shown.groups.items(), measure.load(shown)
        own = {key: {seed: measure.own_marks(shown, group, seed) for seed in measure.COUNT} for key, group in groups}
        untouched = measure.marks(shown, base, REPORTED)
        print_line(shown.about)
        print_line(_head("accuracy, % of letters right", shown))
        add(Row("base, no adapter", "accuracy", untouched, known=measure.known_mark(shown, base)))
        for key, group in groups:
            if shown.known:
                for task, path in group.items():
                    model = measure.load(shown, path)
                    marks, known = measure.marks(shown, model, REPORTED), measure.known_mark(shown, model)
                    add(Row(_title(key, f"only {task}"), "accuracy", marks, group=key, known=known))
            add(Row(_title(key, "the task's own adapter"), "accuracy", own[key][REPORTED], group=key))
        for key, group in groups:
            print_line("")
            title = f"{key}: % of own adapter's" if key else "% of the own adapter's figure"
            print_line(_head(title, shown, tuned=True))
            add(Row("base, no adapter", "relative", measure.relative(untouched, own[key][REPORTED]), group=key))
            for title, recipe in shown.merges.items():
                output = Path(folder) / key / title
                merge(list(group.values()), output, progress=False, **recipe)
                add(_measure(shown, key, title, output, own[key]))
    print_line(_legend(shown))
    print_line(f"Done in {time.perf_counter() - started:.0f} s.")
    return rows


def _measure(shown: DemoSet, group: str, name: str, adapter: Path, own: Mapping[int, Figures]) -> Row:
    """The row of one merged adapter; own: {seed: accuracy of each task's own adapter}.

    A scale multiplies the merged delta: PEFT applies it to the loaded adapter, and nothing is merged again.
    """
    model = measure.load(shown, adapter)

    @cache
    def relative(scale: float, seed: int) -> Figures:
        with measure.scaled(model, scale):
            return measure.relative(measure.marks(shown, model, seed), own[seed])

    best_scale = max(SCALES, key=lambda scale: measure.mean(relative(scale, TUNING)))
    with measure.scaled(model, best_scale):
        known = measure.known_mark(shown, model)
    best = relative(best_scale, REPORTED)
    return Row(name, "relative", relative(1.0, REPORTED), best_scale, best, group, known)


def _title(group: str, text: str) -> str:
    return f"{group}: {text}" if group else text


def _head(title: str, shown: DemoSet, *, tuned: bool = False) -> str:
    columns = "".join(f"{name:>{_width(name)}}" for name in [*shown.columns, "mean"])
    there = "   best scale  mean there" if tuned else ""
    known = f"{'known there' if tuned else 'known':>{KNOWN_WIDTH}}" if shown.known else ""
    return f"{title:{NAME_WIDTH}}{columns}{there}{known}"


def _line(row: Row) -> str:
    columns = "".join(f"{value:{_width(name)}.1f}" for name, value in [*row.figures.items(), ("mean", row.mean)])
    tuned = "" if row.best_scale is None else f"   {row.best_scale:10g}{row.best_mean:12.1f}"
    known = "" if row.known is None else f"{row.known:{KNOWN_WIDTH}.1f}"
    return f"{row.name:{NAME_WIDTH}}{columns}{tuned}{known}"


def _width(name: str) -> int:
    return max(len(name), 5) + 2


def _legend(shown: DemoSet) -> str:
    """What the words of the table mean; the words that no row of this set has are left out."""
    said = " ".join(["d", *shown.merges])
    return "\n".join(["", *(f"{word:9}{text}" for word, text in LEGEND.items() if word in said), SCALE])
