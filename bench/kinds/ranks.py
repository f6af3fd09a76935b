"""Kind ranks: adapters into a base model, by one process and by two, of one thread each."""

import os
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from xxhash import xxh3_128

from bench.harness.agreement import Disagreement
from bench.harness.disk import base_and_adapters
from bench.harness.kind import Entry, Kind, Results
from bench.harness.measure import Contestant, Sample
from bench.harness.workloads import Workload
from bench.kinds.base import check_module, our_command, output_of

_BLOCK = 16 << 20  # bytes read or written at once


def _by_ranks(ranks: int, work: Workload, device: str) -> Contestant:
    base, adapters = base_and_adapters(work.layers, work.model, in_memory=True)
    return Contestant(lambda: _run(ranks, base, adapters, work.method), own_clock=True)


def _run(ranks: int, base: Path, adapters: list[Path], method: str) -> Sample:
    """One merge by so many processes; the time is what the merge reports, the result (output, its digest).

    The processes may run on any core, so the threads of a single one that read and write have a core of their own too.
    The output folder is empty, whatever the number of processes. As much memory as the merge takes is used and freed
    just before, untimed: a virtual machine may have given free memory back to its host, and getting 4 GB again would
    take as long as the merge.
    """
    output = output_of(base, "ranks")
    shutil.rmtree(output, ignore_errors=True)
    output_and_processes = 2 * sum(file.stat().st_size for file in base.iterdir())
    _touch_memory(base.with_name("touched"), output_and_processes)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *start, *our_command(base, adapters, output, method)[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-2000:]}")
    seconds = float(done.stdout.strip().splitlines()[-1].split(", ")[-1].removesuffix(" s"))
    return Sample(seconds, (output, digest(output)))


def _touch_memory(file: Path, size: int) -> None:
    """Write a file of zeros in memory, and remove it."""
    block = bytes(_BLOCK)
    with file.open("wb", buffering=0) as opened:
        for _ in range(-(-size // len(block))):
            opened.write(block)
    file.unlink()


def digest(folder: Path) -> str:
    """A hash of the names and the bytes of all tensor files in a folder."""
    found, block = xxh3_128(), bytearray(_BLOCK)
    for file in sorted(folder.glob("*.safetensors")):
        found.update(file.name.encode())
        with file.open("rb", buffering=0) as opened:
            while read := opened.readinto(block):
                found.update(memoryview(block)[:read])
    return found.hexdigest()


def _check(work: Workload, results: Results, device: str) -> None:
    """All write the same bytes, and one module of them is right."""
    base, adapters = base_and_adapters(work.layers, work.model, in_memory=True)
    outputs, digests = zip(*results.values(), strict=True)
    if len(set(digests)) != 1:
        raise Disagreement(f"{work.name}: the outputs of {', '.join(results)} have different bytes")
    check_module(base, adapters, work.method, outputs[-1])


KIND = Kind(
    {
        "1 rank": Entry(partial(_by_ranks, 1), seconds=13),
        "2 ranks": Entry(partial(_by_ranks, 2), seconds=10),
    },
    _check,
    checking=0,
    baseline=("1 rank",),
    forks=False,
    has_rates=False,
)
