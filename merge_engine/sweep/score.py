"""How a merged adapter is scored: a program runs on its folder, and the last number that it prints is the score."""

import contextlib
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_engine.errors import MergeError, RecipeError

_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # colours
_NUMBER = re.compile(r"(?i)(?<![\w.])[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|nan|inf(?:inity)?)(?!\w|\.\d)")


@dataclass(frozen=True)
class Evaluation:
    """How a merged adapter is scored.

    text: its name in the table; a score under another text does not count.
    score: folder -> its score, a finite number; raises MergeError if there is none.
    """

    text: str
    score: Callable[[Path], float]


def command(text: str, timeout: float | None = None) -> Evaluation:
    """Score by a program: ``{path}`` in its arguments is the folder, and the last number that it prints is the score.

    The text is split into words as a shell would, but no shell runs it: a path with spaces stays one argument.
    timeout: in seconds. Raises RecipeError for a text without ``{path}`` and for a program that does not exist.
    """
    try:
        words = shlex.split(text)
    except (ValueError, AttributeError) as error:
        raise RecipeError(f"evaluate: cannot be split into words: {error}, got {text!r}") from error
    if not any("{path}" in word for word in words):
        raise RecipeError(f"evaluate: wanted a command with {{path}} in it, got {text!r}")
    if "{path}" not in words[0] and shutil.which(words[0]) is None:
        raise RecipeError(f"evaluate: there is no program {words[0]}")
    if timeout is not None and not (isinstance(timeout, int | float) and 0 < timeout < math.inf):
        raise RecipeError(f"timeout: wanted seconds above 0, got {timeout!r}")
    return Evaluation(text, lambda folder: _scored(words, folder.absolute(), timeout))


def last_number(printed: str) -> float:
    """The last number in a text: 3, -0.5, 1e-3, 93.5%. A number within a word, as in v2 or 3s, does not count.

    Raises MergeError if there is none, or if it is not finite.
    """
    found = _NUMBER.findall(_ESCAPE.sub("", printed))
    if not found:
        raise MergeError("evaluate: wanted a number on standard output, got none")
    if not math.isfinite(float(found[-1])):
        raise MergeError(f"evaluate: wanted a finite number, got {found[-1]}")
    return float(found[-1])


def _scored(words: Sequence[str], folder: Path, timeout: float | None) -> float:
    arguments = [word.replace("{path}", str(folder)) for word in words]
    try:
        # In a session of its own, so that every process that the program starts can be stopped with it.
        process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    except OSError as error:
        raise MergeError(f"evaluate: {arguments[0]} cannot be run: {error.strerror}") from error
    try:
        printed, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise MergeError(f"evaluate: not done in {timeout:g} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode != 0:
        lines = errors.decode(errors="replace").strip().splitlines()
        raise MergeError(f"evaluate: exit status {process.returncode}" + (f": {lines[-1].strip()}" if lines else ""))
    return last_number(printed.decode(errors="replace"))
