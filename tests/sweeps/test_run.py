"""What becomes of each merge of a sweep, and that the next run goes on from the last one."""

import json
import shutil
import signal

import pytest
from sweeps import Scores, assert_same, rows_of

import merge_engine
from merge_engine.engine.output import Output
from merge_engine.errors import MergeError, RecipeError
from merge_engine.files.weights import StoredTensor
from merge_engine.sweeps.run import run
from merge_engine.sweeps.trials import parse_axes, pool_trials, sweep_trials, text_of


def test_a_sweep_equals_single_merges(three, tmp_path):
    output = tmp_path / "out"
    axes = parse_axes(["method=ties,dare_ties,linear", "density=0.3,0.6", "scale=0.5,2"])
    trials = sweep_trials(axes, {"weights": [2, 1, 1]}, 3)
    scores = {trial.name: float(number) for number, trial in enumerate(trials)}
    outcome = run(three, output, trials, evaluation=Scores(lambda folder: scores[folder.name])())
    assert len(trials) == 10 and not outcome.failed
    assert {path.name for path in output.iterdir()} == {*scores, "sweep.csv", "sweep.png"}
    rows = rows_of(output)
    assert list(rows) == list(scores)
    for trial in trials:
        assert_same(output / trial.name, three, **trial.recipe)
        row, report = rows[trial.name], json.loads((output / trial.name / "merge_report.json").read_text())
        assert float(row["kept_energy"]) == report["energy"]
        assert float(row["score"]) == scores[trial.name] and row["error"] == "" and float(row["seconds"]) > 0
        assert {name: row[name] for name in axes} == {name: text_of(trial.varied.get(name, "")) for name in axes}
    assert outcome.best().trial is trials[-1]
    assert outcome.best(method="ties").trial is trials[3]
    assert (output / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.quick
def test_what_fails_is_told_in_its_row_and_the_rest_goes_on(three, tmp_path, merged):
    def say(folder):
        if "scale=2" in folder.name:
            raise MergeError("evaluate: exit status 1: no memory")
        return 0.5

    trials = sweep_trials(parse_axes(["scale=1,3e38,2,3"]), {"method": "linear"}, 3)
    scores, output = Scores(say), tmp_path / "out"
    outcome = run(three, output, trials, evaluation=scores())
    rows = rows_of(output)
    assert [rows[trial.name]["score"] for trial in trials] == ["0.5", "", "", "0.5"]
    assert "overflows float32" in rows["scale=3e+38"]["error"] and not (output / "scale=3e+38").exists()
    assert rows["scale=2"]["error"] == "evaluate: exit status 1: no memory" and (output / "scale=2").is_dir()
    assert [row.trial.name for row in outcome.failed] == ["scale=3e+38", "scale=2"]
    scores.say, scores.asked = lambda folder: 0.7, []
    merged.clear()
    assert len(run(three, output, trials, evaluation=scores()).failed) == 1
    assert (merged, scores.asked) == (["scale=3e+38"], ["scale=2"])
    assert [row["score"] for row in rows_of(output).values()] == ["0.5", "", "0.7", "0.5"]


def test_lowest_is_best_where_that_is_asked_for(three, tmp_path):
    trials = sweep_trials({"scale": [1, 2, 3]}, {"method": "linear"}, 3)
    scores = {"scale=1": 0.5, "scale=2": -0.5, "scale=3": 0.7}
    outcome = run(three, tmp_path / "out", trials, evaluation=Scores(lambda f: scores[f.name])(best="lowest"))
    marked = [line for line in outcome.table().splitlines() if line.endswith("<- best")]
    assert len(marked) == 1 and marked[0].split()[0] == "2"
    with pytest.raises(RecipeError, match=r"^best: wanted one of highest, lowest, got 'least'$"):
        Scores()(best="least")


def test_the_same_run_again_does_nothing(three, tmp_path, merged):
    trials, output, scores = sweep_trials({"density": [0.3, 0.6]}, {}, 3), tmp_path / "out", Scores()
    run(three, output, trials, evaluation=scores())
    files = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.parent != output}
    table = (output / "sweep.csv").read_bytes()
    merged.clear()
    scores.asked.clear()
    again = run(three, output, trials, evaluation=scores())
    assert (merged, scores.asked) == ([], [])
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.parent != output} == files
    assert (output / "sweep.csv").read_bytes() == table
    assert [row.score for row in again.rows] == [1.0, 1.0]
    run(three, output, trials, evaluation=scores(), overwrite=True)  # it replaces what differs
    assert (merged, scores.asked) == ([], [])
    # without an evaluation scores stay; another evaluation has its own
    assert [row.score for row in run(three, output, trials).rows] == [1.0, 1.0]
    other = Scores(lambda _: 2.0, "other")
    assert [row.score for row in run(three, output, trials, evaluation=other()).rows] == [2.0, 2.0]
    assert merged == []


def test_an_interrupted_evaluation_goes_on(three, tmp_path, merged):
    def say(folder):
        if len(scores.asked) == 3:
            raise KeyboardInterrupt
        return float(len(scores.asked))

    trials, output, scores = sweep_trials({"scale": [1, 2, 3, 4]}, {}, 3), tmp_path / "out", Scores(say)
    with pytest.raises(KeyboardInterrupt):
        run(three, output, trials, evaluation=scores())
    assert [row["score"] for row in rows_of(output).values()] == ["1.0", "2.0", "", ""]
    merged.clear()
    run(three, output, trials, evaluation=scores())
    assert merged == []
    assert scores.asked == ["scale=1", "scale=2", "scale=3", "scale=3", "scale=4"]
    for trial in trials:
        assert_same(output / trial.name, three, **trial.recipe)


def test_an_interrupted_merge_goes_on(three, tmp_path, monkeypatch):
    trials, output = sweep_trials({"density": [0.2, 0.4, 0.6]}, {}, 3), tmp_path / "out"
    calls, add = [], Output.add

    def interrupted(self, *arguments):
        calls.append(self)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return add(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Output, "add", interrupted)
        run(three, output, trials)
    assert not any(path.is_dir() for path in output.iterdir())
    run(three, output, trials)
    for trial in trials:
        assert_same(output / trial.name, three, **trial.recipe)


def test_an_interrupted_replacement_goes_on(three, tmp_path, monkeypatch):
    """A folder that is still the merge of adapters before they changed is not taken for theirs."""
    trials, output = sweep_trials({"density": [0.2, 0.4]}, {}, 3), tmp_path / "out"
    run(three, output, trials)
    shutil.copy(three[1] / "adapter_model.safetensors", three[0])

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Output, "add", interrupted)
        run(three, output, trials, overwrite=True)
    run(three, output, trials, overwrite=True)
    for trial in trials:
        assert_same(output / trial.name, three, **trial.recipe)


DIES = """
import os, signal
from merge_engine.sweeps.table import Table
right, calls = Table.write, []
def write(*arguments):
    calls.append(arguments)
    os.kill(os.getpid(), signal.SIGKILL) if len(calls) == 2 else right(*arguments)
Table.write = write
"""


def test_a_killed_sweep_goes_on(three, tmp_path, merged, forks):
    """Killed when the folders have appeared and before the table says so."""
    output, trials = tmp_path / "out", sweep_trials({"scale": [1, 2, 3]}, {}, 3)
    done = forks.run(["merge", *three, "-o", output, "--sweep", "scale=1,2,3"], first=DIES)
    assert done.codes == [-signal.SIGKILL], done.err
    assert [row["kept_energy"] for row in rows_of(output).values()] == ["", "", ""]
    scores = Scores()
    assert not run(three, output, trials, evaluation=scores()).failed
    assert (merged, scores.asked) == ([], ["scale=1", "scale=2", "scale=3"])
    for trial in trials:
        assert_same(output / trial.name, three, **trial.recipe)


def test_nothing_is_written_where_a_recipe_does_not_fit_the_adapters(three, tmp_path):
    trials = sweep_trials({"weights": [[1, 1, 1], [1, 1]]}, {}, 3)
    with pytest.raises(RecipeError, match="weights: wanted 3, one for each of sql, chat, ads, got 2"):
        run(three, tmp_path / "out", trials)
    assert not (tmp_path / "out").exists()


def test_files_are_read_as_often_for_many_merges_as_for_one(three, tmp_path, monkeypatch):
    """(A table of sweeps reads each file once more, for its digest, and not through the adapter.)"""
    reads, read = [], StoredTensor.read

    def counted(self):
        reads.append(self.key)
        return read(self)

    monkeypatch.setattr(StoredTensor, "read", counted)
    run(three, tmp_path / "one", pool_trials([{"name": "x"}], three, {})[1])
    once, reads[:] = len(reads), []
    merges = [
        {"name": "linear", "method": "linear"},
        {"name": "some", "adapters": ["ads", "sql"]},
        {"name": "dare", "method": "dare_ties", "density": 0.5, "adapters": ["chat", "sql"]},
        {"name": "all", "scale": 2},
    ]
    run(three, tmp_path / "four", pool_trials(merges, three, {})[1])
    assert len(reads) == once > 0


def test_a_sweep_by_a_function(three, tmp_path):
    def measure(folder):
        energy = json.loads((folder / "merge_report.json").read_text())["energy"]
        return {"energy": energy, "size": float((folder / "adapter_model.safetensors").stat().st_size)}

    grid = {"rank": (1, 3), "method": ["linear"]}
    for output in (tmp_path / "out", None):
        outcome = merge_engine.sweep(three, grid, output, evaluate=measure, metric="energy", scale=2.0)
        assert outcome.best().trial.varied == {"rank": 3, "method": "linear"}
        assert outcome.best().metrics.keys() == {"energy", "size"}
        assert outcome.best().folder.is_dir() == (output is not None)
    assert_same(outcome_folder := tmp_path / "out" / "linear,rank=3", three, method="linear", rank=3, scale=2.0)
    assert rows_of(outcome_folder.parent)["linear,rank=1"]["size"] != ""
    least = merge_engine.sweep(three, grid, tmp_path / "out", evaluate=measure, metric="size", best="lowest", scale=2.0)
    assert least.best().trial.varied["rank"] == 1
    for options, message in [
        ({"evaluate": measure, "timeout": 3}, "timeout: only applies to a command"),
        ({"evaluate": measure, "metric": 3}, "metric: wanted names, got 3"),
        ({"evaluate": 3}, "evaluate: wanted a function or a command, got 3"),
    ]:
        with pytest.raises(RecipeError, match=f"^{message}"):
            merge_engine.sweep(three, grid, tmp_path / "new", **options)
