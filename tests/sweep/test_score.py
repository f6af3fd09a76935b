"""Scores: the last number that a program prints."""

import re
from pathlib import Path

import pytest

from merge_engine.errors import MergeError, RecipeError
from merge_engine.sweep.score import command, last_number


@pytest.mark.quick
@pytest.mark.parametrize(
    ("printed", "score"),
    [
        ("3", 3),
        ("score: -0.25\n", -0.25),
        ("loss=1.5e-3", 0.0015),
        ("acc 93.5%", 93.5),
        ("acc 93.5 %.\n\n", 93.5),
        ("(0.1, .5)", 0.5),
        ("Accuracy is 93.", 93),
        ("0.91 in 3.2s on layer2 of v1.5.2", 0.91),
        ("\x1b[32m0.93\x1b[0m", 0.93),
        ("+7E2 nano info", 700),
    ],
)
def test_the_last_number(printed, score):
    assert last_number(printed) == score


@pytest.mark.parametrize("printed", ["", "done", "v2 3s", "0.9 then nan", "1 -inf", "1e999", "Infinity%"])
def test_no_number(printed):
    with pytest.raises(MergeError, match=r"^evaluate: wanted a (finite )?number"):
        last_number(printed)


def test_a_path_with_spaces_is_one_argument(tmp_path):
    folder = tmp_path / "a 'b' \"c\" $d"
    folder.mkdir()
    (folder / "score").write_text("0.5")
    assert command("cat {path}/score").score(folder) == 0.5
    assert command("sh -c 'echo $# \"$1\"; echo $#' name {path} 'b c'").score(folder) == 2


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
