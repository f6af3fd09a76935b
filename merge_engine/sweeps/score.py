"""How a merged adapter is scored: a program or a function measures its folder, and a goal makes the score of that."""

import contextlib
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import IO, Any

from merge_engine.errors import MergeError, RecipeError
from merge_engine.sweeps.goal import Goal, parse_metrics
from merge_engine.sweeps.readings import Metrics, metrics_matched, metrics_of, metrics_printed, metrics_written

TAIL = 1 << 20  # bytes of an output that are kept, the last ones
LEFT_BEHIND = 5.0  # seconds for which what a program has started may still write, when the program has ended


@dataclass(frozen=True)
class Evaluation:
    """How a merged adapter is scored.

    text: its name in the table; figures under another text do not count.
    measure: folder -> {metric: number}; raises MergeError if there is none. goal: what makes the score of them.
    """

    text: str
    measure: Callable[[Path], Metrics]
    goal: Goal = field(default_factory=Goal)

    def score(self, folder: Path) -> float:
        """The score of a folder. Raises MergeError where there is none."""
        return self.goal.score(self.measure(folder))


def command(
    text: str,
    timeout: float | None = None,
    *,
    goal: Goal | None = None,
    pattern: str | None = None,
    results: str | None = None,
) -> Evaluation:
    """Measure by a program: ``{path}`` in its arguments is the folder. It prints its metrics, or writes them.

    The text is split into words as a shell would, but no shell runs it: a path with spaces stays one argument.
    timeout: in seconds. What is printed is read as `readings.metrics_printed` says; pattern: a regular expression with
    named groups, to read it by instead. results: a file, or a folder of lm-eval's, that the program writes; ``{path}``
    in it is the folder. Raises RecipeError for a text without ``{path}``, a program that does not exist, and a pattern
    without named groups.
    """
    try:
        words = shlex.split(text)
    except (ValueError, AttributeError) as error:
        raise RecipeError(f"evaluate: cannot be split into words: {error}, got {text!r}") from error
    if not any("{path}" in word for word in words):
        raise RecipeError(f"evaluate: wanted a command with {{path}} in it, got {text!r}")
    if "{path}" not in words[0] and shutil.which(words[0]) is None:
        raise RecipeError(f"evaluate: there is no program {words[0]}")
    number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if timeout is not None and not (number and 0 < timeout < math.inf):
        raise RecipeError(f"timeout: wanted seconds above 0, got {timeout!r}")
    if pattern is not None and results is not None:
        raise RecipeError("pattern: wanted one way to read an evaluation, got pattern and results")
    compiled = None if pattern is None else _compiled(pattern)
    ways = "".join(f" [{name} {value}]" for name, value in (("pattern", pattern), ("results", results)) if value)

    def measure(folder: Path) -> Metrics:
        started = time.time()
        printed = _printed(words, folder.absolute(), timeout)
        if results is not None:
            place = Path(results.replace("{path}", str(folder.absolute())))
            return metrics_written(place, since=started - 0.02)  # file systems round times to their clock's ticks
        return metrics_printed(printed) if compiled is None else metrics_matched(compiled, printed)

    return Evaluation(f"{text}{ways}", measure, goal or Goal())


def function(call: Callable[[Any], Any], goal: Goal | None = None, text: str | None = None) -> Evaluation:
    """Measure by a function of the folder, which returns a number, a table of numbers, or a path of lm-eval's results.

    text: its name in the table; default: that of the function. An error that it raises becomes a MergeError.
    """
    if not callable(call):
        raise RecipeError(f"evaluate: wanted a function or a command, got {call!r}")
    name = text or f"{getattr(call, '__module__', '')}.{getattr(call, '__qualname__', type(call).__qualname__)}"

    def measure(folder: Path) -> Metrics:
        try:
            value = call(folder)
        except MergeError:
            raise
        except Exception as error:
            raise MergeError(f"evaluate: {type(error).__name__}: {' '.join(str(error).split())}") from error
        return metrics_written(Path(value)) if isinstance(value, str | os.PathLike) else metrics_of(value)

    return Evaluation(name, measure, goal or Goal())


def evaluation_of(
    evaluate: str | Callable[[Any], Any],
    *,
    metric: str | Sequence[str] | Mapping[str, float] = (),
    combine: str = "mean",
    best: str = "highest",
    timeout: float | None = None,
    pattern: str | None = None,
    results: str | None = None,
) -> Evaluation:
    """An evaluation by a command or a function, with the words of the command line and of recipe files.

    metric: names or patterns, each optionally with ``=WEIGHT``, or {name: weight}.
    Raises RecipeError for what the command line refuses, and for options of commands with a function.
    """
    named = [metric] if isinstance(metric, str) else metric
    if not isinstance(named, Mapping | list | tuple):
        raise RecipeError(f"metric: wanted names, got {metric!r}")
    goal = Goal(named if isinstance(named, Mapping) else parse_metrics(named), combine, best)
    if isinstance(evaluate, str):
        return command(evaluate, timeout, goal=goal, pattern=pattern, results=results)
    for name, value in {"timeout": timeout, "pattern": pattern, "results": results}.items():
        if value is not None:
            raise RecipeError(f"{name}: only applies to a command; got a function to evaluate with")
    return function(evaluate, goal)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern, re.MULTILINE)
    except re.error as error:
        raise RecipeError(f"pattern: {pattern!r} is no regular expression: {error}") from error
    if not compiled.groupindex:
        raise RecipeError(f"pattern: wanted a named group for each metric, as (?P<acc>\\S+), got {pattern!r}")
    return compiled


def _printed(words: Sequence[str], folder: Path, timeout: float | None) -> str:
    """What the program prints, the last `TAIL` bytes. Raises MergeError if it fails, or is not done in time."""
    arguments = [word.replace("{path}", str(folder)) for word in words]
    try:
        # In a session of its own, so that every process that the program starts can be stopped with it.
        process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    except OSError as error:
        raise MergeError(f"evaluate: {arguments[0]} cannot be run: {error.strerror}") from error
    assert process.stdout is not None and process.stderr is not None
    tails = _Tail(process.stdout), _Tail(process.stderr)
    finished = False
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout)
            finished = True
        for tail in tails if finished else ():  # what the program left behind may still hold its output open
            tail.join(LEFT_BEHIND)
    finally:
        if not finished or any(tail.is_alive() for tail in tails):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for tail in tails:  # one that a process in another session holds open is never read to its end
                tail.join(LEFT_BEHIND)
    if not finished:
        raise MergeError(f"evaluate: not done in {timeout:g} s")
    printed, errors = (tail.text() for tail in tails)
    if process.returncode != 0:
        lines = errors.strip().splitlines()
        raise MergeError(f"evaluate: exit status {process.returncode}" + (f": {lines[-1].strip()}" if lines else ""))
    return printed


class _Tail(Thread):
    """Reads a pipe to its end, and keeps the last `TAIL` bytes."""

    def __init__(self, pipe: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self.pipe, self.kept, self.cut = pipe, bytearray(), False
        self.start()

    def run(self) -> None:
        with self.pipe:
            while block := self.pipe.read1(1 << 16):  # type: ignore[attr-defined]
                self.kept += block
                if len(self.kept) > 2 * TAIL:
                    del self.kept[:-TAIL]
                    self.cut = True

    def text(self) -> str:
        """What was read; of an output that was cut, from its first whole line on."""
        kept = bytes(self.kept)
        return (kept.partition(b"\n")[2] if self.cut else kept).decode(errors="replace")
