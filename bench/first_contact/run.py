"""The first run on a GPU: python -m bench.report --device cuda --first-contact

Environment, all kernels compiled, the self-check, tests marked `gpu`, the timing suite with PEFT beside it: in under
eight minutes, without the network. One file, first_contact_DEVICE.json, is written anew after each step.
"""

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.first_contact.steps import ROOT, Outcome, Step, carried_out

BUDGET = 470.0  # seconds: under eight minutes
TIMING = 90.0  # seconds that the limits of the other steps leave for the timing suite
CHECKED = (  # the names of checks.CHECKS, which only a process of their own imports
    "what merge kept is k",
    "repeated runs give equal bits",
    "select and merge see the same bits",
    "masks of host and device",
    "a stream of the caller's",
    "two devices",
    "out of memory halves",
)


def steps_of(folder: Path) -> list[Step]:
    """What is done, in order. folder: where the timing suite writes."""
    tests = ["pytest", "-q", "-m", "gpu", "--tb=short", "-rf", str(ROOT / "tests" / "kernels")]
    first, *others = CHECKED
    return [
        Step("environment", _part("environment"), 45, _last_line),
        Step("compile all kernels", _part("compile"), 90, _last_line),
        Step(first, _part(first), 40, _last_line),  # it compiles the search once more, as it is launched
        *(Step(name, _part(name), 20, _last_line) for name in others),
        Step("tests marked gpu", lambda seconds: [sys.executable, "-m", *tests], 85, _tests_passed),
        Step("timing suite", lambda seconds: _timing(folder, seconds), BUDGET, lambda printed: _timed(folder)),
    ]


def first_contact(
    output: Path,
    *,
    budget: float = BUDGET,
    make: Callable[[Path], Sequence[Step]] | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Carry out the steps and write the file; 1 if a step did not pass, else 0."""
    output.mkdir(parents=True, exist_ok=True)
    began = datetime.now(timezone.utc).isoformat(timespec="seconds")
    written: list[Path] = []

    def record(so_far: list[Outcome]) -> None:
        last, device = so_far[-1], _device(so_far)
        say(_line(last))
        slug = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
        written[:] = [output / f"first_contact_{slug}.json"]
        failed = [each.name for each in so_far if not each.is_good]
        known = {"device": device, "began": began, "budget": budget, "failed": failed}
        part = written[0].with_suffix(".part")
        part.write_text(json.dumps(known | {"steps": [asdict(each) for each in so_far]}, indent=1) + "\n")
        os.replace(part, written[0])

    with tempfile.TemporaryDirectory() as folder:
        outcomes = carried_out((make or steps_of)(Path(folder)), budget, record)
    failed = [each.name for each in outcomes if not each.is_good]
    say(f"{len(outcomes) - len(failed)} of {len(outcomes)} steps passed; {written[0]} is to be committed")
    return 1 if failed else 0


def _device(outcomes: Sequence[Outcome]) -> str:
    """The device's name: what the first step found."""
    found = outcomes[0].found
    return str(found["device"]) if isinstance(found, dict) and "device" in found else "unknown device"


def _line(outcome: Outcome) -> str:
    text = f"{outcome.outcome}: {outcome.name} ({outcome.seconds:.1f} s)"
    return text if outcome.error is None else f"{text}\n  " + outcome.error.strip().splitlines()[-1]


def _part(name: str) -> Callable[[float], list[str]]:
    return lambda seconds: [sys.executable, "-m", "bench.first_contact.part", name]


def _timing(folder: Path, seconds: float) -> list[str]:
    budget = max(seconds - 15, seconds / 2)  # the start of the process, and the last workload, may take longer
    options = ["--device", "cuda", "--budget", f"{budget:.0f}", "--output", str(folder)]
    return [sys.executable, "-m", "bench.report", *options]


def _timed(folder: Path) -> Any:
    """The report so far."""
    file = folder / "cuda.json"
    return json.loads(file.read_text()) if file.exists() else None


def _last_line(printed: str) -> Any:
    """The JSON of the last line, if it is some."""
    lines = printed.strip().splitlines()
    return json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None


def _tests_passed(printed: str) -> dict[str, Any]:
    """What pytest says at the end, and which tests failed. Raises ValueError if none passed."""
    lines = printed.strip().splitlines()
    summary = lines[-1] if lines else ""
    if not re.search(r"\d+ passed", summary):
        raise ValueError(f"wanted tests that pass, got {summary!r}")
    return {"summary": summary, "failed": [line.split()[1] for line in lines if line.startswith("FAILED ")]}
