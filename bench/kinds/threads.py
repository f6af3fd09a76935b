"""Kind threads: the same merge on one thread and on more."""

import os
from functools import partial

import torch

from bench.harness.kind import Entry, Kind
from bench.harness.measure import Contestant
from bench.harness.workloads import Task, Workload
from bench.kinds.deltas import check, tiled_merge


def _on_threads(count: int, work: Workload, device: str) -> Contestant:
    task = Task(work)

    def ready() -> None:
        torch.set_num_threads(count)
        tiled_merge(task)  # starts the threads, and wakes their cores

    return Contestant(lambda: tiled_merge(task), ready=ready)


COUNTS = [1, *(count for count in (2, 4, 8, 16) if count <= (os.cpu_count() or 1))]
KIND = Kind(
    {
        f"{count} thread{'s' * (count > 1)}": Entry(partial(_on_threads, count), ns=5 / count**0.5, devices=("cpu",))
        for count in COUNTS
    },
    check,
    baseline=("1 thread",),
)
