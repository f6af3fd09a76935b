"""Searches: trials are merged by one Session, scored, and told to a study; the best one is written."""

import math
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merge_engine.errors import MergeError
from merge_engine.files.folder import output_path
from merge_engine.files.text import replaced
from merge_engine.formats.adapter import Adapter
from merge_engine.formats.open import open_adapters
from merge_engine.many.session import Session
from merge_engine.report.card import RECIPE_FILE
from merge_engine.searches.result import SearchResult, result_of
from merge_engine.searches.space import make_space
from merge_engine.searches.study import Study, need_optuna
from merge_engine.sweeps.score import Evaluation, evaluation_of
from merge_engine.sweeps.table import digest_of


def search(
    adapters: Sequence[str | Path | Adapter],
    evaluate: str | Callable[[Any], Any],
    output: str | Path,
    *,
    space: Mapping[str, Any] | None = None,
    fixed: Mapping[str, Any] | None = None,
    trials: int = 60,
    groups: int | str = 1,
    sampler: str = "tpe",
    seed: int = 0,
    in_memory: bool = False,
    metric: str | Sequence[str] | Mapping[str, float] = (),
    combine: str = "mean",
    best: str = "highest",
    timeout: float | None = None,
    memory: int | str = "4GB",
    progress: bool | None = None,
    backend: str | None = None,
) -> SearchResult:
    """Search for the recipe with the best score: the first trials are sober defaults, the next ones Optuna's.

    search(["sql", "chat"], accuracy, "found", space={"method": ["tsv"], "gain": (0.5, 2.0), "weights": (0.0, 2.0)})

    evaluate: a command with ``{path}``, or a function of the folder, which returns a number or a table of metrics.
    in_memory: the function gets the `Merged` instead, which is not written.
    output: a folder for the study (SQLite), the table, plots, the best merge and the recipe that repeats it. The same
        call goes on from what is there; processes that call it at the same time share the trials.
    space: {field of a recipe: a list of values, or (lowest, highest)}; weights are one number for each adapter.
        None: `space.DEFAULT`. fixed: fields that all trials have. With neither a scale, it is "auto".
    trials: finished ones, all processes and earlier runs counted. groups: of successive layers, with own weights; or
        "kinds": each kind of module (q_proj, up_proj ...) has a gain of its own.
    sampler: "tpe", "cmaes" or "random". seed: of the sampler. metric, combine, best, timeout: as in `sweep`.
    memory: what this process may hold. An error in a trial is in its row, and counts as a trial.

    Choose by one sample and report on another: the best score of many is too good by chance.
    Raises MergeError before anything is written; RecipeError without Optuna (``merge-engine[search]``).
    """
    evaluation = evaluation_of(evaluate, metric=metric, combine=combine, best=best, timeout=timeout)
    return run(
        adapters,
        evaluation,
        output_path(output),
        space=space,
        fixed=fixed or {},
        trials=trials,
        groups=groups,
        sampler=sampler,
        seed=seed,
        in_memory=in_memory,
        memory=memory,
        progress=progress,
        backend=backend,
    )


def run(
    adapters: Sequence[str | Path | Adapter],
    evaluation: Evaluation,
    output: Path,
    *,
    space: Mapping[str, Any] | None,
    fixed: Mapping[str, Any],
    trials: int,
    groups: int | str = 1,
    sampler: str = "tpe",
    seed: int = 0,
    in_memory: bool = False,
    memory: int | str = "4GB",
    progress: bool | None = None,
    backend: str | None = None,
) -> SearchResult:
    """`search` with an evaluation that is made already."""
    from tqdm import tqdm

    need_optuna()
    opened = open_adapters(adapters)
    modules = sorted({module for adapter in opened for module in adapter.modules})
    over = make_space(space, fixed, [adapter.name for adapter in opened], modules, groups)
    about = {
        "adapters": [digest_of(adapter) for adapter in opened],
        "space": over.describe(),
        "evaluation": evaluation.text,
        "goal": [dict(evaluation.goal.metrics), evaluation.goal.combine, evaluation.goal.best],
    }
    with Session(opened, memory=memory, backend=backend) as session:
        study = Study(output, over, about, evaluation.goal.best == "highest", sampler, seed)
        trying = _Trying(session, study, evaluation, None if in_memory else study.trial_folder() / "merged")
        try:
            hidden = None if progress is None else not progress
            with tqdm(total=trials, initial=len(study.trials()), unit="trial", disable=hidden) as bar:
                while (trial := study.ask(trials)) is not None:
                    trying.one(trial)
                    bar.update()
            return _finish(session, study, evaluation)
        finally:
            trying.clean()
            study.close()


class _Trying:
    """Merges and scores trials, one at a time. folder: where a merge is written to be scored; None: nowhere."""

    def __init__(self, session: Session, study: Study, evaluation: Evaluation, folder: Path | None) -> None:
        self.session, self.study, self.evaluation, self.folder = session, study, evaluation, folder

    def one(self, trial: Any) -> None:
        """Carry out a trial and tell the study what came of it. An interrupt leaves it to be begun again."""
        from optuna.trial import TrialState

        values = self.study.values(trial)
        known = self.study.known(trial)
        if known is not None:
            for name in ("metrics", "merge seconds", "kept energy"):
                trial.set_user_attr(name, known[1].get(name))
            self.study.study.tell(trial, known[0])
            return
        try:
            started = time.perf_counter()
            merged = self.session.merge(self.folder, overwrite=True, **self.study.space.recipe(values))
            merging, started = time.perf_counter() - started, time.perf_counter()
            trial.set_user_attr("merge seconds", merging)
            trial.set_user_attr("kept energy", merged.total_energy)
            metrics = self.evaluation.measure(merged if self.folder is None else self.folder)  # type: ignore[arg-type]
            trial.set_user_attr("metrics", {name: value for name, value in metrics.items() if math.isfinite(value)})
            trial.set_user_attr("evaluation seconds", time.perf_counter() - started)
            self.study.study.tell(trial, self.evaluation.goal.score(metrics))
        except MergeError as error:
            trial.set_user_attr("error", str(error))
            self.study.study.tell(trial, state=TrialState.FAIL)

    def clean(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder.parent, ignore_errors=True)


def _finish(session: Session, study: Study, evaluation: Evaluation) -> SearchResult:
    """Write the best merge, its recipe, the table and the plots."""
    with study.alone():
        outcome = result_of(study, evaluation)
        outcome.write_table()
        if outcome.best is None:
            return outcome
        _write_best(session, outcome, outcome.best.recipe)
        if find_spec("matplotlib") is None:
            warnings.warn("plots: not drawn, need matplotlib: pip install matplotlib", stacklevel=3)
        else:
            from merge_engine.searches.plots import draw

            draw(outcome)
    return outcome


def _write_best(session: Session, outcome: SearchResult, recipe: Mapping[str, Any]) -> None:
    session.merge(outcome.best_folder, overwrite=True, **recipe)
    with replaced(outcome.recipe_file) as partial:
        shutil.copyfile(outcome.best_folder / RECIPE_FILE, partial)
