"""Hostile input through the command: a part of the cases here, all of them by tests/helpers/fuzz.py."""

import os
import subprocess
import sys

from forks import ROOT
from hostile_cases import all_cases


def test_hostile_input_ends_in_one_line_or_in_the_right_result():
    """Every 25th case by hand, and 40 drawn ones."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "helpers" / "fuzz.py", "40", "0", "--every", "25"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(" cases, 0 findings\n")


def test_there_are_hundreds_of_cases():
    assert len(all_cases()) >= 700
