"""merge-engine search."""

import pytest
from command_line import run_cli


def test_the_command_searches_and_goes_on(three, tmp_path, capsys):
    pytest.importorskip("optuna")
    script = 'sh -c \'grep -o "\\"gain\\": [0-9.]*" "$1/merge_report.json" | tr -d "\\""\' name {path}'
    command = ["search", *three, "-o", tmp_path / "out", "--evaluate", script, "--minimize"]
    command += ["--vary", "gain=1,2,3", "--fixed", "method=linear", "rank=3", "--sampler", "random"]
    code, out, err = run_cli(capsys, *command, "--trials", 6)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "the best 6 of 6 trials:" and lines[1].split() == [
        "trial",
        "gain",
        "kept",
        "energy",
        "seconds",
        "score",
    ]
    assert (
        lines[2].split()[:2] == ["0", "1"] and lines[2].split()[-1] == "1" and "recipe.yaml (repeats it)" in lines[-1]
    )
    code, out, err = run_cli(capsys, *command, "--trials", 7)
    assert code == 0 and out.startswith("the best 7 of 7 trials:")
    assert run_cli(capsys, "merge", tmp_path / "out" / "recipe.yaml", "-o", tmp_path / "again")[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "evaluate: wanted a command that scores a merge (--evaluate), got none"),
        (["--evaluate", "cat {path}", "--vary", "gain"], "--vary: wanted FIELD=LOW..HIGH"),
        (["--evaluate", "cat {path}", "--fixed", "rank=1,2"], "--fixed: rank: wanted one value, got 2"),
        (["--evaluate", "cat {path}", "--groups", "kind"], "--groups: wanted 'kinds', or a whole number of"),
        (["--evaluate", "cat {path}", "--metric", "a=b"], "--metric: wanted NAME or NAME=WEIGHT"),
    ],
)
def test_mistakes_on_the_command_line(three, tmp_path, capsys, options, message):
    code, out, err = run_cli(capsys, "search", *three, "-o", tmp_path / "out", *options)
    assert (code, out) == (2, "") and err.startswith(f"merge-engine: error: {message}") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
