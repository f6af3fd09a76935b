"""merge-engine merge with --sweep, or with the merges of a recipe file."""

import json

import pytest
import yaml
from command_line import run_cli
from sweeps import assert_same

from merge_engine.sweeps import run as sweep_run


def test_the_command_sweeps_and_goes_on(three, tmp_path, capsys):
    output = tmp_path / "my out"
    script = "sh -c 'case \"$1\" in *scale=2*) exit 4;; *=0.5) echo 0.8;; *) echo half 50%;; esac' name {path}"
    options = ["--method", "linear", "--sweep", "scale=0.5,1,2", "density=0.1,0.2", "--evaluate", script]
    code, out, err = run_cli(capsys, "merge", *three, "-o", output, *options)
    assert code == 1
    assert [line.split()[0] for line in out.splitlines()] == ["scale", "0.5", "1", "2"]
    assert out.splitlines()[1].endswith("0.8") and out.splitlines()[2].endswith("50  <- best")
    failed = "  scale=2: evaluate: exit status 4\n"
    assert err == f"merge-engine: 1 of 3 failed; run the command again to retry them:\n{failed}"
    assert_same(output / "scale=0.5", three, method="linear", scale=0.5)
    options[-1] = script.replace("exit 4", "echo 99")
    code, out, err = run_cli(capsys, "merge", *three, "-o", output, *options)
    assert (code, err) == (0, "") and out.splitlines()[3].endswith("99  <- best")


def test_a_recipe_file_with_a_sweep(three, tmp_path, capsys):
    recipe = {
        "adapters": list(map(str, three)),
        "output": str(tmp_path / "out"),
        "density": 0.3,
        "sweep": {"weights": [[2, 1, 1], [1, 1, 1]], "scale": [1, 2]},
        "evaluate": "sh -c 'echo 1' {path}",
        "best": "lowest",
        "timeout": 60,
        "memory": "3GB",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert run_cli(capsys, "merge", tmp_path / "recipe.yaml")[0] == 0
    assert_same(tmp_path / "out" / "weights=2_1_1,scale=2", three, density=0.3, weights=[2, 1, 1], scale=2)
    # the command line comes before the file, also where it sweeps what the file fixes
    options = ["-o", tmp_path / "two", "--sweep", "density=0.5,0.6"]
    assert run_cli(capsys, "merge", tmp_path / "recipe.yaml", *options)[0] == 0
    assert {path.name for path in (tmp_path / "two").glob("d*")} == {"density=0.5", "density=0.6"}


def test_metrics_on_the_command_line_and_in_a_file(three, tmp_path, capsys):
    told = {"=1": {"a": 1, "b": 9}, "=2": {"a": 2, "b": 3}}
    for end, metrics in told.items():
        (tmp_path / f"told{end}").write_text(json.dumps(metrics))
    script = f"sh -c 'cat \"{tmp_path}/told=${{1##*=}}\"' name {{path}}"
    command = ["merge", *three, "-o", tmp_path / "out", "--sweep", "scale=1,2", "--evaluate", script]
    code, out, err = run_cli(capsys, *command)
    assert code == 1 and "wanted --metric with one or more of a, b" in err
    for options, scores in [
        (["--metric", "a", "b=3"], [7, 2.75]),
        (["--metric", "?", "--combine", "worst"], [1, 2]),
        (["--metric", "b", "--minimize"], [9, 3]),
    ]:
        code, out, err = run_cli(capsys, *command, *options)
        rows = [line.split() for line in out.splitlines()]
        assert (code, err) == (0, "") and rows[0][-3:] == ["a", "b", "score"]
        best = max(scores) if "--minimize" not in options else min(scores)
        assert [row[-1] == "best" for row in rows[1:3]] == [score == best for score in scores]
        assert [float(row[5]) for row in rows[1:3]] == scores
    recipe = {"adapters": list(map(str, three)), "output": str(tmp_path / "out"), "sweep": {"scale": [1, 2]}}
    recipe |= {"evaluate": script, "metric": {"a": 1, "b": 3}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, out, err = run_cli(capsys, "merge", tmp_path / "recipe.yaml")
    assert code == 0 and out.splitlines()[1].endswith("7  <- best")


def test_a_recipe_file_with_merges(three, tmp_path, capsys):
    recipe = {
        "adapters": {"s": str(three[0]), "c": str(three[1]), "a": str(three[2])},
        "output": str(tmp_path / "out"),
        "density": 0.3,
        "merges": [
            {"name": "both", "adapters": ["a", "s"], "weights": [2, 1]},
            {"name": "all", "method": "linear"},
        ],
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    code, out, err = run_cli(capsys, "merge", tmp_path / "recipe.yml", "--seed", "3")
    assert (code, err) == (0, "")
    assert "a+s" in out and "s+c+a" in out
    assert_same(tmp_path / "out" / "both", [three[2], three[0]], density=0.3, weights=[2, 1], seed=3)
    assert_same(tmp_path / "out" / "all", three, method="linear", density=0.3, seed=3)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--evaluate", "cat {path}"], "evaluate: only applies to a sweep; wanted --sweep with it"),
        (["--memory", "1GB"], "memory: only applies to a sweep"),
        (["--sweep", "scale=1", "--into", "base"], "sweep: makes adapters, not full models; wanted no --into with it"),
        (["--sweep", "scale=1", "--timeout", "3"], "timeout: only applies to an evaluation; wanted --evaluate with it"),
        (["--sweep", "scale=1", "--scale", "3"], "scale: wanted one value of it, or several in the sweep, got both"),
        (["--sweep", "scale=1", "--evaluate", "cat"], "evaluate: wanted a command with {path} in it"),
        (["--sweep", "scale=1", "--memory", "lots"], "memory: wanted a size such as 5GB"),
    ],
)
def test_mistakes_on_the_command_line(three, tmp_path, capsys, options, message):
    code, out, err = run_cli(capsys, "merge", *three, "-o", tmp_path / "out", *options)
    assert (code, out) == (2, "") and err.startswith(f"merge-engine: error: --{message}") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_interrupt_is_one_line(three, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_run, "merge_each", interrupted)
    code, out, err = run_cli(capsys, "merge", *three, "-o", tmp_path / "out", "--sweep", "scale=1,2")
    assert (code, out) == (130, "") and err.startswith("merge-engine: interrupted; ") and err.count("\n") == 1


def test_the_error_of_a_row_names_the_option_as_it_is_typed(three, tmp_path, capsys):
    taken = tmp_path / "out" / "scale=2"
    taken.mkdir(parents=True)
    (taken / "notes.txt").touch()
    code, _, err = run_cli(capsys, "merge", *three, "-o", tmp_path / "out", "--sweep", "scale=1,2", "--overwrite")
    assert code == 1 and "scale=2 holds no model, so --overwrite does not replace it" in err
