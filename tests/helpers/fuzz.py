"""Hostile input: each case ends in one line and exit code 2 with nothing written, or in the right result.

    python tests/helpers/fuzz.py              every case by hand
    python tests/helpers/fuzz.py 5000 7       and 5000 drawn ones of seed 7
    python tests/helpers/fuzz.py --every 12   every twelfth case by hand
    python tests/helpers/fuzz.py --only NAME  those whose name holds NAME; says what they print

Cases run in a child process, which is started again where one ends it. Each may take 10 seconds of CPU time, and the
child 2 GB beyond what it starts with. It prints a line for each finding and ends with 1 where there are any.
"""

import argparse
import contextlib
import importlib
import io
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from hostile_cases import Case, all_cases
from hostile_drawn import drawn_case
from hostile_toys import INTO, MERGE, check_sum, copy_toys, save_toys

SECONDS, MEMORY = 10, 2 << 30


class TooLongError(BaseException):
    """A case took more than its time."""


def run(cases: Sequence[Case], shown: bool = False) -> list[str]:
    """The findings of some cases, in a child that is started again when one ends it."""
    context, found, start = multiprocessing.get_context("fork"), [], 0
    while start < len(cases):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(theirs, cases[start:], shown))
        child.start()
        theirs.close()
        try:
            while start < len(cases):
                if not ours.poll(60 * SECONDS):
                    child.kill()
                new = ours.recv()
                if new:
                    print(*new, sep="\n", flush=True)
                found += new
                start += 1
        except EOFError:
            child.join()
            found.append(f"{cases[start].name}: ended the process with exit code {child.exitcode}")
            print(found[-1], flush=True)
            start += 1
        child.join()
    return found


def _child(pipe: object, cases: Sequence[Case], shown: bool) -> None:
    import torch

    torch.set_num_threads(1)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")  # of torch, about kinds of tensors that are beta
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, _too_long)
    with tempfile.TemporaryDirectory() as place, mock.patch.multiple(os, fsync=lambda _: None):
        save_toys(toys := Path(place, "toys"))
        expected = _uninterrupted(toys, Path(place))
        for number, case in enumerate(cases):
            pipe.send(_findings(case, toys, Path(place, str(number)), expected, shown))
    os._exit(0)


def _too_long(*_: object) -> None:
    raise TooLongError


def _limit(seconds: int) -> None:
    """So many seconds of CPU time, or 24 times as many where the process waits or is stopped; 0: no limit."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 24 * seconds)


def _uninterrupted(toys: Path, place: Path) -> dict[str, bytes]:
    """The bytes of a merge into the base that nothing disturbs."""
    copy_toys(toys, place / "plain")
    code, _, errors = _command(INTO, place / "plain")
    assert code == 0, errors
    return _bytes(place / "plain" / "out")


def _command(words: Sequence[str], folder: Path) -> tuple[int, str, str]:
    from merge_engine.cli.main import main

    out, errors = io.StringIO(), io.StringIO()
    before = os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            code = main(list(words))
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os.chdir(before)
    return code, out.getvalue(), errors.getvalue()


def _findings(case: Case, toys: Path, folder: Path, expected: dict[str, bytes], shown: bool) -> list[str]:
    """What is wrong with the outcome of a case, in at most one line."""
    copy_toys(toys, folder)
    try:
        case.change(folder)
        before = _state(folder)
        _limit(SECONDS)
        with mock.patch.dict(os.environ, dict(case.environment)):
            code, out, errors = _command(case.words, folder)
        _limit(0)
        if shown:
            print(f"{case.name}: exit code {code}\n{out}{errors}", flush=True)
        wrong = _wrong(case, code, out, errors, before, folder, expected)
    except TooLongError:
        wrong = f"takes more than {SECONDS} s"
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        wrong = (
            f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {' '.join(str(error).split())[:150]}"
        )
        if shown:
            traceback.print_exc()
    finally:
        _limit(0)
        shutil.rmtree(folder, ignore_errors=True)
    return [f"{case.name}: {wrong}"] if wrong else []


def _wrong(
    case: Case, code: int, out: str, errors: str, before: dict[str, object], folder: Path, expected: dict[str, bytes]
) -> str | None:
    lines = [line for line in errors.splitlines() if not line.startswith("merge-engine: warning: ")]
    if any(not letter.isprintable() and letter not in "\n" for letter in out + errors):
        return f"prints raw letters: {ascii(out + errors)[:150]}"
    if case.succeeds is not None and (code == 0) != case.succeeds:
        return f"exit code {code}, wanted {'success' if case.succeeds else 'an error'}: {errors[-200:]!r}"
    if code not in (0, 2) and "sweep" not in case.name and "merges" not in case.name:
        return f"exit code {code}: {errors[-200:]!r}"
    after = _state(folder)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    if code == 2:
        said = [line for line in lines if line.startswith("merge-engine: error: ")]
        if len(said) != 1 or lines[-1] != said[0]:
            return f"wanted one line, got {errors[-300:]!r}"
        # What an earlier run left may be used up, and an old result that it had moved away is put back.
        ours = (".out.partial", "out") if ".out.partial/replaced" in before else (".out.partial",)
        kept = {name for name in changed if name.startswith(ours) and ".out.partial" in before}
        return f"changes {sorted(changed)[:3]}" if changed - kept else None
    if foreign := {name for name in changed if name.split("/")[0] not in ("out", ".out.partial")}:
        return f"changes {sorted(foreign)[:3]}"
    if case.words is INTO and ("working" in case.name or "resumed" in case.name):
        return None if _bytes(folder / "out") == expected else "another result than an uninterrupted run's"
    if case.words is MERGE:
        check_sum(folder)
    return None


def _state(folder: Path) -> dict[str, object]:
    """{name: what lies there}."""
    found: dict[str, object] = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            stat = path.lstat()
            found[str(path.relative_to(folder))] = stat.st_ino, stat.st_size, stat.st_mtime_ns if name in files else 0
    return found


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leave_unfinished(folder: Path, tensors: int) -> None:
    """What a merge into the base leaves that is ended after so many tensors."""
    from merge_engine.into import write

    real, seen = write._write, []

    def ended(*arguments: object) -> int:
        if len(seen) == tensors:
            raise KeyboardInterrupt
        seen.append(1)
        return real(*arguments)

    with mock.patch.object(write, "_write", ended):
        code, _, errors = _command(INTO, folder)
    assert code == 130, errors


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("count", type=int, nargs="?", default=0)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    cases = all_cases()[:: options.every]
    cases += [drawn_case(options.seed, number) for number in range(options.count)]
    cases = [case for case in cases if options.only in case.name]
    for module in ("cli.main", "engine.merge", "into.merge", "models.vocabulary"):
        importlib.import_module(f"merge_engine.{module}")  # before the fork
    found = run(cases, bool(options.only))
    print(f"{len(cases)} cases, {len(found)} findings")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
