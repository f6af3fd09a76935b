"""How time is measured: contestants take turns, and the median counts.

A contestant is something that can be run. All contestants of a workload take turns in one process, so that whatever
else the machine does slows all of them alike; the median counts, with the quartiles as its spread.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

SLOW = 5.0  # seconds: a first run that takes longer counts as a round, since what it warms up takes far less
LEAST, MOST = 3, 15  # rounds
MIB = 2**20
Name = TypeVar("Name")


class Sample(NamedTuple):
    """One run.

    peak_mib: on a GPU, peak memory above what was allocated before the run; for a run that has its own process, the
        peak of that process.
    extra_mib: peak memory above where the run began, without the result.
    processor: CPU seconds of all threads.
    kept_energy: the share of the merged deltas' energy (squared norm) that a cut to a rank kept.
    written_mib: what a process of its own gave to a disk to write (0 for files in memory).
    """

    seconds: float
    result: Any
    peak_mib: float | None = None
    extra_mib: float | None = None
    processor: float | None = None
    kept_energy: float | None = None
    written_mib: float | None = None


@dataclass(frozen=True)
class Contestant:
    """Something to run and time.

    run: returns the result; with own_clock, it starts a process and returns its Sample.
    ready: called before each run, not timed.
    checked: called instead of `run` for the check of results, where random masks must be the same for all contestants.
    """

    run: Callable[[], Any]
    ready: Callable[[], None] | None = None
    own_clock: bool = False
    checked: Callable[[], Any] | None = None


class Spread(NamedTuple):
    """Median and quartiles of seconds."""

    median: float
    low: float
    high: float
    runs: int


def spread(seconds: Sequence[float]) -> Spread:
    """Median and quartiles, both ends included."""
    if len(seconds) == 1:
        return Spread(seconds[0], seconds[0], seconds[0], 1)
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Spread(median, low, high, len(seconds))


class Clock:
    """Measures one run on the CPU: wall time, and CPU time of all threads."""

    def sample(self, contestant: Contestant) -> Sample:
        if contestant.ready is not None:
            contestant.ready()
        if contestant.own_clock:
            sample: Sample = contestant.run()
            return sample
        return self._timed(contestant.run)

    def _timed(self, run: Callable[[], Any]) -> Sample:
        start, before = time.perf_counter(), time.process_time()
        result = run()
        seconds, processor = time.perf_counter() - start, time.process_time() - before
        return Sample(seconds, result, processor=processor)


class CudaClock(Clock):
    """Measures one run on a GPU: time by CUDA events, with an L2 cache that was flushed, and device memory."""

    def __init__(self) -> None:
        self.flush = torch.empty(256 * MIB, dtype=torch.uint8, device="cuda")  # several times any L2 cache

    def _timed(self, run: Callable[[], Any]) -> Sample:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start.record()
        result = run()
        end.record()
        end.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / MIB
        return Sample(start.elapsed_time(end) / 1000, result, peak, peak - nbytes_of(result) / MIB)


def clock_of(device: str) -> Clock:
    """The clock for "cpu" or "cuda"."""
    return CudaClock() if device == "cuda" else Clock()


def interleaved(
    contestants: Mapping[Name, Contestant],
    clock: Clock,
    *,
    seconds: float,
    first: Mapping[Name, Sample] | None = None,
    least: int = LEAST,
    most: int = MOST,
) -> dict[Name, list[Sample]]:
    """The samples (without results) of rounds; in each round every contestant runs once.

    There are at least `least` rounds, then more as long as all rounds together stay within `seconds`, `most` in all.
    first: samples of an earlier run. One that was slow, or that had a process of its own, counts as the first round.
    """
    taken: dict[Name, list[Sample]] = {name: [] for name in contestants}
    for name, sample in (first or {}).items():
        if sample.seconds > SLOW or contestants[name].own_clock:
            taken[name].append(sample._replace(result=None))
    begun = time.perf_counter()
    for number in range(most):
        counted = sum(sample.seconds for samples in taken.values() for sample in samples)
        spent = max(counted, time.perf_counter() - begun)  # a process may report only a part of the time it took
        if number >= least and spent * (number + 1) / number > seconds:
            break
        for name, contestant in contestants.items():
            if len(taken[name]) <= number:
                taken[name].append(clock.sample(contestant)._replace(result=None))
    return taken


def nbytes_of(result: Any) -> int:
    """Bytes of the tensors in a result: a tensor, or lists, tuples and dictionaries of them."""
    if isinstance(result, Tensor):
        return result.nbytes
    if isinstance(result, Mapping):
        return sum(map(nbytes_of, result.values()))
    return sum(map(nbytes_of, result)) if isinstance(result, list | tuple) else 0
