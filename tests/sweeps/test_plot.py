"""The plot of a sweep."""

import pytest

from merge_engine.report.charts import NAMED
from merge_engine.rules.methods import METHODS
from merge_engine.sweeps.plot import best_axis, draw, lines_of
from merge_engine.sweeps.table import Row, SweepResult
from merge_engine.sweeps.trials import Trial

pytest.importorskip("matplotlib")


def outcome_of(tmp_path, scores, choose="highest"):
    """Rows of {told as a tuple of items: score}."""
    rows = [
        Row(Trial(str(told), dict(told), {}, ()), tmp_path / str(number), score=score)
        for number, (told, score) in enumerate(scores.items())
    ]
    return SweepResult(tmp_path, rows, choose, list(dict.fromkeys(name for told in scores for name, _ in told)))


@pytest.mark.quick
def test_the_axis_and_the_lines_by_hand(tmp_path):
    scores = {
        (("method", "linear"), ("scale", 2)): 5.0,
        (("method", "linear"), ("scale", 1)): 1.0,
        (("method", "ties"), ("density", 0.1), ("scale", 1)): 2.0,
        (("method", "ties"), ("density", 0.2), ("scale", 1)): 2.5,
        (("method", "ties"), ("density", 0.1), ("scale", 2)): 3.0,
    }
    outcome = outcome_of(tmp_path, scores)
    assert best_axis(outcome.rows, outcome.axes) == "scale"  # both have two values: 2.2 apart along scale, 0 and 0.5
    assert lines_of(outcome.rows, outcome.axes, "scale") == {
        "linear": [(1.0, 1.0), (2.0, 5.0)],
        "ties, density 0.1": [(1.0, 2.0), (2.0, 3.0)],
        "ties, density 0.2": [(1.0, 2.5)],
    }
    assert lines_of(outcome.rows[:1], outcome.axes, "density") == {"linear, scale 2": 5.0}
    three = outcome_of(tmp_path, {**scores, (("method", "ties"), ("density", 0.3), ("scale", 1)): 2.0})
    assert best_axis(three.rows, three.axes) == "density"
    assert best_axis(outcome.rows[:1], outcome.axes) is None
    ranks = outcome_of(tmp_path, {(("rank", 8),): 1.0, (("rank", 16),): 2.0, (("rank", "auto"),): 3.0})
    assert lines_of(ranks.rows, ["rank"], "rank") == {"": [(8.0, 1.0), (16.0, 2.0)], "rank auto": 3.0}


def test_plots_of_every_kind_are_drawn(tmp_path):
    many = {(("seed", s), ("scale", x)): s * x for s in range(NAMED + 5) for x in (0.0, 0.5, *range(1, NAMED + 6))}
    sparse = {(("method", "linear"),): 1.0, **{(("method", "ties"), ("density", d)): d for d in (0.01, 0.1, 0.2)}}
    bars = {(("method", name),): -float(number) for number, name in enumerate(METHODS)}
    ranks = {(("rank", 8),): 1.0, (("rank", 16),): 2.0, (("rank", "auto"),): 3.0}
    for number, scores in enumerate([many, sparse, bars, ranks]):
        draw(outcome_of(tmp_path, scores, ["highest", "lowest"][number % 2]), tmp_path / f"{number}.png")
    pictures = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    assert len(pictures) == 4 and all(picture.startswith(b"\x89PNG") for picture in pictures)
