"""Carries out one workload: check that results agree, then time, then measure memory. Gives rows of the report."""

import statistics
from dataclasses import replace
from typing import Any

import torch

from bench import measure
from bench.contestants import KINDS, build, taking_part
from bench.measure import MOST, SLOW, Contestant, Limits, Peak, Sample
from bench.results import Row
from bench.workloads import Workload
from merge_engine.runtime.threads import threads

Key = tuple[Workload, str]

FORK = 0.5  # seconds that a process costs besides the run in it
WHOLE_TENSORS = 30  # bytes an element and adapter that PEFT and the textbook were seen to hold at their peak


def expected(work: Workload, device: str, asked: tuple[str, ...] = ()) -> float:
    """The first guess of the seconds that `measured` takes."""
    total = 0.0
    for size in work.sizes():
        kind = KINDS[size.kind]
        for entry in taking_part(size, device, asked).values():
            once = entry.expected(size)
            total += once * (kind.least if once > SLOW or not kind.forks else kind.least + 1)
            total += (once + FORK) * kind.forks
        total += 1e-9 * kind.checking * size.elements * size.adapters
    return total


def nbytes_held(work: Workload, device: str, asked: tuple[str, ...] = ()) -> int:
    """About how much memory the workload's contestants need at once, beside each other's results."""
    sizes = work.sizes() if KINDS[work.kind].roofs else []
    whole = {size: set(taking_part(size, device, asked)) - {"tiled", "triton"} for size in sizes}
    return max((size.elements * (WHOLE_TENSORS * size.adapters if whole[size] else 16) for size in sizes), default=0)


def agreed(
    work: Workload, device: str, asked: tuple[str, ...] = ()
) -> tuple[dict[Key, Contestant], dict[Key, Sample], dict[Key, float]]:
    """(contestants, the samples of a first run, excess of errors), by size and name. Raises Disagreement.

    A sample is left out where something else ran for the check.
    """
    clock = measure.clock_of(device)
    contestants = {
        (size, name): build(size, name, device) for size in work.sizes() for name in taking_part(size, device, asked)
    }
    for (size, name), contestant in contestants.items():
        if not contestant.own_clock:
            clock.sample(build(small(size), name, device))  # what is compiled or imported at its first use is there
    first = {key: clock.sample(_checked(contestant)) for key, contestant in contestants.items()}
    excess: dict[Key, float] = {}
    for size in work.sizes():
        results = {name: sample.result for (of, name), sample in first.items() if of == size}
        found = KINDS[work.kind].check(size, results, device)
        excess |= {(size, name): value for name, value in (found or {}).items()}
    alike = {key: sample._replace(result=None) for key, sample in first.items() if contestants[key].checked is None}
    return contestants, alike, excess


def measured(
    work: Workload,
    device: str = "cpu",
    *,
    limits: Limits | None = None,
    asked: tuple[str, ...] = (),
    seconds: float = 6.0,
    least: int | None = None,
    most: int = MOST,
    memory: bool = True,
) -> list[Row]:
    """One row for every contestant of every size of the workload. Raises Disagreement before anything is timed.

    limits: the machine's, for the shares of them. asked: optional contestants that take part. seconds: of the rounds
    beyond the least, which are those of the kind if None.
    """
    kind = KINDS[work.kind]
    with threads(torch.get_num_threads()):
        contestants, first, excess = agreed(work, device, asked)
        rounds: dict[str, Any] = {"least": kind.least if least is None else least, "most": most}
        taken = measure.interleaved(contestants, measure.clock_of(device), seconds=seconds, first=first, **rounds)
    peaks = {key: _peak(*key, device, samples, memory and kind.forks) for key, samples in taken.items()}
    medians = {key: measure.spread([sample.seconds for sample in samples]) for key, samples in taken.items()}
    rows = []
    for (size, name), (median, low, high, runs) in medians.items():
        rival = next((name for name in kind.baseline if (size, name) in medians), "")
        roofs = limits is not None and kind.roofs
        rows.append(
            Row(
                kind=work.kind,
                workload=size.name,
                contestant=name,
                **{field: getattr(size, field) for field in Row.OF_WORKLOAD},
                device=device,
                threads=torch.get_num_threads(),
                runs=runs,
                seconds=median,
                low=low,
                high=high,
                processor=_middle(taken[size, name], "processor"),
                peak_mib=peaks[size, name].peak_mib,
                extra_mib=peaks[size, name].extra_mib,
                baseline=rival,
                ratio=medians[size, rival].median / median if rival else None,
                flops=size.flops if kind.roofs else None,
                nbytes=size.nbytes if kind.roofs else None,
                bandwidth_share=size.nbytes / median / limits.bandwidth if limits is not None and roofs else None,
                matmul_share=size.flops / median / limits.matmul if limits is not None and roofs else None,
                excess=excess.get((size, name)),
                kept_energy=_middle(taken[size, name], "kept_energy"),
            )
        )
    return rows


def _middle(samples: list[Sample], name: str) -> float | None:
    """The median of a field, where every sample knows it."""
    values = [getattr(sample, name) for sample in samples]
    return None if None in values else statistics.median(values)


def _checked(contestant: Contestant) -> Contestant:
    return contestant if contestant.checked is None else replace(contestant, run=contestant.checked)


def _peak(work: Workload, name: str, device: str, samples: list[Sample], forks: bool) -> Peak:
    """The largest of the samples where they know; else, on the CPU, that of a forked process."""
    peaks, extras = ([getattr(sample, key) for sample in samples] for key in Peak._fields)
    if None not in peaks:
        return Peak(max(peaks), None if None in extras else max(extras))
    if not forks:
        return Peak(None, None)
    return measure.peak_memory(build, (small(work), name, device), (work, name, device))


def small(work: Workload) -> Workload:
    """The same work, on next to nothing."""
    return replace(work, rows=work.rows and 64, columns=work.columns and 64, layers=min(work.layers, 1), vary=None)
