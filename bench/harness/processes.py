"""Runs in processes of their own: peak memory of one run, and whole commands."""

import ctypes
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.harness.measure import MIB, Contestant, Sample, nbytes_of
from merge_engine.loops import door

# Imported before the fork, whatever is measured: imports after it change how freed memory is used again, and so move
# peaks, by 16 MiB for PEFT's 2048 x 2048 deltas. By name, since the harness imports no kind.
PRELOADED = ["bench.kinds.table", "peft"]


class Peak(NamedTuple):
    """Peak memory of one run, above where it began; extra_mib: without its result. None: not known."""

    peak_mib: float | None
    extra_mib: float | None


def peak_memory(build: Callable[..., Contestant], warm: tuple[Any, ...], arguments: tuple[Any, ...]) -> Peak:
    """Peak memory of one run of build(*arguments), in its own process, after a run of the small build(*warm).

    build: a function of a module, or a partial of one, since it is sent to that process. The process is forked from a
    server that has imported PRELOADED and has started no threads. Raises RuntimeError where the run fails.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
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
        door.load()
        for each in (warm, arguments):
            contestant = build(*each)
            if contestant.ready is not None:
                contestant.ready()
            if each is warm:  # imports modules, starts threads, and allocates the buffers of libraries
                contestant.run()
        ctypes.CDLL(None).malloc_trim(0)  # gives freed memory back, so that the run has to take its own
        before = process_status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        result = contestant.run()
        peak = (process_status("VmHWM") - before) / 1024
        send.send(Peak(peak, peak - nbytes_of(result) / MIB))
    except Exception as error:
        send.send(RuntimeError(f"{arguments}: {type(error).__name__}: {error}"))


def process_status(key: str) -> int:
    """KiB of this process, from /proc/self/status: "VmRSS" is its memory now, "VmHWM" its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


# The peak of a child starts at that of its parent when it forks: so a small process starts the one that is measured.
LAUNCHER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
seconds, processor = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
written = usage.ru_oublock * 512 / 2**20
print(json.dumps([os.waitstatus_to_exitcode(status), seconds, usage.ru_maxrss / 1024, processor, written]))
"""


def whole_process(command: Sequence[str]) -> Sample:
    """A command from its start to its end: wall and CPU time, peak memory, MiB written. RuntimeError if it fails.

    What earlier commands wrote is on the disk first, or a command that flushes its own output would wait for theirs.
    """
    os.sync()
    done = subprocess.run([sys.executable, "-S", "-c", LAUNCHER, *command], capture_output=True, text=True, check=True)
    code, seconds, peak, processor, written = json.loads(done.stdout)
    if code:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-2000:]}")
    return Sample(seconds, None, peak, processor=processor, written_mib=written)
