"""Searches: what they find, go on from, share and refuse."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from sweeps import assert_same, factors_of

import merge_engine
from merge_engine.errors import MergeError, OutputError, RecipeError

optuna = pytest.importorskip("optuna")

SPACE = {"method": ["linear", "ties"], "gain": (0.5, 2.0), "weights": (0.5, 2.0), "density": (0.3, 0.9)}


def gain_of(folder):
    """A score with its highest value at linear, gain 1.5, and metrics beside it."""
    recipe = json.loads((Path(folder) / "merge_report.json").read_text())["recipe"]
    off = abs(recipe["gain"] - 1.5) + (recipe["method"] != "linear")
    return {"acc": 10 - off, "off": off}


def rows_of(folder):
    with open(folder / "trials.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.quick
def test_a_search_finds_the_best_and_repeats_it(three, tmp_path):
    found = merge_engine.search(three, gain_of, tmp_path / "out", space=SPACE, metric="acc", trials=25, progress=False)
    assert len(found.trials) == 25 and not found.failed
    assert [trial.values["method"] for trial in found.trials[:1]] == ["linear"]  # sober, and tsv is not in the space
    assert found.trials[0].recipe["weights"] == [1, 1, 1] and found.trials[0].recipe["scale"] == "auto"
    best = found.best
    assert best.score == max(trial.score for trial in found.trials) > found.trials[0].score
    assert best.values["method"] == "linear" and abs(best.values["gain"] - 1.5) < 0.25
    assert all(("density" in trial.values) == (trial.values["method"] == "ties") for trial in found.trials)
    assert_same(found.best_folder, three, **best.recipe)
    recipe = yaml.safe_load(found.recipe_file.read_text())
    merge_engine.merge(recipe.pop("adapters"), tmp_path / "again", **recipe)
    assert factors_of(tmp_path / "again").keys() == factors_of(found.best_folder).keys()
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == (
        found.best_folder / "adapter_model.safetensors"
    ).read_bytes()
    rows = rows_of(tmp_path / "out")
    assert [float(row["score"]) for row in rows] == [trial.score for trial in found.trials]
    assert [float(row["metric off"]) for row in rows] == [trial.metrics["off"] for trial in found.trials]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("best", "recipe.yaml", "trials.csv", "study.db", ".workers", ".lock"),
        *("history.png", "importances.png", "parallel.png"),
    }
    assert list((tmp_path / "out" / ".workers").iterdir()) == []
    assert found.importances and "the best 10 of 25 trials:" in found.table()


def test_a_search_goes_on_and_refuses_another_one(three, tmp_path):
    asked = []

    def measure(folder):
        asked.append(folder)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return gain_of(folder)

    options = {"space": SPACE, "metric": "acc", "progress": False}
    with pytest.raises(KeyboardInterrupt):
        merge_engine.search(three, measure, tmp_path / "out", trials=8, **options)
    merge_engine.search(three, measure, tmp_path / "out", trials=8, **options)
    assert len(asked) == 9  # the interrupted one twice, no other again
    again = merge_engine.search(three, measure, tmp_path / "out", trials=8, **options)
    assert len(asked) == 9 and len(again.trials) == 8
    more = merge_engine.search(three, measure, tmp_path / "out", trials=10, **options)
    assert len(asked) == 11 and len(more.trials) == 10
    for change, changed in [({"space": {"gain": (0.5, 2.0)}}, "space"), ({"metric": "off"}, "goal")]:
        with pytest.raises(
            OutputError, match=rf"study\.db: is of another search, with other {changed}; choose another"
        ):
            merge_engine.search(three, measure, tmp_path / "out", **options | change)


def test_equal_trials_are_measured_once_and_failures_are_told(three, tmp_path):
    asked = []

    def measure(merged):
        asked.append(merged.plan.recipe.gain)
        if asked[-1] == 2:
            raise MergeError("evaluate: no memory")
        return float(asked[-1])

    found = merge_engine.search(
        three,
        measure,
        tmp_path / "out",
        space={"gain": [1, 2, 3]},
        trials=9,
        in_memory=True,
        progress=False,
        best="lowest",
    )
    assert len(found.trials) == 9 and asked.count(1) == asked.count(3) == 1
    assert found.best.score == 1 and {trial.error for trial in found.failed} == {"evaluate: no memory"}
    assert ", 1 failed:" in found.table() or len(found.failed) > 1
    assert all(trial.score == trial.values["gain"] for trial in found.trials if not trial.error)


def test_mistakes(three, tmp_path):
    for options, message in [
        ({"sampler": "best"}, "sampler: wanted one of tpe, cmaes, random, got 'best'"),
        ({"space": {"gain": 3}}, "space: gain: wanted a list of values"),
        ({"metric": 3}, "metric: wanted names, got 3"),
    ]:
        with pytest.raises(RecipeError, match=f"^{message}"):
            merge_engine.search(three, gain_of, tmp_path / "out", **options)


SCRIPT = """\
import json, sys, time
from pathlib import Path
import merge_engine

def measure(folder):
    recipe = json.loads((Path(folder) / "merge_report.json").read_text())["recipe"]
    with open(sys.argv[1] + ".log", "a") as log:
        log.write(f"{recipe['gain']!r}\\n")
    time.sleep(float(sys.argv[2]))
    return recipe["gain"]

found = merge_engine.search(sys.argv[3:], measure, sys.argv[1], space={"gain": (0.5, 2.0)}, trials=8, progress=False)
print(len(found.trials))
"""


def test_a_killed_search_goes_on_and_two_processes_share_one(three, tmp_path):
    output, log = tmp_path / "out", tmp_path / "out.log"
    environment = {**os.environ, "PYTHONPATH": str(Path(merge_engine.__file__).parent.parent)}

    def started(seconds):
        command = [sys.executable, "-c", SCRIPT, str(output), str(seconds), *map(str, three)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    killed = started(0.3)
    until = time.monotonic() + 300
    while not log.exists() or log.read_text().count("\n") < 3:
        assert killed.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    before = log.read_text().split()
    both = [started(0.3), started(0.3)]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0] and "8\n" in outputs
    asked = log.read_text().split()
    assert len(asked) in (8, 9) and len(set(asked)) == 8  # the killed one again, if it had not ended
    assert asked[: len(before)] == before
    assert len(rows_of(output)) == 8 and list((output / ".workers").iterdir()) == []
