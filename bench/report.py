"""Every benchmark that fits a time budget, into one CSV, one JSON and plots: python -m bench.report [--budget 600]

Workloads run in order of importance (`workloads.WORKLOADS`); one that is not expected to fit into the time that is left
is skipped. Contestants take turns, and nothing is timed before their results agree. --compare OLD.json prints what
changed beyond the spread; --markdown prints tables for a README. mergekit and torch.compile take part only on request.

--only static runs nothing: it compiles the kernels for GPUs that are not here, estimates from their machine code what
they should cost, and writes static_kernels.csv and static_merges.csv.

--device cuda --first-contact checks a GPU that the kernels have not met, then times, in under eight minutes: see
`bench.first_contact.run`.
"""

import argparse
import importlib.util
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bench.first_contact.run import first_contact
from bench.harness import machine
from bench.harness.suite import expected, measured, nbytes_held
from bench.harness.workloads import WORKLOADS, Workload
from bench.kinds.base import PROGRAM
from bench.kinds.deltas import HAS_MERGEKIT
from bench.kinds.table import KINDS
from bench.reporting.compare import compare, machine_differs
from bench.reporting.extrapolated import with_extrapolation
from bench.reporting.files import Report, read, write, write_csv
from bench.reporting.plots import plot
from bench.reporting.tables import headline_table, line_of, markdown, plain_table
from bench.reporting.trends import trends

ENDING = 8.0  # seconds for files and plots
SHARE = 0.4  # of the free memory, for one workload: others use the machine as well
STATIC = "static"
AT_FIRST = 20.0  # how many seconds of evidence the table of expected costs counts as


def run(
    workloads: Sequence[Workload],
    device: str,
    budget: float,
    *,
    asked: tuple[str, ...] = (),
    memory: bool = True,
    save: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Carry out the workloads that fit into `budget` seconds, and print each result; save after every workload."""
    start, guessed, took = time.perf_counter(), 0.0, 0.0
    limits = machine.limits(device)
    report = Report(machine.about(device, limits), [])
    say(", ".join(f"{name} {value}" for name, value in report.about.items()))
    for work in workloads:
        kind = KINDS[work.kind]
        guess = expected(work, kind, device, asked)
        if not guess:
            continue  # no contestant can take part here
        left = budget - ENDING - (time.perf_counter() - start)
        # Corrected by how far off the expected costs were so far, to keep to the budget on slower machines too.
        wanted = guess * (took + AT_FIRST) / (guessed + AT_FIRST)
        name = f"{work.kind}: {work.name}"
        held = nbytes_held(work, kind, device, asked)
        if held > SHARE * machine.free_memory(device):
            report.skipped[name] = f"about {held / 1e9:.0f} GB"
            continue
        if wanted > left:
            report.skipped[name] = f"about {wanted:.0f} s"
            continue
        say(f"\n{name} (about {wanted:.0f} s of {left:.0f} s left)")
        begun, seconds = time.perf_counter(), min(6.0, left / 10)
        try:
            rows = measured(work, kind, device, limits=limits, asked=asked, seconds=seconds, memory=memory)
        except Exception as error:
            report.failed[name] = f"{type(error).__name__}: {error}"
            say(f"FAILED: {report.failed[name]}")
            rows = []
        for row in rows:
            say("  " + line_of(row))
        report.rows[:] = with_extrapolation([*report.rows, *rows])
        save(report)
        guessed, took = guessed + guess, took + time.perf_counter() - begun
    for row in report.rows:
        if row.source:
            say("  " + line_of(row))
    if report.skipped:
        say("\n" + not_run(report.skipped))
    say(f"\n{time.perf_counter() - start:.0f} s of {budget:.0f} s")
    return report


def not_run(skipped: Mapping[str, str]) -> str:
    """What was skipped, in one line: how many workloads of each kind. The report has each with its reason."""
    kinds = Counter(name.partition(":")[0] for name in skipped)
    texts = [f"{kind} ({count})" if count > 1 else kind for kind, count in kinds.items()]
    return f"not run, for want of time or memory: {len(skipped)} workloads: {', '.join(texts)}"


def write_static(folder: Path) -> str:
    """Compile the kernels, write what their machine code says, and return it as tables."""
    from bench.static import rows as static

    folder.mkdir(parents=True, exist_ok=True)
    known, texts = machine.versions(("torch", "triton", "merge-engine")), []
    made = {"static_kernels": static.kernel_rows(), "static_merges": static.merge_rows()}
    for name, rows in made.items():
        lines = [known | asdict(row) for row in rows]
        write_csv(folder / f"{name}.csv", list(lines[0]), lines)
        texts.append(plain_table(rows))
    return "\n\n".join([static.ASSUMED, *texts])


def say(text: str) -> None:
    """Print to standard error: standard output is for what was asked for."""
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write, print; returns 1 if a workload or a step failed, and 2 if there is no device."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.first_contact and options.device != "cuda":
        parser.error("--first-contact: wanted --device cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        say(f"--device cuda: wanted a CUDA or ROCm device, torch {torch.__version__} sees none")
        return 2
    if options.first_contact:
        return first_contact(options.output, say=say)
    kinds = options.only.split(",")
    if kinds == [STATIC]:
        if importlib.util.find_spec("triton") is None:
            parser.error(f"--only {STATIC}: wanted triton, which is not installed")
        print(write_static(options.output))
        return 0
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"--only: wanted some of {', '.join(KINDS)}, or {STATIC} alone, got {', '.join(unknown)}")
    old = read(options.compare) if options.compare else None
    asked: tuple[str, ...] = ("compiled",) * options.compile
    if options.mergekit:
        os.environ[PROGRAM] = options.mergekit
        asked += ("mergekit-yaml", "mergekit-evolve", *(["mergekit"] if HAS_MERGEKIT else []))
    if options.device == "cpu":
        os.environ["MERGE_ENGINE_BACKEND"] = "torch"  # for the processes that are started, too
    warnings.simplefilter("ignore")
    workloads = [work.shrunk(options.shrink) if options.shrink > 1 else work for work in WORKLOADS]

    def save(report: Report) -> None:
        write(report, options.output, options.device)

    chosen = [work for work in workloads if work.kind in kinds]
    report = run(chosen, options.device, options.budget, asked=asked, save=save)
    save(report)
    plot(report.rows, options.output)
    for text in (headline_table(report.rows), *map(str, trends(report.rows))):
        say(text)
    if options.markdown:
        print(markdown(report))
    if old is not None:
        for line in machine_differs(old.about, report.about):
            print(f"not the same machine or version: {line}")
        changes = compare(old.rows, report.rows)
        print("\n".join(map(str, changes)) or "nothing changed beyond the spread")
    return 1 if report.failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=600, help="seconds (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--first-contact", action="store_true", help="all that a new GPU is to show; exits 1 if not")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"), help="folder to write into")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="print what changed since this report")
    parser.add_argument("--only", default=",".join(KINDS), help="kinds, separated by commas (default: %(default)s)")
    parser.add_argument("--shrink", type=int, default=1, metavar="N", help="1/N of the rows, columns and layers")
    parser.add_argument("--mergekit", metavar="CMD", help="also run mergekit: the command that starts mergekit-yaml")
    parser.add_argument("--compile", action="store_true", help="also run the reference by torch.compile")
    parser.add_argument("--markdown", action="store_true", help="print the tables")
    return parser


if __name__ == "__main__":
    sys.exit(main())
