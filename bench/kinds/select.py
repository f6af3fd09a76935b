"""Kind select: the k-th largest magnitude of one delta, from its factors."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.harness.agreement import check_kth
from bench.harness.inputs import SCALING
from bench.harness.kind import Entry, Kind, Results
from bench.harness.measure import Contestant
from bench.harness.workloads import Task, Workload
from merge_engine.cpu.select import trims
from merge_engine.cpu.source import Product, for_each_tile
from merge_engine.rules import reference
from merge_engine.runtime.memory import scratch


def _tiled(work: Workload, device: str) -> Contestant:
    task = Task(work)
    A, B = task.pairs[0]
    return Contestant(lambda: trims([Product(A, B, SCALING)], task.kept, "exact")[0].value)


def _bare_product(work: Workload, device: str) -> Contestant:
    """Every tile of the product, computed and not kept: the least that a selection has to do."""
    A, B = Task(work).pairs[0]
    return Contestant(lambda: compute_tiles(Product(A, B, SCALING)))


def compute_tiles(source: Product) -> None:
    """Compute every tile of a delta, and keep none."""
    for_each_tile(source, lambda tile: source.fill(tile, scratch("values", tile.shape)))


def _triton(work: Workload, device: str) -> Contestant:
    from merge_engine.kernels.source import pack
    from merge_engine.kernels.trims import trims as kernel_trims

    task = Task(work, device)
    kept = torch.tensor([[[task.kept]]])
    return Contestant(lambda: kernel_trims(pack([task.pairs[:1]], [[SCALING]]), kept).value)


def _whole_tensor(find: Callable[[Tensor, int], Tensor], work: Workload, device: str) -> Contestant:
    """The whole delta, then an operator of torch."""
    task = Task(work, device)
    A, B = task.pairs[0]
    return Contestant(lambda: find(reference.delta(A, B, SCALING).abs_().flatten(), task.kept))


def _by_topk(magnitudes: Tensor, k: int) -> Tensor:
    return magnitudes.topk(k).values[-1]


def _by_kthvalue(magnitudes: Tensor, k: int) -> Tensor:
    return magnitudes.kthvalue(magnitudes.numel() + 1 - k).values


def _check(work: Workload, results: Results, device: str) -> None:
    for name, value in results.items():
        if value is not None:  # the bare product selects nothing
            check_kth(float(value), Task(work), name)


KIND = Kind(
    {
        "tiled": Entry(_tiled, ns=4, devices=("cpu",)),
        "bare product": Entry(_bare_product, ns=0.7, devices=("cpu",)),
        "triton": Entry(_triton, ns=0.05, devices=("cuda",)),
        "topk": Entry(partial(_whole_tensor, _by_topk), ns=50),
        "kthvalue": Entry(partial(_whole_tensor, _by_kthvalue), ns=20),
    },
    _check,
    baseline=("topk",),
)
