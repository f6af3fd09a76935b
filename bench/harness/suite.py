"""Carries out one workload: checks that the results agree, then times, then measures memory, and returns rows."""

import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from bench.harness import measure
from bench.harness.kind import Kind
from bench.harness.machine import Limits
from bench.harness.measure import MOST, SLOW, Contestant, Sample, Spread
from bench.harness.processes import Peak, peak_memory
from bench.harness.row import Row
from bench.harness.workloads import Workload
from merge_engine.loops import door
from merge_engine.runtime.threads import threads

Key = tuple[Workload, str]  # a workload of one size, and the name of a contestant

FORK = 0.5  # seconds that a forked process takes besides the run in it
WHOLE_TENSORS = 30  # bytes an element and adapter: the peak that PEFT and the textbook were seen to need


def expected(work: Workload, kind: Kind, device: str, asked: tuple[str, ...] = ()) -> float:
    """The first guess of the seconds that `measured` takes; 0 if no contestant can take part."""
    total = 0.0
    for size in work.sizes():
        entries = kind.taking_part(size, device, asked)
        for entry in entries.values():
            once = entry.expected(size)
            total += once * (kind.least if once > SLOW or not kind.forks else kind.least + 1)
            total += (once + FORK) * kind.forks
        total += 1e-9 * kind.checking * size.elements * size.adapters * bool(entries)
    return total


def nbytes_held(work: Workload, kind: Kind, device: str, asked: tuple[str, ...] = ()) -> int:
    """About how much memory the contestants of a workload need at once, results included; 0 if not known."""
    sizes = work.sizes() if kind.has_rates else []
    whole = {size: set(kind.taking_part(size, device, asked)) - {"tiled", "triton"} for size in sizes}
    return max((size.elements * (WHOLE_TENSORS * size.adapters if whole[size] else 16) for size in sizes), default=0)


def agreed(
    work: Workload, kind: Kind, device: str, asked: tuple[str, ...] = ()
) -> tuple[dict[Key, Contestant], dict[Key, Sample], dict[Key, float]]:
    """(contestants, samples of the first run, excess of errors), by size and name. Raises Disagreement.

    A contestant that ran something else for the check has no sample.
    """
    clock = measure.clock_of(device)
    door.load()  # whatever there is to do: a small workload is to be timed as part of a large one is
    entries = {
        (size, name): entry for size in work.sizes() for name, entry in kind.taking_part(size, device, asked).items()
    }
    contestants = {(size, name): entry.build(size, device) for (size, name), entry in entries.items()}
    for (size, name), contestant in contestants.items():
        if not contestant.own_clock:  # compile and import before anything is timed
            clock.sample(entries[size, name].build(small(size), device))
    first = {key: clock.sample(_checked(contestant)) for key, contestant in contestants.items()}
    excess: dict[Key, float] = {}
    for size in work.sizes():
        results = {name: sample.result for (of, name), sample in first.items() if of == size}
        found = kind.check(size, results, device)
        excess |= {(size, name): value for name, value in (found or {}).items()}
    alike = {key: sample._replace(result=None) for key, sample in first.items() if contestants[key].checked is None}
    return contestants, alike, excess


def measured(
    work: Workload,
    kind: Kind,
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

    limits: the rates that shares are of; None: no shares. asked: contestants that take part on request.
    seconds, least, most: as in `measure.interleaved`; least: None is that of the kind. memory: whether to fork.
    """
    with threads(torch.get_num_threads()):
        contestants, first, excess = agreed(work, kind, device, asked)
        rounds: dict[str, Any] = {"least": kind.least if least is None else least, "most": most}
        taken = measure.interleaved(contestants, measure.clock_of(device), seconds=seconds, first=first, **rounds)
    spreads = {key: measure.spread([sample.seconds for sample in samples]) for key, samples in taken.items()}
    rows = []
    for (size, name), samples in taken.items():
        peak = _peak(size, name, kind, device, samples, memory and kind.forks)
        row = _row((size, name), kind, device, samples, spreads, peak, excess.get((size, name)))
        rows.append(_with_rates(row, size, limits) if kind.has_rates else row)
    return rows


def _row(
    key: Key,
    kind: Kind,
    device: str,
    samples: list[Sample],
    spreads: Mapping[Key, Spread],
    peak: Peak,
    excess: float | None,
) -> Row:
    size, name = key
    median, low, high, runs = spreads[key]
    rival = next((name for name in kind.baseline if (size, name) in spreads), "")
    return Row(
        kind=size.kind,
        workload=size.name,
        contestant=name,
        **{field: getattr(size, field) for field in Row.OF_WORKLOAD},
        device=device,
        threads=torch.get_num_threads(),
        runs=runs,
        seconds=median,
        low=low,
        high=high,
        processor=_median(samples, "processor"),
        peak_mib=peak.peak_mib,
        extra_mib=peak.extra_mib,
        baseline=rival,
        ratio=spreads[size, rival].median / median if rival else None,
        excess=excess,
        kept_energy=_median(samples, "kept_energy"),
        written_mib=_median(samples, "written_mib"),
    )


def _with_rates(row: Row, size: Workload, limits: Limits | None) -> Row:
    """The row with bytes and flops, and, where the machine's rates are known, with its shares of them."""
    row = replace(row, flops=size.flops, nbytes=size.nbytes)
    if limits is None:
        return row
    return replace(
        row,
        bandwidth_share=size.nbytes / row.seconds / limits.bandwidth,
        matmul_share=size.flops / row.seconds / limits.matmul,
    )


def _median(samples: list[Sample], name: str) -> float | None:
    """The median of a field, if every sample has it."""
    values = [getattr(sample, name) for sample in samples]
    return None if None in values else statistics.median(values)


def _checked(contestant: Contestant) -> Contestant:
    return contestant if contestant.checked is None else replace(contestant, run=contestant.checked)


def _peak(work: Workload, name: str, kind: Kind, device: str, samples: list[Sample], forks: bool) -> Peak:
    """The largest peak of the samples if they have one; else, if it forks, that of a run in another process."""
    peaks, extras = ([getattr(sample, key) for sample in samples] for key in Peak._fields)
    if None not in peaks:
        return Peak(max(peaks), None if None in extras else max(extras))
    if not forks:
        return Peak(None, None)
    return peak_memory(kind.entries[name].build, (small(work), device), (work, device))


def small(work: Workload) -> Workload:
    """The same workload at a tiny size."""
    return replace(work, rows=work.rows and 64, columns=work.columns and 64, layers=min(work.layers, 1), vary=None)
