"""What a search found: its trials in order, the best one, a table, and where everything is."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_engine.errors import some
from merge_engine.files.text import replaced
from merge_engine.report.card import RECIPE_FILE
from merge_engine.searches.study import STUDY, Study
from merge_engine.sweeps.score import Evaluation
from merge_engine.sweeps.trials import text_of

TABLE, BEST_FOLDER = "trials.csv", "best"
SHOWN = 10  # trials in the printed table


@dataclass(frozen=True)
class Tried:
    """One trial. values: of its parameters. score: None where it failed; `error` says why. seconds: of the merge."""

    number: int
    values: dict[str, Any]
    recipe: dict[str, Any] = field(repr=False)
    score: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    kept_energy: float | None = None
    seconds: float | None = None
    evaluation_seconds: float | None = None
    error: str = ""


@dataclass(frozen=True)
class SearchResult:
    """All trials of a search, in their order. choose: "highest" or "lowest".

    folder: has the study, ``trials.csv``, plots, the best merge in ``best``, and ``recipe.yaml``, which repeats it.
    """

    folder: Path
    trials: list[Tried] = field(repr=False)
    choose: str
    importances: dict[str, float] = field(default_factory=dict)

    @property
    def best(self) -> Tried | None:
        """The trial with the best score, of equal ones the first."""
        scored = [trial for trial in self.trials if trial.score is not None]
        sign = 1 if self.choose == "highest" else -1
        return max(scored, key=lambda trial: sign * (trial.score or 0.0), default=None)

    @property
    def best_folder(self) -> Path:
        """Where the best merge is."""
        return self.folder / BEST_FOLDER

    @property
    def recipe_file(self) -> Path:
        """What repeats the best merge: ``merge-engine merge FOLDER/recipe.yaml -o OUT``."""
        return self.folder / RECIPE_FILE

    @property
    def failed(self) -> list[Tried]:
        """The trials without a score."""
        return [trial for trial in self.trials if trial.error]

    def table(self) -> str:
        """The best trials in columns, best first, and where the results are."""
        scored = [trial for trial in self.trials if trial.score is not None]
        scored.sort(key=lambda trial: trial.score or 0.0, reverse=self.choose == "highest")
        names = list(dict.fromkeys(name for trial in scored[:SHOWN] for name in trial.values))
        header = ["trial", *names, "kept energy", "seconds", "score"]
        rows = [
            [
                str(trial.number),
                *(_short(trial.values[name]) if name in trial.values else "" for name in names),
                "" if trial.kept_energy is None else f"{trial.kept_energy:.4f}",
                "" if trial.seconds is None else f"{trial.seconds:.2f}",
                f"{trial.score:.6g}",
            ]
            for trial in scored[:SHOWN]
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(f"{text:>{width}}" for text, width in zip(row, widths, strict=True)) for row in [header, *rows]
        ]
        count = f"the best {len(rows)} of {some(len(self.trials), 'trial')}"
        failed = f", {len(self.failed)} failed" if self.failed else ""
        return "\n".join([f"{count}{failed}:", *(line.rstrip() for line in lines)])

    def write_table(self) -> None:
        """Write ``trials.csv``: a row for each trial, a column for each parameter and each metric."""
        values = dict.fromkeys(name for trial in self.trials for name in trial.values)
        metrics = dict.fromkeys(name for trial in self.trials for name in trial.metrics)
        columns = ["trial", *values, *(f"metric {name}" for name in metrics)]
        columns += ["kept_energy", "merge_seconds", "evaluation_seconds", "score", "error"]
        with (
            replaced(self.folder / TABLE, fsync=True) as partial,
            open(partial, "w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            for trial in self.trials:
                row: dict[str, Any] = {"trial": trial.number, "error": trial.error}
                row |= {name: text_of(value) for name, value in trial.values.items()}
                row |= {f"metric {name}": repr(value) for name, value in trial.metrics.items()}
                numbers = {
                    "kept_energy": trial.kept_energy,
                    "merge_seconds": trial.seconds,
                    "evaluation_seconds": trial.evaluation_seconds,
                    "score": trial.score,
                }
                writer.writerow(row | {name: "" if value is None else repr(value) for name, value in numbers.items()})

    def where(self) -> str:
        """What the folder has, in a sentence."""
        return (
            f"{self.folder}: {BEST_FOLDER} (the best merge), {RECIPE_FILE} (repeats it), {TABLE}, plots, and {STUDY} "
            f"(optuna-dashboard sqlite:///{self.folder / STUDY})"
        )


def result_of(study: Study, evaluation: Evaluation) -> SearchResult:
    """The trials of a study that have ended."""
    from optuna.trial import TrialState

    tried = []
    for each in study.trials():
        if each.state not in (TrialState.COMPLETE, TrialState.FAIL):
            continue
        about = each.user_attrs
        values = dict(each.params)
        tried.append(
            Tried(
                each.number,
                values,
                study.space.recipe(values),
                each.values[0] if each.state == TrialState.COMPLETE else None,
                about.get("metrics") or {},
                about.get("kept energy"),
                about.get("merge seconds"),
                about.get("evaluation seconds"),
                about.get("error", "" if each.state == TrialState.COMPLETE else "stopped"),
            )
        )
    return SearchResult(study.folder, tried, evaluation.goal.best, study.importances())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else text_of(value)
