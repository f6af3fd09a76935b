"""What a search is for: which metrics make the score, how, and whether it should be high or low."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from merge_engine.errors import MergeError, RecipeError
from merge_engine.sweeps.readings import SCORE, Metrics

BEST: dict[str, Callable[..., Any]] = {"highest": max, "lowest": min}
COMBINE = ("mean", "worst")


@dataclass(frozen=True)
class Goal:
    """score = sum_k w_k m_k / sum_k w_k of the chosen metrics m ("mean"), or the worst of them ("worst").

    metrics: {name, or pattern as ``*/acc``: weight}. Empty: the only metric there is (standard errors and aliases do
        not count), or the one named "score".
    best: "highest" or "lowest"; the worst metric is the lowest then, or the highest.
    Raises RecipeError for an unknown word, and for weights that are no positive numbers.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    combine: str = "mean"
    best: str = "highest"

    def __post_init__(self) -> None:
        if self.best not in BEST:
            raise RecipeError(f"best: wanted one of {', '.join(BEST)}, got {self.best!r}")
        if self.combine not in COMBINE:
            raise RecipeError(f"combine: wanted one of {', '.join(COMBINE)}, got {self.combine!r}")
        for name, weight in self.metrics.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
                raise RecipeError(f"metric: {name}: wanted a weight above 0, got {weight!r}")

    def score(self, metrics: Metrics) -> float:
        """The score of an evaluation's metrics. Raises MergeError where a metric is missing, unclear or not finite."""
        chosen = self._chosen(metrics)
        for name in chosen:
            if not math.isfinite(metrics[name]):
                got = "several values" if math.isnan(metrics[name]) else "an infinite one"
                raise MergeError(f"evaluate: wanted a finite number as {name}, got {got}, or NaN")
        if self.combine == "worst":
            worst = min if self.best == "highest" else max
            return worst(metrics[name] for name in chosen)
        if len(chosen) == 1:
            return metrics[next(iter(chosen))]
        return math.fsum(weight * metrics[name] for name, weight in chosen.items()) / math.fsum(chosen.values())

    def _chosen(self, metrics: Metrics) -> dict[str, float]:
        """{metric: weight}."""
        if not self.metrics:
            able = [name for name in metrics if "stderr" not in name and not name.endswith("sample_len")]
            if SCORE in metrics or len(able) == 1:
                return {SCORE if SCORE in metrics else able[0]: 1.0}
            raise MergeError(f"evaluate: wanted --metric with one or more of {_some(able)}; nothing says which counts")
        chosen: dict[str, float] = {}
        for pattern, weight in self.metrics.items():
            found = [pattern] if pattern in metrics else [name for name in metrics if fnmatchcase(name, pattern)]
            if not found:
                raise MergeError(f"evaluate: wanted the metric {pattern}, got {_some(list(metrics))}")
            chosen |= dict.fromkeys(found, weight)
        return chosen


def parse_metrics(texts: Sequence[str]) -> dict[str, float]:
    """["arc/acc", "code/pass=2"] -> {"arc/acc": 1.0, "code/pass": 2.0}. Raises RecipeError for a name given twice."""
    found: dict[str, float] = {}
    for text in texts:
        name, equals, weight = str(text).rpartition("=")
        if not equals:
            name, weight = weight, "1"
        try:
            number = float(weight)
        except ValueError:
            raise RecipeError(f"metric: wanted NAME or NAME=WEIGHT, got {text!r}") from None
        if not name or name in found:
            raise RecipeError(f"metric: wanted each name once, got {text!r}")
        found[name] = number
    return found


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"
