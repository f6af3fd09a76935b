"""Kind parts: how the time of a merge with a trim divides into its parts."""

from collections.abc import Callable
from functools import partial
from typing import Any

from bench.harness.agreement import check_merge
from bench.harness.inputs import SCALING
from bench.harness.kind import Entry, Kind, Results
from bench.harness.measure import Contestant
from bench.harness.workloads import Task, Workload
from bench.kinds.deltas import tiled
from bench.kinds.select import compute_tiles
from merge_engine.cpu.keep import KeepTile
from merge_engine.cpu.merge import merge_deltas
from merge_engine.cpu.select import trims_of_each
from merge_engine.cpu.source import Product
from merge_engine.runtime.memory import new_tensor

Part = Callable[[Task, list[Product], list[KeepTile]], Any]


def _part(run: Part, work: Workload, device: str) -> Contestant:
    """One part of a merge whose deltas and thresholds are known."""
    task = Task(work)
    sources = [Product(A, B, SCALING) for A, B in task.pairs]
    keeps: list[KeepTile] = [keep for (keep,) in _thresholds(task, sources, [])]
    return Contestant(lambda: run(task, sources, keeps))


def _thresholds(task: Task, sources: list[Product], keeps: list[KeepTile]) -> Any:
    return trims_of_each(sources, [[task.kept]] * len(sources), task.rule.trim_ties)


def _merge(task: Task, sources: list[Product], keeps: list[KeepTile]) -> Any:
    return merge_deltas(sources, task.weights, keeps, task.rule)


def _products(task: Task, sources: list[Product], keeps: list[KeepTile]) -> Any:
    for source in sources:
        compute_tiles(source)


def _zeros(task: Task, sources: list[Product], keeps: list[KeepTile]) -> Any:
    return new_tensor((sources[0].rows, sources[0].columns)).zero_()


def _check(work: Workload, results: Results, device: str) -> None:
    for name in ("whole", "merge, thresholds known"):
        check_merge({name: results[name]}, Task(work))


KIND = Kind(
    {
        "whole": Entry(tiled, ns=5, devices=("cpu",)),
        "thresholds": Entry(partial(_part, _thresholds), ns=3, devices=("cpu",)),
        "merge, thresholds known": Entry(partial(_part, _merge), ns=2, devices=("cpu",)),
        "bare products": Entry(partial(_part, _products), ns=1, devices=("cpu",)),
        "a result of zeros": Entry(partial(_part, _zeros), ns=1, devices=("cpu",)),
    },
    _check,
    baseline=("whole",),
    forks=False,
)
