"""Carries out the merges of a sweep or a pool, evaluates each, and keeps the table of what came of them.

``sweep.csv`` in the output folder is all that a run knows of the ones before it. It is rewritten as a whole after every
merge and every score, so the same command goes on from wherever the last one was stopped.
"""

import contextlib
import csv
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merge_engine.adapter import WEIGHTS_FILE, Adapter, open_adapters
from merge_engine.engine import Merged
from merge_engine.errors import MergeError, OutputError, RecipeError
from merge_engine.lora_config import CONFIG_FILE
from merge_engine.many import Failed, merge_many
from merge_engine.recipe import Recipe
from merge_engine.stream import writing
from merge_engine.sweep import Trial, text_of

TABLE, PLOT, REPORT = "sweep.csv", "sweep.png", "merge_report.json"
BEST: dict[str, Callable[..., "Row"]] = {"highest": max, "lowest": min}
COLUMNS = ("folder", "kept_energy", "seconds", "score", "error", "evaluate", "made_from")

_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # colours
_NUMBER = re.compile(r"(?i)(?<![\w.])[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|nan|inf(?:inity)?)(?!\w|\.\d)")


@dataclass(frozen=True)
class Evaluation:
    """How a merged adapter is scored.

    text: what it is called; scores under another text count as unknown.
    score: the folder's score, finite; raises MergeError where there is none.
    """

    text: str
    score: Callable[[Path], float]


@dataclass
class Row:
    """What came of one trial.

    seconds: of merging; a run's merges share their work, so each is told its even share.
    made_from: digests of the adapters that the folder was merged from, in order.
    """

    trial: Trial
    folder: Path
    kept_energy: float | None = None
    seconds: float | None = None
    score: float | None = None
    error: str = ""
    evaluate: str = ""
    made_from: str = ""

    def cells(self) -> dict[str, str]:
        """The row of the table."""
        told = {name: text_of(value) for name, value in self.trial.told.items()}
        numbers = {name: getattr(self, name) for name in ("kept_energy", "seconds", "score")}
        texts = {"folder": self.trial.name, "error": self.error, "evaluate": self.evaluate, "made_from": self.made_from}
        return told | {name: "" if value is None else repr(value) for name, value in numbers.items()} | texts


@dataclass(frozen=True)
class Outcome:
    """All rows, in the order of the trials."""

    output: Path
    rows: list[Row]
    choose: str = "highest"
    axes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.error]

    def best(self, **told: Any) -> Row | None:
        """The row with the best score, among those with these fields."""
        rows = [row for row in self.rows if row.score is not None and told.items() <= row.trial.told.items()]
        return BEST[self.choose](rows, key=lambda row: row.score) if rows else None

    def table(self) -> str:
        """Rows in columns, the best one marked, and the best of each method where there are several."""
        best = self.best()
        scored = any(row.score is not None for row in self.rows)
        names = [*self.axes, "kept energy", "seconds", *(["score"] if scored else [])]
        cells = [[*map(self._cell(row), names), "<- best" if row is best else row.error] for row in self.rows]
        widths = [max(map(len, column)) for column in zip([*names, ""], *cells, strict=True)]
        lines = ["  ".join(f"{text:>{width}}" for text, width in zip([*names, ""], widths, strict=True))]
        for row in cells:
            lines.append("  ".join([f"{t:>{w}}" for t, w in zip(row[:-1], widths, strict=False)] + row[-1:]))
        methods = list(dict.fromkeys(row.trial.told["method"] for row in self.rows if "method" in row.trial.told))
        for method in methods if len(methods) > 1 else []:
            if winner := self.best(method=method):
                lines.append(f"best of {method}: {winner.trial.name}, score {winner.score:.6g}")
        return "\n".join(line.rstrip() for line in lines)

    @staticmethod
    def _cell(row: Row) -> Callable[[str], str]:
        own = {"kept energy": (row.kept_energy, ".4f"), "seconds": (row.seconds, ".2f"), "score": (row.score, ".6g")}

        def cell(name: str) -> str:
            if name not in own:
                return text_of(row.trial.told[name]) if name in row.trial.told else ""
            value, digits = own[name]
            return "" if value is None else format(value, digits)

        return cell


def run(
    adapters: Sequence[str | Path | Adapter],
    output: str | Path,
    trials: Sequence[Trial],
    *,
    evaluation: Evaluation | None = None,
    choose: str = "highest",
    memory: int | str = "4GB",
    overwrite: bool = False,
    progress: bool | None = None,
    backend: str | None = None,
) -> Outcome:
    """Merge every trial into its folder below `output` and score it; write ``sweep.csv``, and a plot of the scores.

    A folder that is there already and was made by the same recipe of the same adapters (by the bytes of their files) is
    left as it is, and so is a score by the same evaluation. One made of something else is refused, naming it, before
    anything is written, or replaced if overwrite. What goes wrong in one trial, in merging or in scoring, is told in
    its row, and tried again by the next run.
    """
    from tqdm import tqdm

    if choose not in BEST:
        raise RecipeError(f"best: wanted one of {', '.join(BEST)}, got {choose!r}")
    output = Path(output)
    opened = open_adapters(adapters)
    digests = [_digest(adapter) for adapter in opened]
    made_from = [" ".join(digests[number] for number in trial.adapters) for trial in trials]
    table = Table(output / TABLE)
    rows = [table.row(trial, output / trial.name, evaluation) for trial in trials]
    wanted: list[int] = []
    for number, row in enumerate(rows):
        difference = _difference(row, made_from[number], [opened[place] for place in row.trial.adapters])
        if difference is None:
            continue
        if os.path.lexists(row.folder) and not overwrite:
            raise OutputError(f"{row.folder} already exists, {difference}; pass overwrite to replace it")
        wanted.append(number)
    results: Iterator[Merged | Failed] = iter(())
    if wanted:
        results = merge_many(
            opened,
            [{**rows[number].trial.recipe, "adapters": list(rows[number].trial.adapters)} for number in wanted],
            output,
            names=[rows[number].trial.name for number in wanted],
            memory=memory,
            overwrite=overwrite,
            progress=progress,
            backend=backend,
        )
    for number in wanted:
        # A folder that appears from here on is this run's, even where a kill comes before its row is written again.
        # One to be replaced is nobody's until it was.
        known = "" if os.path.lexists(rows[number].folder) else made_from[number]
        rows[number] = Row(rows[number].trial, rows[number].folder, made_from=known)
    table.write(rows)
    spent, made = 0.0, [rows[number] for number in wanted]
    hidden = True if evaluation is None else None if progress is None else not progress
    for number, row in enumerate(tqdm(rows, unit="score", disable=hidden)):
        if number in wanted:
            started = time.perf_counter()
            result = next(results)
            spent += time.perf_counter() - started
            if isinstance(result, Failed):
                row.error = str(result.error) or repr(result.error)
            else:
                row.kept_energy, row.made_from = result.total_energy, made_from[number]
            done = [each for each in made if each.kept_energy is not None]
            for each in done:
                each.seconds = spent / len(done)
            table.write(rows)
        if evaluation is not None and row.kept_energy is not None and row.score is None:
            row.evaluate = evaluation.text
            try:
                row.score, row.error = evaluation.score(row.folder), ""
            except MergeError as error:
                row.error = str(error)
            table.write(rows)
    axes = list(dict.fromkeys(name for trial in trials for name in trial.told))
    outcome = Outcome(output, rows, choose, axes)
    if outcome.best() is not None:
        _plot(outcome)
    return outcome


def command(text: str, timeout: float | None = None) -> Evaluation:
    """Score by a program: ``{path}`` in its arguments is the folder, and the last number it prints is the score.

    The text is split as a shell does, and no shell runs it, so a path with spaces stays one argument. timeout: seconds.
    Raises RecipeError for a text without ``{path}`` and for a program that is not there.
    """
    try:
        words = shlex.split(text)
    except (ValueError, AttributeError) as error:
        raise RecipeError(f"evaluate: cannot be split into words: {error}, got {text!r}") from error
    if not any("{path}" in word for word in words):
        raise RecipeError(f"evaluate: wanted a command with {{path}} in it, got {text!r}")
    if "{path}" not in words[0] and shutil.which(words[0]) is None:
        raise RecipeError(f"evaluate: there is no program {words[0]}")
    if timeout is not None and not (isinstance(timeout, int | float) and 0 < timeout < math.inf):
        raise RecipeError(f"timeout: wanted seconds above 0, got {timeout!r}")
    return Evaluation(text, lambda folder: _scored(words, folder.absolute(), timeout))


def last_number(printed: str) -> float:
    """The last number in a text: 3, -0.5, 1e-3, 93.5%; not one that is part of a word, as in v2 or 3s.

    Raises MergeError where there is none, or it is not finite.
    """
    found = _NUMBER.findall(_ESCAPE.sub("", printed))
    if not found:
        raise MergeError("evaluate: wanted a number on standard output, got none")
    if not math.isfinite(float(found[-1])):
        raise MergeError(f"evaluate: wanted a finite number, got {found[-1]}")
    return float(found[-1])


def _scored(words: Sequence[str], folder: Path, timeout: float | None) -> float:
    arguments = [word.replace("{path}", str(folder)) for word in words]
    try:
        # A session of its own, so that all that the program started can be stopped with it.
        process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    except OSError as error:
        raise MergeError(f"evaluate: {arguments[0]} cannot be run: {error.strerror}") from error
    try:
        printed, told = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise MergeError(f"evaluate: not done in {timeout:g} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode != 0:
        lines = told.decode(errors="replace").strip().splitlines()
        raise MergeError(f"evaluate: exit status {process.returncode}" + (f": {lines[-1].strip()}" if lines else ""))
    return last_number(printed.decode(errors="replace"))


class Table:
    """``sweep.csv``: what earlier runs left, and the rows of this one; other rows stay while their folders do.

    Raises OutputError where the file is there and is no such table.
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
        """What is known of a trial; a score counts if it is by this evaluation, or if there is none now."""
        cells = self.found.get(trial.name, {})
        row = Row(trial, folder, made_from=cells.get("made_from", ""), seconds=_number(cells.get("seconds")))
        if evaluation is None or cells.get("evaluate") == evaluation.text:
            row.score, row.evaluate = _number(cells.get("score")), cells.get("evaluate", "")
        return row

    def write(self, rows: Sequence[Row]) -> None:
        """Replace the file: a reader, or a kill, sees it before or after."""
        mine = [row.cells() for row in rows]
        names = {cells["folder"] for cells in mine}
        others = [
            cells
            for folder, cells in self.found.items()
            if folder not in names and (self.path.parent / folder).is_dir()
        ]
        told = dict.fromkeys(name for cells in [*mine, *others] for name in cells if name not in COLUMNS)
        partial = self.path.with_name(f".{self.path.name}.partial")
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, [*told, *COLUMNS], restval="", lineterminator="\n")
                writer.writeheader()
                writer.writerows([*mine, *others])
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path)


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _difference(row: Row, made_from: str, adapters: Sequence[Adapter]) -> str | None:
    """How the folder differs from what the trial would make; None where it does not. Fills in its kept energy."""
    try:
        report = json.loads((row.folder / REPORT).read_text(encoding="utf-8"))
        recipe, energy = dict(report["recipe"]), float(report["energy"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"and holds no {REPORT} of a merged adapter"
    if not all((row.folder / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE)):
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


def _digest(adapter: Adapter) -> str:
    """SHA-256 of an adapter's files, the first 16 digits."""
    digest = hashlib.sha256()
    for path in sorted(path for path in adapter.path.glob("adapter_*") if path.is_file()):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _plot(outcome: Outcome) -> None:
    if find_spec("matplotlib") is None:
        warnings.warn(f"{PLOT}: not drawn, needs matplotlib: pip install matplotlib", stacklevel=2)
        return
    from merge_engine.sweep_plot import draw

    draw(outcome, outcome.output / PLOT)
