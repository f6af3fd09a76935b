"""Scores: a program or a function measures a folder."""

import contextlib
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from merge_engine.errors import MergeError, RecipeError
from merge_engine.sweeps import score
from merge_engine.sweeps.goal import Goal
from merge_engine.sweeps.score import TAIL, command, function


def test_a_path_with_spaces_is_one_argument(tmp_path):
    folder = tmp_path / "a 'b' \"c\" $d"
    folder.mkdir()
    (folder / "score").write_text("0.5")
    assert command("cat {path}/score").score(folder) == 0.5
    assert command("sh -c 'echo $# \"$1\"; echo $#' name {path} 'b c'").score(folder) == 2


def test_only_the_end_of_a_large_output_is_kept(tmp_path):
    script = (
        "import sys\nfor _ in range(80): print('7 ' * 50_000)\nprint('acc: 0.5')\nsys.stderr.write('x' * 9_000_000)"
    )
    evaluation = command(f"{sys.executable} -c {script!r} {{path}}".replace("\\n", "\n"))
    assert evaluation.score(tmp_path) == 0.5
    assert TAIL < 80 * 100_000  # else this test shows nothing


def test_results_that_a_program_writes(tmp_path):
    text = "sh -c 'mkdir -p $0/eval/m; cp $0/../new.json $0/eval/m/results_1.json; echo 0.1 0.2' {path}"
    (tmp_path / "new.json").write_text(json.dumps({"results": {"mini": {"acc,none": 0.375, "acc_stderr,none": 0.18}}}))
    (tmp_path / "merged").mkdir()
    evaluation = command(text, results="{path}/eval")
    assert evaluation.measure(tmp_path / "merged") == {"mini/acc": 0.375, "mini/acc_stderr": 0.18}
    assert evaluation.score(tmp_path / "merged") == 0.375
    assert evaluation.text != command(text).text  # figures read otherwise are other figures
    old = command("true {path}", results="{path}/eval")
    os.utime(tmp_path / "merged" / "eval" / "m" / "results_1.json", (0, 0))
    with pytest.raises(MergeError, match="got only older ones"):
        old.score(tmp_path / "merged")


def test_a_pattern_reads_what_is_printed(tmp_path):
    evaluation = command(
        "echo acc=0.5 loss=3 {path}", goal=Goal({"loss": 1.0}), pattern=r"acc=(?P<acc>\S+) loss=(?P<loss>\d+)"
    )
    assert evaluation.measure(tmp_path) == {"acc": 0.5, "loss": 3} and evaluation.score(tmp_path) == 3
    for pattern, message in [("(", "is no regular expression"), ("acc=(.*)", "wanted a named group for each metric")]:
        with pytest.raises(RecipeError, match=message):
            command("echo {path}", pattern=pattern)
    with pytest.raises(RecipeError, match="got pattern and results"):
        command("echo {path}", pattern="(?P<a>.)", results="x")


def test_functions(tmp_path):
    assert function(lambda folder: len(folder.name)).score(tmp_path) == len(tmp_path.name)
    assert function(lambda folder: {"a": 1, "b": 2}, Goal({"b": 1.0})).score(tmp_path) == 2
    (tmp_path / "r.json").write_text('{"results": {"mini": {"acc,none": 0.375}}}')
    assert function(lambda folder: folder / "r.json").score(tmp_path) == 0.375

    def fails(folder):
        raise KeyError("no\nmodel")

    assert (
        function(fails).text.endswith("test_functions.<locals>.fails") and function(fails, text="mine").text == "mine"
    )
    with pytest.raises(MergeError, match=r"^evaluate: KeyError: 'no\\nmodel'$"):
        function(fails).score(tmp_path)
    with pytest.raises(RecipeError, match=r"^evaluate: wanted a function or a command, got 3$"):
        function(3)


@pytest.mark.parametrize(
    ("text", "timeout", "message"),
    [
        ("cat x", None, "evaluate: wanted a command with {path} in it, got 'cat x'"),
        ("cat 'x {path}", None, "evaluate: cannot be split into words: No closing quotation"),
        ("", None, "evaluate: wanted a command with {path} in it"),
        (7, None, "evaluate: cannot be split into words"),
        ("no-such-program {path}", None, "evaluate: there is no program no-such-program"),
        ("cat {path}", 0, "timeout: wanted seconds above 0, got 0"),
        ("cat {path}", "5", "timeout: wanted seconds above 0, got '5'"),
    ],
)
def test_mistakes_in_a_command(text, timeout, message):
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}"):
        command(text, timeout)


def test_failures_of_a_command(tmp_path):
    for text, message in [
        ("sh -c 'echo 1; echo why >&2; exit 3' {path}", "evaluate: exit status 3: why"),
        ("sh -c 'kill -9 $$' {path}", "evaluate: exit status -9"),
        ("true {path}", "evaluate: wanted a number on standard output, got none"),
        ("{path}", "evaluate: .* cannot be run: Permission denied"),
    ]:
        with pytest.raises(MergeError, match=f"^{message}$"):
            command(text).score(tmp_path)


def test_a_timeout_stops_all_that_the_command_started(tmp_path):
    with pytest.raises(MergeError, match=r"^evaluate: not done in 0.5 s$"):
        command("sh -c 'sleep 600 & echo $! > \"$0/pid\"; wait' {path}", 0.5).score(tmp_path)
    status = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize("start", ["sleep 600 &", "setsid sleep 600 &"])
def test_a_process_that_is_left_behind_is_not_waited_for(tmp_path, monkeypatch, start):
    monkeypatch.setattr(score, "LEFT_BEHIND", 0.2)
    assert command(f"sh -c '{start} echo $! > \"$0/pid\"; echo 0.5' {{path}}").score(tmp_path) == 0.5
    with contextlib.suppress(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_true_is_no_number_of_seconds():
    with pytest.raises(RecipeError, match="timeout: wanted seconds above 0, got True"):
        command("echo {path}", True)
