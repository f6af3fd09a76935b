"""Carries out the merges of a sweep or a pool, scores each, and keeps a table of the results.

``sweep.csv`` in the output folder is all that a run knows of earlier runs. It is rewritten as a whole after every merge
and every score, so the same command goes on from wherever the last one was stopped.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from typing_extensions import Unpack

from merge_engine.engine.output import Merged
from merge_engine.errors import MergeError, OutputError
from merge_engine.files.folder import output_path
from merge_engine.formats.adapter import Adapter
from merge_engine.formats.open import open_adapters
from merge_engine.many.merge_many import Failed, merge_each
from merge_engine.rules.fields import RecipeFields
from merge_engine.sweeps.score import Evaluation, evaluation_of
from merge_engine.sweeps.table import PLOT, TABLE, Row, SweepResult, Table, difference_from, digest_of
from merge_engine.sweeps.trials import Trial, sweep_trials


def run(
    adapters: Sequence[str | Path | Adapter],
    output: str | Path,
    trials: Sequence[Trial],
    *,
    evaluation: Evaluation | None = None,
    memory: int | str = "4GB",
    overwrite: bool = False,
    progress: bool | None = None,
    backend: str | None = None,
) -> SweepResult:
    """Merge every trial into its folder below `output` and score it; write ``sweep.csv``, and a plot of the scores.

    A folder that exists and was made by the same recipe from the same adapters (by the bytes of their files) is kept,
    and so is a score by the same evaluation. A folder that was made from something else is replaced if overwrite; else
    it is refused by name, before anything is written. An error in one trial, while merging or scoring, is written to
    its row, and the next run tries that trial again.
    """
    from tqdm import tqdm

    output, opened = output_path(output), open_adapters(adapters)
    digests = [digest_of(adapter) for adapter in opened]
    made_from = [" ".join(digests[number] for number in trial.adapters) for trial in trials]
    table = Table(output / TABLE)
    rows = [table.row(trial, output / trial.name, evaluation) for trial in trials]
    missing = [
        number for number, row in enumerate(rows) if _has_to_be_merged(row, made_from[number], opened, overwrite)
    ]
    results: Iterator[Merged | Failed] = iter(())
    if missing:
        results = merge_each(
            opened,
            [{**rows[number].trial.recipe, "adapters": list(rows[number].trial.adapters)} for number in missing],
            output,
            names=[rows[number].trial.name for number in missing],
            memory=memory,
            overwrite=overwrite,
            progress=progress,
            backend=backend,
        )
    for number in missing:
        rows[number] = _emptied(rows[number], made_from[number])
    table.write(rows)
    merges = _Merges(results)
    hidden = True if evaluation is None else None if progress is None else not progress
    for number, row in enumerate(tqdm(rows, unit="score", disable=hidden)):
        if number in missing:
            merges.finish(row, made_from[number])
            table.write(rows)
        if evaluation is not None and row.kept_energy is not None and row.score is None:
            _score(row, evaluation)
            table.write(rows)
    axes = list(dict.fromkeys(name for trial in trials for name in trial.varied))
    outcome = SweepResult(output, rows, "highest" if evaluation is None else evaluation.goal.best, axes)
    if outcome.best() is not None:
        _plot(outcome)
    return outcome


def sweep(
    adapters: Sequence[str | Path | Adapter],
    grid: Mapping[str, Sequence[Any]],
    output: str | Path | None = None,
    *,
    evaluate: str | Callable[[Path], Any] | None = None,
    metric: str | Sequence[str] | Mapping[str, float] = (),
    combine: str = "mean",
    best: str = "highest",
    timeout: float | None = None,
    memory: int | str = "4GB",
    overwrite: bool = False,
    progress: bool | None = None,
    backend: str | None = None,
    **recipe: Unpack[RecipeFields],
) -> SweepResult:
    """Merge every combination of a grid's values, and score each; the rows, and ``best()`` of them.

    sweep(adapters, {"method": ["linear", "tsv"], "gain": [0.7, 1]}, "out", evaluate=accuracy, scale="auto")

    grid: {field of a recipe: values}. recipe: fields that all merges have.
    output: each merge has a folder of a readable name in it, beside ``sweep.csv``, and the same call goes on from
        what is there. None: folders are temporary, and only the rows remain.
    evaluate: a command with ``{path}``, or a function of the folder, which returns a number or a table of metrics.
    metric: those that count, as "arc/acc" or "*/acc", with weights as {"code/pass": 2}; combine: "mean" or "worst";
    best: "highest" or "lowest". timeout: of a command, in seconds.

    An error in one merge or evaluation is in its row's `error`. Raises MergeError before anything is written.
    """
    path = None if output is None else output_path(output)
    options = {"metric": metric, "combine": combine, "best": best, "timeout": timeout}
    evaluation = None if evaluate is None else evaluation_of(evaluate, **options)  # type: ignore[arg-type]
    opened = open_adapters(adapters)
    trials = sweep_trials({name: list(values) for name, values in grid.items()}, recipe, len(opened))
    place = TemporaryDirectory(prefix="merge-engine-") if path is None else nullcontext(path)
    with place as folder:
        return run(
            *(opened, folder, trials),
            evaluation=evaluation,
            memory=memory,
            overwrite=overwrite,
            progress=progress,
            backend=backend,
        )


def _has_to_be_merged(row: Row, made_from: str, opened: Sequence[Adapter], overwrite: bool) -> bool:
    """Whether the row's folder is missing, or is to be replaced. Raises OutputError if it may not be replaced."""
    difference = difference_from(row, made_from, [opened[place] for place in row.trial.adapters])
    if difference is not None and os.path.lexists(row.folder) and not overwrite:
        raise OutputError(f"{row.folder} already exists, {difference}; pass overwrite to replace it")
    return difference is not None


def _emptied(row: Row, made_from: str) -> Row:
    """The row of a trial that is about to be merged.

    A folder that appears from now on is this run's, even if the process is killed before the row is written again. A
    folder to be replaced gets no `made_from` until its replacement exists.
    """
    return Row(row.trial, row.folder, made_from="" if os.path.lexists(row.folder) else made_from)


class _Merges:
    """The merges of a run as they finish. They share their work, so each gets an even share of the time."""

    def __init__(self, results: Iterator[Merged | Failed]) -> None:
        self.results = results
        self.seconds = 0.0
        self.done: list[Row] = []

    def finish(self, row: Row, made_from: str) -> None:
        """Wait for the next result, and fill in its row."""
        started = time.perf_counter()
        result = next(self.results)
        self.seconds += time.perf_counter() - started
        if isinstance(result, Failed):
            row.error = str(result.error) or repr(result.error)
        else:
            row.kept_energy, row.made_from = result.total_energy, made_from
            self.done.append(row)
        for each in self.done:
            each.seconds = self.seconds / len(self.done)


def _score(row: Row, evaluation: Evaluation) -> None:
    row.evaluate = evaluation.text
    try:
        row.metrics = evaluation.measure(row.folder)
        row.score, row.error = evaluation.goal.score(row.metrics), ""
    except MergeError as error:
        row.error = str(error)


def _plot(outcome: SweepResult) -> None:
    if find_spec("matplotlib") is None:
        warnings.warn(f"{PLOT}: not drawn, needs matplotlib: pip install matplotlib", stacklevel=2)
        return
    from merge_engine.sweeps.plot import draw

    draw(outcome, outcome.output / PLOT)
