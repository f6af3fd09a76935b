"""``sweep.csv``: the rows of a sweep, those of earlier runs among them, and the table that is printed."""

import csv
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from merge_engine.errors import MergeError, OutputError
from merge_engine.files.text import replaced
from merge_engine.formats.adapter import Adapter
from merge_engine.formats.peft_config import ADAPTER_CONFIG
from merge_engine.formats.peft_tensors import WEIGHTS_FILE
from merge_engine.rules.recipe import Recipe
from merge_engine.sweeps.goal import BEST
from merge_engine.sweeps.readings import SCORE, Metrics
from merge_engine.sweeps.score import Evaluation
from merge_engine.sweeps.trials import Trial, text_of

TABLE, PLOT, REPORT = "sweep.csv", "sweep.png", "merge_report.json"
SHOWN = 6  # metrics in the printed table; the file has all
COLUMNS = ("folder", "kept_energy", "seconds", "score", "error", "evaluate", "made_from")
NOT_METRICS = {*COLUMNS, "adapters", *(each.name for each in fields(Recipe))}


@dataclass
class Row:
    """The result of one trial.

    seconds: of merging. The merges of a run share their work; each row has an even share of the time.
    metrics: all that the evaluation measured. score: what its goal makes of them.
    made_from: digests of the adapters that the folder was merged from, in order.
    """

    trial: Trial
    folder: Path
    kept_energy: float | None = None
    seconds: float | None = None
    metrics: Metrics = field(default_factory=dict)
    score: float | None = None
    error: str = ""
    evaluate: str = ""
    made_from: str = ""

    def cells(self) -> dict[str, str]:
        """The row of the table."""
        varied = {name: text_of(value) for name, value in self.trial.varied.items()}
        results = {name: getattr(self, name) for name in ("kept_energy", "seconds", "score")}
        texts = {"folder": self.trial.name, "error": self.error, "evaluate": self.evaluate, "made_from": self.made_from}
        metrics = {metric_column(name): repr(value) for name, value in self.metrics.items() if math.isfinite(value)}
        if self.metrics.keys() == {SCORE}:
            metrics = {}  # it is the score
        numbers = {name: "" if value is None else repr(value) for name, value in results.items()}
        return varied | metrics | numbers | texts


@dataclass(frozen=True)
class SweepResult:
    """All rows, in the order of the trials."""

    output: Path
    rows: list[Row]
    choose: str = "highest"
    axes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.error]

    def best(self, **fields: Any) -> Row | None:
        """The row with the best score, among the trials with these values of their fields."""
        rows = [row for row in self.rows if row.score is not None and fields.items() <= row.trial.varied.items()]
        return BEST[self.choose](rows, key=lambda row: row.score) if rows else None

    def table(self) -> str:
        """Rows in columns with the best one marked; where there are several methods, the best of each below."""
        best = self.best()
        scored = any(row.score is not None for row in self.rows)
        metrics = [name for name in dict.fromkeys(name for row in self.rows for name in row.metrics) if name != SCORE]
        shown = metrics if len(metrics) <= SHOWN else []
        names = [*self.axes, "kept energy", "seconds", *shown, *(["score"] if scored else [])]
        cells = [[*map(self._cell(row), names), "<- best" if row is best else row.error] for row in self.rows]
        widths = [max(map(len, column)) for column in zip([*names, ""], *cells, strict=True)]
        lines = ["  ".join(f"{text:>{width}}" for text, width in zip([*names, ""], widths, strict=True))]
        for row in cells:
            lines.append("  ".join([f"{t:>{w}}" for t, w in zip(row[:-1], widths, strict=False)] + row[-1:]))
        methods = list(dict.fromkeys(row.trial.varied["method"] for row in self.rows if "method" in row.trial.varied))
        for method in methods if len(methods) > 1 else []:
            if winner := self.best(method=method):
                lines.append(f"best of {method}: {winner.trial.name}, score {winner.score:.6g}")
        return "\n".join(line.rstrip() for line in lines)

    @staticmethod
    def _cell(row: Row) -> Callable[[str], str]:
        results = {
            "kept energy": (row.kept_energy, ".4f"),
            "seconds": (row.seconds, ".2f"),
            "score": (row.score, ".6g"),
        }

        def cell(name: str) -> str:
            if name not in results and name in row.metrics:
                return format(row.metrics[name], ".6g")
            if name not in results:
                return text_of(row.trial.varied[name]) if name in row.trial.varied else ""
            value, digits = results[name]
            return "" if value is None else format(value, digits)

        return cell


class Table:
    """``sweep.csv``: the rows of this run, and those of earlier runs while their folders exist.

    Raises OutputError if the file exists and is not the table of a sweep.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, dict[str, str]] = {}
        if not path.exists():
            return
        try:
            with open(path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file, restval="")
                lacking = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
                cells = [] if lacking else [{name: text for name, text in row.items() if name} for row in reader]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise OutputError(f"{path}: cannot be read: {error}; remove it, or choose another folder") from error
        if lacking:
            raise OutputError(f"{path}: wanted the table of a sweep, got one without {', '.join(lacking)}")
        self.found = {row["folder"]: row for row in cells}

    def row(self, trial: Trial, folder: Path, evaluation: Evaluation | None) -> Row:
        """What the table knows of a trial. Its score counts if it is by this evaluation, or if none is given."""
        cells = self.found.get(trial.name, {})
        row = Row(trial, folder, made_from=cells.get("made_from", ""), seconds=number_in(cells.get("seconds")))
        if evaluation is None or cells.get("evaluate") == evaluation.text:
            row.score, row.evaluate = number_in(cells.get("score")), cells.get("evaluate", "")
            found = {metric_of(name): number_in(text) for name, text in cells.items() if metric_of(name) is not None}
            row.metrics = {name: value for name, value in found.items() if name is not None and value is not None}
            if row.score is not None and not row.metrics:
                row.metrics = {SCORE: row.score}
            if row.metrics and evaluation is not None:  # the goal may be another one
                row.score = _scored(evaluation, row.metrics)
        return row

    def write(self, rows: Sequence[Row]) -> None:
        """Replace the file, whole: a reader finds the old rows or the new ones, and so does a kill."""
        new = [row.cells() for row in rows]
        names = {cells["folder"] for cells in new}
        others = [
            cells
            for folder, cells in self.found.items()
            if folder not in names and (self.path.parent / folder).is_dir()
        ]
        varied = dict.fromkeys(name for cells in [*new, *others] for name in cells if name not in COLUMNS)
        with replaced(self.path, fsync=True) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*varied, *COLUMNS], restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows([*new, *others])


def metric_column(name: str) -> str:
    """The column of a metric: its name, unless another column or a field of a recipe has it."""
    return f"{name} (metric)" if name in NOT_METRICS or name.endswith(" (metric)") else name


def metric_of(column: str) -> str | None:
    """The metric in a column, or None: a column that is no metric's."""
    if column in NOT_METRICS:
        return None
    return column.removesuffix(" (metric)")


def _scored(evaluation: Evaluation, metrics: Metrics) -> float | None:
    """The score of metrics that the table has; None, to measure again, where the goal needs others."""
    try:
        return evaluation.goal.score(metrics)
    except MergeError:
        return None


def number_in(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def difference_from(row: Row, made_from: str, adapters: Sequence[Adapter]) -> str | None:
    """How the folder differs from what the trial would write, in words; None if it does not.

    If it does not, the row gets the kept energy that the folder's report has.
    """
    try:
        report = json.loads((row.folder / REPORT).read_text(encoding="utf-8"))
        recipe, energy = dict(report["recipe"]), float(report["energy"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"and holds no {REPORT} of a merged adapter"
    if not all((row.folder / name).is_file() for name in (ADAPTER_CONFIG, WEIGHTS_FILE)):
        return "and is not complete"
    wanted = Recipe.from_mapping(row.trial.recipe)
    weights = list(wanted.weights_for([adapter.name for adapter in adapters]))
    plain: Mapping[str, Any] = json.loads(json.dumps({**wanted.as_dict(), "weights": weights}))
    for name in plain:
        if recipe.get(name) != plain[name]:
            return f"made with {name} {text_of(recipe.get(name))}, wanted {text_of(plain[name])}"
    if row.made_from != made_from:
        old, new = row.made_from.split(), made_from.split()
        changed = [adapter.name for adapter, *pair in zip(adapters, old, new, strict=False) if pair[0] != pair[1]]
        if not old:
            return f"and {TABLE} does not say of which adapters"
        return f"made of other adapters ({', '.join(changed) or f'{len(old)}, wanted {len(new)}'})"
    row.kept_energy = energy
    return None


def digest_of(adapter: Adapter) -> str:
    """SHA-256 of an adapter's files, the first 16 digits."""
    digest = hashlib.sha256()
    for path in sorted(path for path in adapter.path.glob("adapter_*") if path.is_file()):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]
