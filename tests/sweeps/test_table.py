"""sweep.csv: what it knows of earlier runs."""

import shutil

import pytest
from sweeps import Scores, assert_same, rows_of, save_lora

from merge_engine.engine.output import Output
from merge_engine.errors import OutputError
from merge_engine.sweeps.run import run
from merge_engine.sweeps.trials import sweep_trials


def everything(output):
    return {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}


@pytest.mark.quick
def test_a_folder_of_another_recipe_is_refused_by_name(three, tmp_path, merged):
    output = tmp_path / "out"
    run(three, output, sweep_trials({"scale": [1, 2]}, {"density": 0.3}, 3))
    before = everything(output)
    changed = sweep_trials({"scale": [2, 3]}, {"density": 0.6}, 3)
    message = f"^{output / 'scale=2'} already exists, made with density 0.3, wanted 0.6; pass overwrite to replace it$"
    with pytest.raises(OutputError, match=message):
        run(three, output, changed)
    assert everything(output) == before
    merged.clear()
    run(three, output, changed, overwrite=True)
    assert merged == ["scale=2", "scale=3"]
    assert list(rows_of(output)) == ["scale=2", "scale=3", "scale=1"]  # the old grid's row stays
    assert_same(output / "scale=2", three, density=0.6, scale=2)
    assert_same(output / "scale=1", three, density=0.3)


def test_a_folder_of_other_adapters_is_refused_by_name(three, tmp_path, merged):
    output, trials = tmp_path / "out", sweep_trials({"scale": [1, 2]}, {}, 3)
    run(three, output, trials, evaluation=Scores()())
    save_lora(three[1], 99)
    before = everything(output)
    with pytest.raises(OutputError, match=f"^{output / 'scale=1'} already exists, made of other adapters \\(chat\\); "):
        run(three, output, trials)
    assert everything(output) == before
    shutil.copytree(three[1], tmp_path / "moved" / "chat")
    scores = Scores(lambda _: 3.0)
    run([three[0], tmp_path / "moved" / "chat", three[2]], output, trials, evaluation=scores(), overwrite=True)
    assert scores.asked == ["scale=1", "scale=2"]  # the old adapters' scores are not the new ones'
    assert_same(output / "scale=2", three, scale=2)
    merged.clear()
    run(three, output, trials)  # the same bytes elsewhere are the same adapter
    assert merged == []
    (output / "sweep.csv").unlink()
    with pytest.raises(OutputError, match=r"and sweep\.csv does not say of which adapters; pass overwrite"):
        run(three, output, trials)


def test_a_failed_replacement_is_not_taken_for_done(three, tmp_path):
    """An old folder beside a row of new adapters would look complete."""
    output, trials = tmp_path / "out", sweep_trials({"scale": [1]}, {"method": "linear"}, 3)
    run(three, output, trials)
    save_lora(three[1], 99)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Output, "add", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run(three, output, trials, overwrite=True)
    with pytest.raises(OutputError, match="does not say of which adapters"):
        run(three, output, trials)
    run(three, output, trials, overwrite=True)
    assert_same(output / "scale=1", three, method="linear")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,folder\n1,2\n", "wanted the table of a sweep, got one without kept_energy, seconds, score"),
        ("", "wanted the table of a sweep, got one without folder, kept_energy"),
        ("\xff", "cannot be read: "),
    ],
)
def test_a_table_that_is_none(three, tmp_path, text, message):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.csv").write_text(text, encoding="latin-1")
    with pytest.raises(OutputError, match=rf"sweep\.csv: {message}"):
        run(three, tmp_path / "out", sweep_trials({"scale": [1]}, {}, 3))


def test_metrics_are_columns_and_another_goal_needs_no_new_measurement(three, tmp_path):
    output, trials = tmp_path / "out", sweep_trials({"scale": [1, 2]}, {"method": "linear"}, 3)
    figures = {"scale=1": {"acc": 0.1, "loss": 9.0, "seconds": 5.0, "score": 2.0, "bad": float("nan")}}
    figures["scale=2"] = {"acc": 0.3, "loss": 7.5, "seconds": 6.0, "score": 1.0}
    scores = Scores(lambda folder: figures[folder.name])
    outcome = run(three, output, trials, evaluation=scores(metrics={"acc": 1.0}))
    assert outcome.best().trial.name == "scale=2"
    rows = rows_of(output)
    assert [rows[name]["acc"] for name in figures] == ["0.1", "0.3"]
    assert [rows[name]["score"] for name in figures] == ["0.1", "0.3"]
    assert [rows[name]["seconds (metric)"] for name in figures] == ["5.0", "6.0"]
    assert [rows[name]["score (metric)"] for name in figures] == ["2.0", "1.0"]
    assert "loss" in outcome.table().splitlines()[0] and "bad" not in rows["scale=1"]
    scores.asked.clear()
    goal = {"metrics": {"loss": 1.0, "seconds": 1.0}, "best": "lowest"}
    again = run(three, output, trials, evaluation=scores(**goal))
    assert scores.asked == [] and [row.score for row in again.rows] == [7.0, 6.75]
    assert again.best().trial.name == "scale=2" and again.rows[0].metrics["score"] == 2.0
    missing = run(three, output, trials, evaluation=scores(metrics={"f1": 1.0}))
    assert scores.asked == ["scale=1", "scale=2"] and "wanted the metric f1, got acc, loss" in missing.rows[0].error
    scores.asked.clear()
    found = run(three, output, trials, evaluation=scores(metrics={"loss": 1.0}))  # what was measured then is not lost
    assert scores.asked == [] and [row.score for row in found.rows] == [9.0, 7.5] and not found.failed
