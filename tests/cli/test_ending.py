"""The end of the command's process: nothing that Python does at its end is lost but time."""

import os
import subprocess
import sys

import pytest

# What a user's wrapper may have set up before the command: an exit handler, and a thread that is still at work.
BEFORE = """
import atexit, sys, threading
from merge_engine.cli import ending, main
atexit.register(lambda: print("handler"))
threading.Thread(target=lambda: (threading.main_thread().join(), print("thread"))).start()
ending.os._exit = lambda code, end=ending.os._exit: (print("at once", flush=True), end(code))
print("begun")
sys.argv = ["merge-engine", *sys.argv[1:]]
"""


def ended(code, *arguments, options=()):
    """(exit code, lines of standard output, standard error) of a script."""
    command = [sys.executable, *options, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONUNBUFFERED": ""})
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize(("arguments", "code"), [(["info", "--json", "nothing-here"], 2), (["info", "--system"], 0)])
def test_threads_are_joined_handlers_run_and_streams_flushed(arguments, code):
    found, lines, _ = ended(f"{BEFORE}\nsys.exit(main.command())", *arguments)
    assert found == code
    assert lines[0] == "begun" and lines[-3:] == ["thread", "handler", "at once"]


def test_what_runs_the_command_goes_on_after_it():
    """As a profiler, which prints last, or a program that calls the command."""
    caller = f"{BEFORE}\ndef call():\n    return main.command()\nprint('code', call())"
    found, lines, _ = ended(caller, "info", "nothing-here")
    assert found == 0 and lines[1:] == ["code 2", "thread", "handler"]
    command = [sys.executable, "-m", "cProfile", "-m", "merge_engine", "info", "nothing-here"]
    assert "function calls" in subprocess.run(command, capture_output=True, text=True).stdout


def test_a_reader_that_has_gone_is_no_success():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "merge_engine", "info", "--system"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 141 and done.stderr == ""
