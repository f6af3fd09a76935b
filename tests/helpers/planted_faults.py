"""Faults that the tests have to notice: each is planted in a copy of the checkout, where the nearest tests must fail.

    python tests/helpers/planted_faults.py [-j COPIES] [--log FILE] [--at PLACE] [FOLDER ...]

FOLDER: some folders of the package; default: all.

Run it by hand after tests were moved or made faster. The faults are in the tables of `planted`. It prints a line a
fault and a count by folder, and ends with 1 where a fault was not seen. A fault whose text is no longer there once is
an error, as are tests that fail without a fault: bring the tables up to date. With a log, a run that was stopped goes
on: what it had seen noticed, by the same row, is not run again. With a place for the copies, the loops that Numba
compiled there serve the next run, too.

The last run, of 29 November 2026, on two cores (AMD EPYC): of 292 faults 288 were noticed and 4 are harmless, as their
rows explain; without faults the same tests pass. Some 55 that no test had noticed before became tests. Rows that came
later were run by hand, each with its tests.
"""

import argparse
import gc
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from planted import FAULTS
from planted.fault import Fault

ROOT = Path(__file__).parents[2]
SECONDS = 900  # after which tests count as hung
NOTICED, MISSED, HARMLESS, ERROR = "noticed", "MISSED", "harmless", "ERROR"
# What nearly all tests import: once here, and not in each of the processes that are forked for the faults.
PRELOADED = ("torch", "triton", "numba", "pytest", "hypothesis", "safetensors.torch", "transformers", "peft")
_LOADED_BEFORE = "ignore:Module already imported so cannot be rewritten"
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - .*)?$", re.MULTILINE)


class Outcome(NamedTuple):
    """What became of a fault; said: what failed, or what is wrong with the table."""

    kind: str
    said: str


def texts_in(root: Path, fault: Fault) -> int:
    """How often the text of a fault is in its file."""
    file = root / fault.file
    return file.read_text().count(fault.text) if file.is_file() else 0


def make_copy(folder: Path) -> Path:
    """A copy of what git has. A file that is there already stays as it is: Numba looks at its time."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content = (ROOT / name).read_bytes()
        if not (folder / name).is_file() or (folder / name).read_bytes() != content:
            (folder / name).write_bytes(content)
    return folder


def put(root: Path, fault: Fault, text: str) -> None:
    """Write the file of a fault in a copy, and remove what Python has compiled of it."""
    file = root / fault.file
    file.write_text(text)
    for compiled in file.parent.glob(f"__pycache__/{file.stem}.*.pyc"):
        compiled.unlink()


def start_tests(root: Path, arguments: Sequence[str], cache: Path) -> int:
    """pytest in a copy, by a process of its own, which prints to the file ``.printed`` there. cache: of Numba."""
    pid = os.fork()
    if pid:
        return pid
    code = 3  # pytest's own for an internal error
    try:
        os.setsid()
        for number, mode in enumerate((os.O_RDONLY, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)):
            os.dup2(os.open(root / ".printed" if number else os.devnull, mode, 0o600), number)
        os.dup2(1, 2)
        os.chdir(root)
        os.environ.update(PYTHONPATH=str(root), NUMBA_CACHE_DIR=str(cache))
        sys.path.insert(0, str(root))
        import numba
        import pytest

        numba.config.reload_config()
        options = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-rfE", "-W", _LOADED_BEFORE]
        code = int(pytest.main([*options, *arguments]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)  # nothing of the parent's is cleaned up here


class Running(NamedTuple):
    """A fault that is planted in a copy, where tests run since a time."""

    fault: Fault
    root: Path
    since: float


def start(root: Path, fault: Fault) -> int | Outcome:
    """Plant a fault in a copy and start its tests: the process; or what is wrong with the table."""
    found = texts_in(root, fault)
    if found != 1:
        return Outcome(ERROR, f"wanted {fault.text!r} once, got it {found} times")
    put(root, fault, (root / fault.file).read_text().replace(fault.text, fault.fault))
    # Numba looks at the time of the file that it compiles, not at those of the files that this one imports.
    cache = root / (".fresh" if fault.folder == "loops" else ".numba")
    shutil.rmtree(root / ".fresh", ignore_errors=True)
    return start_tests(root, shlex.split(fault.tests), cache)


def outcome_of(fault: Fault, code: int, printed: str) -> Outcome:
    """What the end of a fault's tests says."""
    if code == -signal.SIGKILL:
        return Outcome(NOTICED, "the tests hang")
    if code == 0:
        return Outcome(HARMLESS if fault.harmless else MISSED, fault.harmless or f"by {fault.tests}")
    if fault.harmless:
        return Outcome(ERROR, "said to be harmless, and noticed")
    if code < 0:
        return Outcome(NOTICED, f"the tests end by signal {-code}")
    failed = _FAILED.findall(printed)
    if code != 1 or not failed:
        return Outcome(ERROR, f"pytest ends with {code}: {' / '.join(printed.splitlines()[-3:])}")
    return Outcome(NOTICED, failed[0])


def wait(running: dict[int, Running]) -> tuple[Running, int]:
    """One of the processes that has ended, and its exit code; one that takes too long is killed."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            return running.pop(pid), os.waitstatus_to_exitcode(status)
        for late in [pid for pid, each in running.items() if time.monotonic() - each.since > SECONDS]:
            os.killpg(late, signal.SIGKILL)
        time.sleep(0.05)


def settled(log: Path | None) -> dict[Fault, Outcome]:
    """What earlier runs with this log saw noticed, or harmless: a line a fault, its row and its outcome in JSON."""
    lines = log.read_text().splitlines() if log and log.exists() else []
    last = {Fault(*row): Outcome(*outcome) for row, outcome in map(json.loads, lines)}
    return {fault: outcome for fault, outcome in last.items() if outcome.kind in (NOTICED, HARMLESS)}


def run(faults: Sequence[Fault], copies: int, log: Path | None, at: Path | None) -> dict[Fault, Outcome]:
    """The outcome of every fault, printed as they come, and added to the log."""
    known = settled(log)
    outcomes = {fault: known[fault] for fault in faults if fault in known}
    faults = [fault for fault in faults if fault not in known]

    def told(fault: Fault, outcome: Outcome) -> None:
        outcomes[fault] = outcome
        print(f"{outcome.kind:8}  {fault.file}: {fault.why}  [{outcome.said}]", flush=True)
        if log:
            with log.open("a") as lines:
                lines.write(json.dumps([fault, outcome]) + "\n")

    with tempfile.TemporaryDirectory() if at is None else nullcontext(at) as folder:
        free = [make_copy(Path(folder, str(number))) for number in range(copies)]
        sources = {fault.file: (free[0] / fault.file).read_text() for fault in faults if texts_in(free[0], fault)}
        running: dict[int, Running] = {}
        waiting = list(reversed(faults))
        while waiting or running:
            while waiting and free:
                fault, root = waiting.pop(), free.pop()
                started = start(root, fault)
                if isinstance(started, Outcome):
                    told(fault, started)
                    free.append(root)
                else:
                    running[started] = Running(fault, root, time.monotonic())
            if running:
                (fault, root, _), code = wait(running)
                put(root, fault, sources[fault.file])
                told(fault, outcome_of(fault, code, (root / ".printed").read_text(errors="replace")))
                free.append(root)
        for fault, outcome in without_faults(free[0], outcomes).items():
            told(fault, outcome)
    return outcomes


def without_faults(root: Path, outcomes: dict[Fault, Outcome]) -> dict[Fault, Outcome]:
    """Those faults whose tests fail in a copy without them, too."""
    noticed = {each.said for each in outcomes.values() if "::" in each.said}
    if not noticed:
        return {}
    pid = start_tests(root, ["--maxfail=1000", *sorted(noticed)], root / ".numba")
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    wrong = set(_FAILED.findall((root / ".printed").read_text(errors="replace"))) or noticed
    said = "fails without the fault, too"
    return {
        fault: Outcome(ERROR, f"{outcome.said} {said}")
        for fault, outcome in outcomes.items()
        if code and outcome.said in wrong
    }


def main(arguments: list[str]) -> int:
    """Run the faults of some folders; 1 where one was not noticed or could not be planted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="*")
    parser.add_argument("-j", type=int, default=2, dest="copies")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--at", type=Path)
    options = parser.parse_args(arguments)
    faults = [fault for fault in FAULTS if not options.folders or fault.folder in options.folders]
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]  # transformers takes `kernels`
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # or each child would go through all of it
    outcomes = run(faults, options.copies, options.log, options.at)
    kinds = Counter(outcome.kind for outcome in outcomes.values())
    for folder in dict.fromkeys(fault.folder for fault in faults):
        own = Counter(outcomes[fault].kind for fault in faults if fault.folder == folder)
        print(f"{folder:14} {', '.join(f'{count} {kind}' for kind, count in own.items())}")
    print(f"{len(faults)} faults: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}")
    return 1 if kinds[MISSED] or kinds[ERROR] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
