"""Which metrics make the score, by hand."""

import math
import re

import pytest

from merge_engine.errors import MergeError, RecipeError
from merge_engine.sweeps.goal import Goal, parse_metrics

FIGURES = {"arc/acc": 0.5, "arc/acc_stderr": 0.01, "code/pass": 0.2, "sql/acc": 0.9}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("goal", "score"),
    [
        (Goal({"arc/acc": 1.0}), 0.5),
        (Goal({"arc/acc": 1.0, "code/pass": 3.0}), (0.5 + 3 * 0.2) / 4),
        (Goal({"*/acc": 1.0}), 0.7),
        (Goal({"*/acc": 1.0, "code/pass": 1.0}, "worst"), 0.2),
        (Goal({"*/acc": 1.0, "code/pass": 1.0}, "worst", "lowest"), 0.9),
    ],
)
def test_scores(goal, score):
    assert goal.score(FIGURES) == pytest.approx(score, rel=1e-15)


def test_without_names_the_only_metric_counts():
    assert Goal().score({"arc/acc": 0.5, "arc/acc_stderr": 0.01, "arc/sample_len": 7}) == 0.5
    assert Goal().score({"acc": 0.5, "score": 0.7, "loss": 2}) == 0.7
    with pytest.raises(MergeError, match=r"wanted --metric with one or more of arc/acc, code/pass, sql/acc"):
        Goal().score(FIGURES)


def test_metrics_that_are_missing_or_no_number():
    with pytest.raises(MergeError, match=r"wanted the metric mmlu/acc, got arc/acc, arc/acc_stderr"):
        Goal({"mmlu/acc": 1.0}).score(FIGURES)
    for value in (math.nan, math.inf):
        with pytest.raises(MergeError, match="wanted a finite number as acc"):
            Goal().score({"acc": value})
        assert Goal({"f1": 1.0}).score({"acc": value, "f1": 2.0}) == 2


def test_names_and_weights():
    assert parse_metrics(["arc/acc", "code/pass=2.5", "a,b"]) == {"arc/acc": 1, "code/pass": 2.5, "a,b": 1}
    for texts, message in [
        (["a", "a=2"], "metric: wanted each name once, got 'a=2'"),
        (["a=b"], "metric: wanted NAME or NAME=WEIGHT, got 'a=b'"),
        (["=2"], "metric: wanted each name once, got '=2'"),
    ]:
        with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
            parse_metrics(texts)
    for weight in (0.0, -1.0, math.nan, math.inf, True):
        with pytest.raises(RecipeError, match=r"^metric: a: wanted a weight above 0"):
            Goal({"a": weight})
    with pytest.raises(RecipeError, match=r"^combine: wanted one of mean, worst, got 'sum'$"):
        Goal(combine="sum")
