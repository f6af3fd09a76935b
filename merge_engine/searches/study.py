"""The file of a search: Optuna's study in SQLite, which several processes share and a killed one resumes from."""

import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from merge_engine.errors import OutputError, RecipeError
from merge_engine.searches.space import Space, Values

STUDY, WORKERS, LOCK = "study.db", ".workers", ".lock"
SAMPLERS = ("tpe", "cmaes", "random")
STOPPED = "stopped"  # of a trial whose process has gone
_NAME, _ABOUT, _WORKER, _STARTED = "merge-engine", "about", "worker", "started"
_FEW = 10  # trials, of which it cannot be said what mattered


def need_optuna() -> None:
    """Raise RecipeError, with what to install, where Optuna is missing."""
    if find_spec("optuna") is None:
        raise RecipeError("search: needs optuna; wanted: pip install 'merge-engine[search]'")


class Study:
    """The trials of a search, shared by all processes that search in one folder.

    A process that dies lets go of a lock, by which the others know that its trial will not end; that trial is begun
    again. about: what the search is of; a study of something else is refused with OutputError.
    """

    def __init__(self, folder: Path, space: Space, about: Mapping[str, Any], highest: bool, sampler: str, seed: int):
        need_optuna()
        make_sampler = _sampler(sampler)
        self.folder, self.space = folder, space
        self.worker, self._storage = uuid4().hex, None
        (folder / WORKERS).mkdir(parents=True, exist_ok=True)
        self._alive = open(folder / WORKERS / self.worker, "wb")
        fcntl.flock(self._alive, fcntl.LOCK_EX)
        try:
            with self.alone(), quiet():
                self._open(json.loads(json.dumps(about)), highest)
                self.study.sampler = make_sampler(self._own_seed(seed))
        except BaseException:
            self.close()
            raise

    def _open(self, about: Any, highest: bool) -> None:
        import optuna
        import sqlalchemy

        url = f"sqlite:///{self.folder / STUDY}"
        self._storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
        sqlalchemy.event.listen(self._storage.engine, "connect", _without_waiting)
        direction: Literal["maximize", "minimize"] = "maximize" if highest else "minimize"
        self.study = optuna.create_study(
            storage=self._storage, study_name=_NAME, direction=direction, load_if_exists=True
        )
        known = self.study.user_attrs.get(_ABOUT)
        if known is None:
            self.study.set_user_attr(_ABOUT, about)
            for values in self.space.sober():
                self.study.enqueue_trial(values)
        elif known != about:
            changed = ", ".join(name for name in about if known.get(name) != about[name])
            raise OutputError(
                f"{self.folder / STUDY}: is of another search, with other {changed}; choose another folder"
            )

    def _own_seed(self, seed: int) -> int:
        """A seed for this process: the same in the first one of each search, and another in every later one."""
        import numpy as np

        number = self.study.user_attrs.get(_STARTED, 0)
        self.study.set_user_attr(_STARTED, number + 1)
        return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])

    def close(self) -> None:
        """Let go: a trial of this process that has not ended counts as stopped."""
        if self._storage is not None:
            self._storage.remove_session()
            self._storage.engine.dispose()
        self._alive.close()
        with suppress(OSError):
            (self.folder / WORKERS / self.worker).unlink()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One process of those that share the folder at a time."""
        with open(self.folder / LOCK, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def ask(self, most: int) -> Any:
        """The next trial, or None: there are as many as wanted, finished or under way."""
        from optuna.trial import TrialState

        with self.alone(), quiet():
            self._give_up_the_dead()
            counted = (TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING)
            trials = [each for each in self.study.get_trials(deepcopy=False) if each.state in counted]
            if sum(not each.user_attrs.get(STOPPED) for each in trials) >= most:
                return None
            trial = self.study.ask()
            trial.set_user_attr(_WORKER, self.worker)
            return trial

    def values(self, trial: Any) -> Values:
        """The values that the sampler suggests for a trial."""

        def span(name: str, low: float, high: float, by_ratio: bool) -> float:
            return float(trial.suggest_float(name, low, high, log=by_ratio))

        def one_of(name: str, choices: list[Any]) -> Any:
            return trial.suggest_categorical(name, choices)

        with quiet():
            return self.space.suggest(span, one_of)

    def known(self, trial: Any) -> tuple[float, dict[str, Any]] | None:
        """The score and attributes of a finished trial with the same parameters, which need not be measured again."""
        from optuna.trial import TrialState

        for each in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if each.params == trial.params:
                return float(each.values[0]), each.user_attrs
        return None

    def trials(self) -> list[Any]:
        """The trials that count, in their order."""
        return [each for each in self.study.get_trials(deepcopy=False) if not each.user_attrs.get(STOPPED)]

    def importances(self) -> dict[str, float]:
        """{parameter that every trial has: how much it matters for being among the best}; empty for few trials."""
        import optuna
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
        from optuna.trial import TrialState

        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if len(done) < _FEW or len({each.values[0] for each in done}) < 2:
            return {}
        with quiet():
            scratch = optuna.create_study(direction=self.study.direction)  # of one moment, while others go on
            scratch.add_trials(done)
            found = get_param_importances(scratch, evaluator=PedAnovaImportanceEvaluator())
        return {name: float(value) for name, value in found.items() if value > 0}

    def trial_folder(self, worker: str | None = None) -> Path:
        """Where this or another process keeps the merge that it scores."""
        return self.folder / WORKERS / f"{worker or self.worker}.trial"

    def _give_up_the_dead(self) -> None:
        """Trials of processes that are no more are stopped, and begun again with the same values."""
        import optuna
        from optuna.trial import TrialState

        for each in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            worker = each.user_attrs.get(_WORKER)
            if worker == self.worker or (worker is not None and self._lives(worker)):
                continue
            optuna.trial.Trial(self.study, each._trial_id).set_user_attr(STOPPED, True)
            self.study.tell(each.number, state=TrialState.FAIL)
            values = each.params or each.system_attrs.get("fixed_params")
            if values:
                self.study.enqueue_trial(values)
            if worker is not None:
                shutil.rmtree(self.trial_folder(worker), ignore_errors=True)

    def _lives(self, worker: str) -> bool:
        try:
            with open(self.folder / WORKERS / worker, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        with suppress(OSError):
            os.unlink(self.folder / WORKERS / worker)
        return False


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna without its log and its warnings of what is experimental."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(level)


def _without_waiting(connection: Any, _: Any) -> None:
    """A commit does not wait for the disk. A killed process loses nothing; a power cut may lose the last trials."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def _sampler(name: str) -> Callable[[int], Any]:
    """seed -> Optuna's sampler of a name."""
    import optuna

    if name not in SAMPLERS:
        raise RecipeError(f"sampler: wanted one of {', '.join(SAMPLERS)}, got {name!r}")
    if name == "tpe":
        return lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
    if name == "random":
        return lambda seed: optuna.samplers.RandomSampler(seed=seed)
    if find_spec("cmaes") is None:
        raise RecipeError("sampler: cmaes needs a package; wanted: pip install 'merge-engine[search]'")
    return lambda seed: optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
