"""Kind deltas: from the factors of one layer to its merged delta [M, N], selection included."""

import importlib.util
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from bench.harness.agreement import Arithmetic, check_merge
from bench.harness.inputs import SCALING
from bench.harness.kind import Entry, Kind, Results
from bench.harness.measure import Contestant
from bench.harness.peft_models import peft_layer
from bench.harness.workloads import STREAM, Task, Workload
from merge_engine.cpu.keep import Drop, KeepTile
from merge_engine.cpu.merge import merge_deltas
from merge_engine.cpu.select import trims_of_each
from merge_engine.cpu.source import Product
from merge_engine.rules import reference

HAS_MERGEKIT = importlib.util.find_spec("mergekit") is not None


def tiled(work: Workload, device: str) -> Contestant:
    """Tile by tile on the CPU."""
    task = Task(work)
    return Contestant(lambda: tiled_merge(task))


def tiled_merge(task: Task) -> Tensor:
    """One merge: thresholds if the method trims, then one pass over the tiles."""
    work, rule = task.workload, task.rule
    sources = [Product(A, B, SCALING) for A, B in task.pairs]
    keeps: list[KeepTile] = [None] * work.adapters
    if rule.keep == "magnitude":
        keeps = [keep for (keep,) in trims_of_each(sources, [[task.kept]] * work.adapters, rule.trim_ties)]
    elif rule.keep == "bernoulli":
        keeps = [Drop(work.density, 0, STREAM, adapter) for adapter in range(work.adapters)]
    return merge_deltas(sources, task.weights, keeps, rule)


def _triton(work: Workload, device: str) -> Contestant:
    from merge_engine.kernels import merge as kernels
    from merge_engine.kernels.source import Drop, pack
    from merge_engine.kernels.trims import trims

    task = Task(work, device)
    rule, adapters = task.rule, work.adapters

    def run() -> Tensor:
        source = pack([task.pairs], [[SCALING] * adapters])
        keep = None
        if rule.keep == "magnitude":
            keep = trims(source, torch.tensor([[[task.kept] * adapters]]), ties=rule.trim_ties)
        elif rule.keep == "bernoulli":
            density = torch.full((1, 1, adapters), work.density, dtype=torch.float64)
            keep = Drop(density, [0], torch.tensor([STREAM]), torch.arange(adapters))
        options = {"elect": rule.elect, "divisor": rule.divisor, "vote_weighted": rule.vote_weighted}
        return kernels.merge_deltas(source, [task.weights], keep, **options)[0, 0]

    return Contestant(run)


def _reference(work: Workload, device: str) -> Contestant:
    task = Task(work, device)
    return Contestant(lambda: _reference_merge(task))


def _reference_merge(task: Task) -> Tensor:
    deltas = {adapter: reference.delta(A, B, SCALING) for adapter, (A, B) in enumerate(task.pairs)}
    masks = {adapter: task.mask(adapter) for adapter in deltas} if task.rule.keep == "bernoulli" else {}
    densities = {"layer": [task.workload.density] * len(deltas)}
    masked = {"layer": masks} if masks else None
    return reference.merge_model({"layer": deltas}, task.weights, densities, task.rule, masks=masked)["layer"]


def _compiled(work: Workload, device: str) -> Contestant:
    """The reference by torch.compile."""
    task, merge = Task(work, device), torch.compile(_reference_merge)
    run = partial(merge, task)
    return Contestant(run, checked=run)  # the first run compiles, so it must not count as a round


def _peft(work: Workload, device: str) -> Contestant:
    """PEFT: get_delta_weight of a LoRA layer, then the function of merge_utils with the method's name."""
    from peft.utils import merge_utils

    task, names = Task(work, device), [f"adapter{number}" for number in range(work.adapters)]
    layer, weights = peft_layer(task.pairs, names), torch.tensor(task.weights, device=device)
    merge = merge_utils.task_arithmetic if work.method == "linear" else getattr(merge_utils, work.method)
    arguments = () if work.method == "linear" else (work.density,)

    @torch.no_grad()
    def run() -> Tensor:
        return merge([layer.get_delta_weight(name) for name in names], weights, *arguments)

    def run_with_our_masks() -> Tensor:
        masks = [task.mask(adapter) for adapter in range(work.adapters)]
        with mock.patch.object(torch, "bernoulli", lambda like: masks.pop(0).to(like.dtype)):
            return run()

    return Contestant(run, checked=run_with_our_masks if task.rule.keep == "bernoulli" else None)


def _mergekit(work: Workload, device: str) -> Contestant:
    from mergekit.merge_methods.api import merge_tensors

    task = Task(work, device)
    base = torch.zeros(work.rows, work.columns, device=device)

    @torch.no_grad()
    def run() -> Tensor:
        deltas = [reference.delta(A, B, SCALING) for A, B in task.pairs]
        parameters = {"weight": task.weights, "density": work.density}
        return merge_tensors([base, *deltas], work.method, parameters=parameters, base_index=0)

    return Contestant(run)


def check(work: Workload, results: Results, device: str) -> None:
    """Every result is the merge in float64."""
    in_dtype = Arithmetic(unit=torch.finfo(getattr(torch, work.dtype)).eps / 2)
    # PEFT rounds deltas to the dtype of the factors.
    check_merge(results, Task(work), {"PEFT": in_dtype, "mergekit": Arithmetic("mergekit")})


KIND = Kind(
    {
        "tiled": Entry(tiled, ns=5, devices=("cpu",)),
        "triton": Entry(_triton, ns=0.05, devices=("cuda",)),
        "PEFT": Entry(_peft, ns=65),
        "reference": Entry(_reference, ns=150),
        "compiled": Entry(_compiled, ns=150, on_request=True),
        "mergekit": Entry(_mergekit, ns=100, on_request=True, methods=("ties",)),
    },
    check,
)
