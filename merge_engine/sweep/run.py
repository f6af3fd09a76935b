"""Carries out the merges of a sweep or a pool, evaluates each, and keeps the table of what came of them.

``sweep.csv`` in the output folder is all that a run knows of the ones before it. It is rewritten as a whole after every
merge and every score, so the same command goes on from wherever the last one was stopped.
"""

import os
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from merge_engine.engine.output import Merged
from merge_engine.errors import MergeError, OutputError, RecipeError
from merge_engine.formats.adapter import Adapter
from merge_engine.formats.open import open_adapters
from merge_engine.many.merge_many import Failed, merge_many
from merge_engine.sweep.score import Evaluation
from merge_engine.sweep.table import BEST, PLOT, TABLE, Row, SweepResult, Table, difference_from, digest_of
from merge_engine.sweep.trials import Trial


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
) -> SweepResult:
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
    digests = [digest_of(adapter) for adapter in opened]
    made_from = [" ".join(digests[number] for number in trial.adapters) for trial in trials]
    table = Table(output / TABLE)
    rows = [table.row(trial, output / trial.name, evaluation) for trial in trials]
    wanted: list[int] = []
    for number, row in enumerate(rows):
        difference = difference_from(row, made_from[number], [opened[place] for place in row.trial.adapters])
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
    outcome = SweepResult(output, rows, choose, axes)
    if outcome.best() is not None:
        _plot(outcome)
    return outcome


def _plot(outcome: SweepResult) -> None:
    if find_spec("matplotlib") is None:
        warnings.warn(f"{PLOT}: not drawn, needs matplotlib: pip install matplotlib", stacklevel=2)
        return
    from merge_engine.sweep.plot import draw

    draw(outcome, outcome.output / PLOT)
