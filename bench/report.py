"""Every benchmark that fits a time budget, into one CSV, one JSON and plots: python -m bench.report [--budget 600]

Workloads run in their order of importance (`workloads.WORKLOADS`); one that is not expected to fit what is left is
passed over. Contestants take turns; nothing is timed before their results agree. --compare OLD.json prints what changed
beyond the spread; --markdown prints tables for a README. mergekit and torch.compile take part if they are asked for.

--only static runs nothing: it compiles the kernels for GPUs that are not here, and writes what their machine code says
of their cost to static_kernels.csv and static_merges.csv.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench import into_base, measure, whole_merge
from bench.contestants import HAS_MERGEKIT, KINDS
from bench.measure import Limits
from bench.plots import plot
from bench.results import (
    Report,
    Row,
    compare,
    headline_table,
    machine_differs,
    markdown,
    plain_table,
    read,
    trends,
    write,
    write_csv,
)
from bench.suite import expected, measured, nbytes_held
from bench.workloads import WORKLOADS, Workload

PACKAGES = ("torch", "triton", "peft", "transformers", "numpy", "numba", "merge-engine")
ENDING = 8.0  # seconds for files and plots
SHARE = 0.4  # of the free memory, for one workload: others use the machine as well
STATIC = "static"
AT_FIRST = 20.0  # seconds of evidence that the table of expected costs counts as


def about(device: str, limits: Limits) -> dict[str, Any]:
    """The machine, its versions, and the commit."""
    found: dict[str, Any] = {"machine": _processor(), "cores": os.cpu_count(), "threads_used": torch.get_num_threads()}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    found |= {"bandwidth_gb_s": round(limits.bandwidth / 1e9, 2), "matmul_gflop_s": round(limits.matmul / 1e9, 1)}
    return found | versions(PACKAGES) | {"load": round(os.getloadavg()[0], 2)}


def versions(packages: Sequence[str]) -> dict[str, Any]:
    """Of Python and these packages, the commit, and the time."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found | {"commit": _commit(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """The commit of the checkout, with + where files differ from it."""
    root = Path(__file__).parent.parent
    try:
        done = [
            subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return done[0] + "+" * bool(done[1])


def _free(device: str) -> int:
    """Bytes of memory that are not in use."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])


def run(
    workloads: Sequence[Workload],
    device: str,
    budget: float,
    *,
    asked: tuple[str, ...] = (),
    memory: bool = True,
    save: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Carry out what fits `budget` seconds, and say on the way what was found; saved after every workload."""
    start, guessed, took = time.perf_counter(), 0.0, 0.0
    limits = measure.limits(device)
    report = Report(about(device, limits), [])
    say(", ".join(f"{name} {value}" for name, value in report.about.items()))
    for work in workloads:
        guess = expected(work, device, asked)
        if not guess:
            continue  # nobody can take part here
        left = budget - ENDING - (time.perf_counter() - start)
        # What the table of costs is off by so far, so that a slower or busier machine keeps to the budget as well.
        wanted = guess * (took + AT_FIRST) / (guessed + AT_FIRST)
        name = f"{work.kind}: {work.name}"
        held = nbytes_held(work, device, asked)
        if held > SHARE * _free(device):
            report.skipped[name] = f"about {held / 1e9:.0f} GB"
            continue
        if wanted > left:
            report.skipped[name] = f"about {wanted:.0f} s"
            continue
        say(f"\n{name} (about {wanted:.0f} s of {left:.0f} s left)")
        begun = time.perf_counter()
        try:
            rows = measured(work, device, limits=limits, asked=asked, seconds=min(6.0, left / 10), memory=memory)
        except Exception as error:
            report.failed[name] = f"{type(error).__name__}: {error}"
            say(f"FAILED: {report.failed[name]}")
            rows = []
        for row in rows:
            say("  " + said(row))
        report.rows[:] = whole_merge.with_extrapolation([*report.rows, *rows])
        save(report)
        guessed, took = guessed + guess, took + time.perf_counter() - begun
    for row in report.rows:
        if row.source:
            say("  " + said(row))
    if report.skipped:
        say("\nnot run: " + "; ".join(f"{name} ({reason})" for name, reason in report.skipped.items()))
    say(f"\n{time.perf_counter() - start:.0f} s of {budget:.0f} s")
    return report


def write_static(folder: Path) -> str:
    """Compile kernels, write what their machine code says, and return it as tables."""
    from bench import static_cost

    folder.mkdir(parents=True, exist_ok=True)
    known, texts = versions(("torch", "triton", "merge-engine")), []
    made = {"static_kernels": static_cost.kernel_rows(), "static_merges": static_cost.merge_rows()}
    for name, rows in made.items():
        lines = [known | asdict(row) for row in rows]
        write_csv(folder / f"{name}.csv", list(lines[0]), lines)
        texts.append(plain_table(rows))
    return "\n\n".join(["Estimated from machine code; nothing was run on a GPU.", *texts])


def said(row: Row) -> str:
    """One row, as a line of text."""
    parts = [f"{row.seconds:.4g} s ({row.low:.4g} to {row.high:.4g}, {row.runs} runs)"]
    if row.ratio is not None and row.contestant != row.baseline:
        parts.append(f"{row.ratio:.3g}x as fast as {row.baseline}")
    if row.peak_mib is not None:
        beyond = "" if row.extra_mib is None else f", {row.extra_mib:.0f} beyond the result"
        parts.append(f"peak {row.peak_mib:.0f} MiB{beyond}")
    if row.bandwidth_share is not None and row.matmul_share is not None:
        parts.append(f"{row.bandwidth_share:.1%} of a copy, {row.matmul_share:.1%} of a matmul")
    if row.processor is not None:
        parts.append(f"{row.processor:.4g} s of CPUs")
    if row.excess is not None:
        parts.append(f"error {row.excess:+.1e} of the best")
    if row.kept_energy is not None:
        parts.append(f"keeps {row.kept_energy:.1%} of the energy")
    if row.source:
        parts.append(f"= {row.source}")
    return f"{row.contestant:20} {row.workload}: {'; '.join(parts)}"


def say(text: str) -> None:
    """To standard error, so that standard output is what was asked for."""
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write, print; 1 if a workload failed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=600, help="seconds (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"), help="folder to write into")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="print what changed since")
    parser.add_argument("--only", default=",".join(KINDS), help="kinds, separated by commas (default: %(default)s)")
    parser.add_argument("--shrink", type=int, default=1, metavar="N", help="1/N of the rows, columns and layers")
    parser.add_argument("--mergekit", metavar="CMD", help="also mergekit: the command that starts mergekit-yaml")
    parser.add_argument("--compile", action="store_true", help="also the reference by torch.compile")
    parser.add_argument("--markdown", action="store_true", help="print the tables")
    options = parser.parse_args(arguments)
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
        os.environ[into_base.PROGRAM] = options.mergekit
        asked += ("mergekit-yaml", "mergekit") if HAS_MERGEKIT else ("mergekit-yaml",)
    if options.device == "cpu":
        os.environ["MERGE_ENGINE_BACKEND"] = "torch"  # of the processes that are started, too
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


if __name__ == "__main__":
    sys.exit(main())
