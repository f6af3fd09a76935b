"""Steps in order, each a process of its own: one that fails, hangs or breaks the device does not stop the next."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LINES = 30  # of what a failed step printed, that are kept
LEAST = 1.0  # seconds: with less left, a step is not begun
# Nothing is downloaded; kernels are compiled, not interpreted.
SETTINGS = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRITON_INTERPRET": "0"}


@dataclass(frozen=True)
class Step:
    """command: of the seconds that it has. limit: at most so many seconds. found: of what it printed, for the file.

    found may be asked for a step that failed, too, and for one that was stopped: it returns None where nothing is.
    """

    name: str
    command: Callable[[float], Sequence[str]]
    limit: float
    found: Callable[[str], Any]


@dataclass(frozen=True)
class Outcome:
    """outcome: "passed", "skipped" (nothing to do here), "failed", "out of time", or "not begun" (no time was left).

    found: what the step says. error: the end of what a step printed that did not pass.
    """

    name: str
    outcome: str
    seconds: float
    found: Any = None
    error: str | None = None

    @property
    def is_good(self) -> bool:
        return self.outcome in ("passed", "skipped")


def carried_out(
    steps: Sequence[Step], budget: float, after_each: Callable[[list[Outcome]], None] = lambda so_far: None
) -> list[Outcome]:
    """The outcomes of all steps, in order, in at most `budget` seconds. after_each: called with those so far."""
    begun, outcomes = time.monotonic(), []
    for step in steps:
        seconds = min(step.limit, budget - (time.monotonic() - begun))
        outcomes.append(_outcome(step, seconds) if seconds >= LEAST else Outcome(step.name, "not begun", 0.0))
        after_each(outcomes)
    return outcomes


def _outcome(step: Step, seconds: float) -> Outcome:
    begun = time.monotonic()
    try:
        code, printed, complaint = _run(step.command(seconds), seconds)
    except OSError as error:
        return Outcome(step.name, "failed", time.monotonic() - begun, error=str(error))
    took = round(time.monotonic() - begun, 2)
    try:
        found = step.found(printed)
    except Exception as error:
        found, complaint = None, f"{complaint}\nits results cannot be read: {type(error).__name__}: {error}"
        code = code or 1
    if code == 0:
        is_skipped = isinstance(found, dict) and "skipped" in found
        return Outcome(step.name, "skipped" if is_skipped else "passed", took, found)
    lines = [*printed.splitlines(), *complaint.splitlines()][-LINES:]
    if code is None:
        lines.append(f"stopped after {seconds:.0f} s")
    error = "\n".join(lines) or f"exit code {code}"
    return Outcome(step.name, "out of time" if code is None else "failed", took, found, error)


def _run(command: Sequence[str], seconds: float) -> tuple[int | None, str, str]:
    """(its exit code, or None if it was stopped, standard output, standard error). Its children end with it."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | SETTINGS,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        printed, complaint = process.communicate(timeout=seconds)
        return process.returncode, printed, complaint
    except BaseException as stopped:
        os.killpg(process.pid, signal.SIGKILL)
        printed, complaint = process.communicate()
        if isinstance(stopped, subprocess.TimeoutExpired):
            return None, printed, complaint
        raise
