"""How the benchmarks measure: interleaved rounds, peak memory in a child, the machine's own limits, straight lines.

A contestant is something that can be run. All contestants of a workload take turns in one process, so that what else
the machine does meets all of them alike; the median counts, with the quartiles as its spread.
"""

import ctypes
import json
import multiprocessing
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

SLOW = 5.0  # seconds, from which on a first run is as good as any other: what it warms up takes less
LEAST, MOST = 3, 15  # rounds
MIB = 2**20
Name = TypeVar("Name")


class Sample(NamedTuple):
    """One run. peak_mib: of memory, above where the run began, as a GPU knows it; or of the whole process, where it had
    one of its own. extra_mib: beyond the result. processor: seconds of all threads on CPUs. kept_energy: the share of
    the merged deltas' energy that a cut kept."""

    seconds: float
    result: Any
    peak_mib: float | None = None
    extra_mib: float | None = None
    processor: float | None = None
    kept_energy: float | None = None


@dataclass(frozen=True)
class Contestant:
    """run() -> the result, or with own_clock the Sample of a process that it started. ready() goes before, untimed.

    checked: what runs for the check of results instead, where chance has to be made the same for all.
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
    """Times one run on the CPU, by the wall, and by what its threads ran."""

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
    """Times one run by CUDA events, from a flushed L2 cache, and its device memory."""

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
        return Sample(start.elapsed_time(end) / 1000, result, peak, peak - _nbytes(result) / MIB)


def clock_of(device: str) -> Clock:
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
    """The samples (without results) of rounds in which every contestant runs once: `least`, then while time lasts.

    seconds: what all rounds together may take.
    first: the samples of a run before; those that were slow, or of a process of their own, count as a round.
    """
    taken: dict[Name, list[Sample]] = {name: [] for name in contestants}
    for name, sample in (first or {}).items():
        if sample.seconds > SLOW or contestants[name].own_clock:
            taken[name].append(sample._replace(result=None))
    begun = time.perf_counter()
    for number in range(most):
        counted = sum(sample.seconds for samples in taken.values() for sample in samples)
        spent = max(counted, time.perf_counter() - begun)  # a clock of its own may count a part of the run only
        if number >= least and spent * (number + 1) / number > seconds:
            break
        for name, contestant in contestants.items():
            if len(taken[name]) <= number:
                taken[name].append(clock.sample(contestant)._replace(result=None))
    return taken


class Peak(NamedTuple):
    """Memory of one run at its peak, above where it began; extra: beyond its result. None where it is not known."""

    peak_mib: float | None
    extra_mib: float | None


def peak_memory(build: Callable[..., Contestant], warm: tuple[Any, ...], arguments: tuple[Any, ...]) -> Peak:
    """What one run of build(*arguments) needs, in a process of its own, after one of the small build(*warm).

    The process is forked from a server that has imported what is needed, and started no threads.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.contestants", "peft"])
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_measure_peak, args=(send, build, warm, arguments))
    child.start()
    send.close()
    try:
        found: Peak | BaseException = receive.recv()
    except EOFError:
        child.join()
        raise RuntimeError(f"the process that was to measure {arguments} ended with {child.exitcode}") from None
    child.join()
    if isinstance(found, BaseException):
        raise found
    return found


def _measure_peak(
    send: Any, build: Callable[..., Contestant], warm: tuple[Any, ...], arguments: tuple[Any, ...]
) -> None:
    try:
        for each in (warm, arguments):
            contestant = build(*each)
            if contestant.ready is not None:
                contestant.ready()
            if each is warm:  # imports, threads, and libraries' own buffers
                contestant.run()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before does not count as there
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        result = contestant.run()
        peak = (status("VmHWM") - before) / 1024
        send.send(Peak(peak, peak - _nbytes(result) / MIB))
    except Exception as error:
        send.send(RuntimeError(f"{arguments}: {type(error).__name__}: {error}"))


def status(key: str) -> int:
    """KiB of this process by a key of /proc/self/status: VmRSS, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def _nbytes(result: Any) -> int:
    if isinstance(result, Tensor):
        return result.nbytes
    if isinstance(result, Mapping):
        return sum(map(_nbytes, result.values()))
    return sum(map(_nbytes, result)) if isinstance(result, list | tuple) else 0


# A child's peak starts at that of its parent when it forks: a small process in between starts the one that counts.
LAUNCHER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
seconds, processor = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
print(json.dumps([os.waitstatus_to_exitcode(status), seconds, usage.ru_maxrss / 1024, processor]))
"""


def whole_process(command: Sequence[str]) -> Sample:
    """A process from its start to its end, and its peak resident memory. Raises RuntimeError where it fails."""
    done = subprocess.run([sys.executable, "-S", "-c", LAUNCHER, *command], capture_output=True, text=True, check=True)
    code, seconds, peak, processor = json.loads(done.stdout)
    if code:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-2000:]}")
    return Sample(seconds, None, peak, processor=processor)


@dataclass(frozen=True)
class Limits:
    """What this machine does at best: bytes a second that a copy reads and writes, flops a second of a product."""

    bandwidth: float
    matmul: float


def limits(device: str) -> Limits:
    """Medians of seven runs: a copy of 256 MiB, and 2048^3 (8192^3 on a GPU) by torch.mm in float32, without TF32."""
    clock, size = clock_of(device), 8192 if device == "cuda" else 2048
    source = torch.ones(64 * MIB, device=device)
    target = torch.empty_like(source)
    square = torch.randn(size, size, device=device)
    contestants = {
        "copy": Contestant(lambda: target.copy_(source)),
        "matmul": Contestant(lambda: torch.mm(square, square)),
    }
    taken = interleaved(contestants, clock, seconds=0, least=7)
    medians = {name: spread([sample.seconds for sample in samples]).median for name, samples in taken.items()}
    return Limits(2 * source.nbytes / medians["copy"], 2 * size**3 / medians["matmul"])


@dataclass(frozen=True)
class Line:
    """y = intercept + slope x, and the largest |fitted - y| / y."""

    slope: float
    intercept: float
    residual: float


def fit(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """The line of the least squared relative residuals: small sizes count as much as large ones.

    What is linear in x but not proportional to it has an intercept; what is not linear has a residual. Raises
    ValueError for fewer than two sizes, and for a cost that is not positive.
    """
    if len(xs) != len(ys) or len(set(xs)) < 2 or min(ys) <= 0:
        raise ValueError(f"a line wants at least two sizes and positive costs, got {list(xs)} and {list(ys)}")
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (xs, ys))
    solution = torch.linalg.lstsq(torch.stack([1 / y, x / y], 1), torch.ones(len(y), 1, dtype=torch.float64)).solution
    intercept, slope = solution.flatten().tolist()
    residual = float(((intercept + slope * x - y).abs() / y).max())
    return Line(slope, intercept, residual)
