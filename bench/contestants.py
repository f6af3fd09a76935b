"""Who takes part in each kind of benchmark, what their results are checked against, and what they are compared with."""

import importlib.util
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench import into_base, many, peft_backend, whole_merge
from bench.agreement import Disagreement, Habit, check_kth, check_merge
from bench.inputs import MODELS, SCALING, make_adapter, peft_layer
from bench.measure import LEAST, Contestant, Sample
from bench.workloads import STREAM, Task, Workload
from merge_engine.cpu.keep import Drop, KeepTile
from merge_engine.cpu.merge import merge_deltas
from merge_engine.cpu.select import trims, trims_of_each
from merge_engine.cpu.source import Product, for_each_tile
from merge_engine.rules import reference
from merge_engine.runtime.memory import new_tensor, scratch

Build = Callable[[Workload, str], Contestant]  # of a workload, on a device
Results = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """One contestant. ns: nanoseconds an element and adapter, seconds: besides, as two CPU cores were seen to take;
    the first guess of a run's time. asked: only takes part on request. methods: those that it knows, all if empty.
    share: of the nanoseconds, by method where it is not 1."""

    build: Build
    ns: float = 0.0
    seconds: float = 0.0
    asked: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    methods: tuple[str, ...] = ()
    share: Mapping[str, float] = field(default_factory=dict)

    def expected(self, work: Workload) -> float:
        """Seconds of one run."""
        return self.seconds + 1e-9 * self.ns * self.share.get(work.method, 1.0) * work.elements * work.adapters


@dataclass(frozen=True)
class Kind:
    """One kind of benchmark. check(workload, results, device): raises Disagreement unless the results of contestants
    agree, and returns, where there is one, the excess of each one's approximation error. baseline: ratios are to it.
    forks: whether memory is measured in a forked process. checking: nanoseconds an element and adapter of the check.
    roofs: whether what it does is known in bytes and flops. least: rounds."""

    entries: Mapping[str, Entry]
    check: Callable[[Workload, Results, str], Mapping[str, float] | None]
    baseline: tuple[str, ...] = ("PEFT", "reference")
    forks: bool = True
    checking: float = 80.0
    roofs: bool = True
    least: int = LEAST


def taking_part(work: Workload, device: str, asked: tuple[str, ...] = ()) -> dict[str, Entry]:
    """The contestants of a workload: those of its kind that it names, or that are asked for, and that can run here."""
    return {
        name: entry
        for name, entry in KINDS[work.kind].entries.items()
        if device in entry.devices
        and (name in asked if entry.asked else not work.only or name in work.only)
        and (not entry.methods or work.method in entry.methods)
    }


def build(work: Workload, name: str, device: str) -> Contestant:
    """One contestant, ready to run: see `measure.peak_memory`, which builds it in another process."""
    return KINDS[work.kind].entries[name].build(work, device)


# Deltas: from the factors to the merged [M, N], selection included.


def _tiled(work: Workload, device: str) -> Contestant:
    task = Task(work)
    return Contestant(lambda: _tiled_merge(task))


def _tiled_merge(task: Task) -> Tensor:
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
    from merge_engine.kernels import select
    from merge_engine.kernels.source import Drop, pack

    task = Task(work, device)
    rule, adapters = task.rule, work.adapters

    def run() -> Tensor:
        source = pack([task.pairs], [[SCALING] * adapters])
        keep = None
        if rule.keep == "magnitude":
            keep = select.trims(source, torch.tensor([[[task.kept] * adapters]]), ties=rule.trim_ties)
        elif rule.keep == "bernoulli":
            density = torch.full((1, 1, adapters), work.density, dtype=torch.float64)
            keep = Drop(density, [0], torch.tensor([STREAM]), torch.arange(adapters))
        options = {"elect": rule.elect, "divisor": rule.divisor, "vote_weighted": rule.vote_weighted}
        return kernels.merge_deltas(source, [task.weights], keep, **options)[0, 0]

    return Contestant(run)


def _reference_merge(task: Task) -> Tensor:
    deltas = {adapter: reference.delta(A, B, SCALING) for adapter, (A, B) in enumerate(task.pairs)}
    masks = {adapter: task.mask(adapter) for adapter in deltas} if task.rule.keep == "bernoulli" else {}
    densities = {"layer": [task.workload.density] * len(deltas)}
    masked = {"layer": masks} if masks else None
    return reference.merge_model({"layer": deltas}, task.weights, densities, task.rule, masks=masked)["layer"]


def _reference(work: Workload, device: str) -> Contestant:
    task = Task(work, device)
    return Contestant(lambda: _reference_merge(task))


def _compiled(work: Workload, device: str) -> Contestant:
    task, merge = Task(work, device), torch.compile(_reference_merge)
    run = partial(merge, task)
    return Contestant(run, checked=run)  # the first run compiles, however long it takes


def _peft(work: Workload, device: str) -> Contestant:
    """get_delta_weight of a LoRA layer, and the function of PEFT's merge_utils that is named as the method."""
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


def _check_deltas(work: Workload, results: Results, device: str) -> None:
    narrow = Habit(unit=torch.finfo(getattr(torch, work.dtype)).eps / 2)  # PEFT rounds deltas to the factors' dtype
    check_merge(results, Task(work), {"PEFT": narrow, "mergekit": Habit("mergekit")})


HAS_MERGEKIT = importlib.util.find_spec("mergekit") is not None
DELTAS = Kind(
    {
        "tiled": Entry(_tiled, ns=5, devices=("cpu",)),
        "triton": Entry(_triton, ns=0.05, devices=("cuda",)),
        "PEFT": Entry(_peft, ns=65),
        "reference": Entry(_reference, ns=150),
        "compiled": Entry(_compiled, ns=150, asked=True),
        "mergekit": Entry(_mergekit, ns=100, asked=True, methods=("ties",)),
    },
    _check_deltas,
)


# Selection: the k-th largest magnitude of one delta, from the factors.


def _select_tiled(work: Workload, device: str) -> Contestant:
    task = Task(work)
    A, B = task.pairs[0]
    return Contestant(lambda: trims([Product(A, B, SCALING)], task.kept, "exact")[0].value)


def _bare_product(work: Workload, device: str) -> Contestant:
    """Every tile of the product, computed and forgotten: what selection cannot do without."""
    A, B = Task(work).pairs[0]
    return Contestant(lambda: _look_at(Product(A, B, SCALING)))


def _look_at(source: Product) -> None:
    for_each_tile(source, lambda tile: source.fill(tile, scratch("values", tile.shape)))


def _select_triton(work: Workload, device: str) -> Contestant:
    from merge_engine.kernels import select
    from merge_engine.kernels.source import pack

    task = Task(work, device)
    kept = torch.tensor([[[task.kept]]])
    return Contestant(lambda: select.trims(pack([task.pairs[:1]], [[SCALING]]), kept).value)


def _kth(find: Callable[[Tensor, int], Tensor]) -> Build:
    def build_it(work: Workload, device: str) -> Contestant:
        task = Task(work, device)
        A, B = task.pairs[0]
        return Contestant(lambda: find(reference.delta(A, B, SCALING).abs_().flatten(), task.kept))

    return build_it


def _check_select(work: Workload, results: Results, device: str) -> None:
    for name, value in results.items():
        if value is not None:
            check_kth(float(value), Task(work), name)


SELECT = Kind(
    {
        "tiled": Entry(_select_tiled, ns=4, devices=("cpu",)),
        "bare product": Entry(_bare_product, ns=0.7, devices=("cpu",)),
        "triton": Entry(_select_triton, ns=0.05, devices=("cuda",)),
        "topk": Entry(_kth(lambda magnitudes, k: magnitudes.topk(k).values[-1]), ns=50),
        "kthvalue": Entry(_kth(lambda magnitudes, k: magnitudes.kthvalue(magnitudes.numel() + 1 - k).values), ns=20),
    },
    _check_select,
    baseline=("topk",),
)


# Parts: where the time of a merge with a trim goes.


def _part(run: Callable[[Task, list[Product], list[KeepTile]], Any]) -> Build:
    def build_it(work: Workload, device: str) -> Contestant:
        task = Task(work)
        sources = [Product(A, B, SCALING) for A, B in task.pairs]
        keeps = [keep for (keep,) in _thresholds(task, sources, [])]
        return Contestant(lambda: run(task, sources, keeps))

    return build_it


def _look_at_all(task: Task, sources: list[Product], keeps: list[KeepTile]) -> None:
    for source in sources:
        _look_at(source)


def _check_parts(work: Workload, results: Results, device: str) -> None:
    for name in ("whole", "merge, thresholds known"):
        check_merge({name: results[name]}, Task(work))


def _thresholds(task: Task, sources: list[Product], keeps: list[KeepTile]) -> Any:
    return trims_of_each(sources, [[task.kept]] * len(sources), task.rule.trim_ties)


def _known(task: Task, sources: list[Product], keeps: list[KeepTile]) -> Any:
    return merge_deltas(sources, task.weights, keeps, task.rule)


def _zeros(task: Task, sources: list[Product], keeps: list[KeepTile]) -> Any:
    return new_tensor((sources[0].rows, sources[0].columns)).zero_()


PARTS = Kind(
    {
        "whole": Entry(_tiled, ns=5, devices=("cpu",)),
        "thresholds": Entry(_part(_thresholds), ns=3, devices=("cpu",)),
        "merge, thresholds known": Entry(_part(_known), ns=2, devices=("cpu",)),
        "bare products": Entry(_part(_look_at_all), ns=1, devices=("cpu",)),
        "a result of zeros": Entry(_part(_zeros), ns=1, devices=("cpu",)),
    },
    _check_parts,
    baseline=("whole",),
    forks=False,
)


# Threads: the same merge on one thread and on more.


def _on_threads(count: int) -> Build:
    def build_it(work: Workload, device: str) -> Contestant:
        task = Task(work)

        def ready() -> None:
            torch.set_num_threads(count)
            _tiled_merge(task)  # the threads are there, and their cores awake

        return Contestant(lambda: _tiled_merge(task), ready=ready)

    return build_it


THREADS = {1: "1 thread"} | {count: f"{count} threads" for count in (2, 4, 8, 16) if count <= (os.cpu_count() or 1)}
THREADED = Kind(
    {name: Entry(_on_threads(count), ns=5 / count**0.5, devices=("cpu",)) for count, name in THREADS.items()},
    _check_deltas,
    baseline=("1 thread",),
)


# PEFT's add_weighted_adapter and the drop-in.


# The layers of the model that PEFT adapts, from a workload's layers, rows and columns.
PEFT_MODELS: dict[str, Callable[[int, int, int, str], Any]] = {
    "factors": lambda layers, rows, columns, device: peft_backend.tiny_llama(layers, device),
    "layer": lambda layers, rows, columns, device: peft_backend.layers_of([(rows, columns)], device),
    # 2048 x 2048 and 2048 x 5632
    "recompress": lambda layers, rows, columns, device: peft_backend.layers_of(
        [(rows, columns), (rows, columns * 11 // 4)], device
    ),
}


@lru_cache(maxsize=2)
def _peft_model(kind: str, layers: int, rows: int, columns: int, device: str) -> Any:
    return PEFT_MODELS[kind](layers, rows, columns, device)


def _model_of(work: Workload, device: str) -> Any:
    return _peft_model(work.kind, work.layers, work.rows, work.columns, device)


def _combine(rival: str) -> Build:
    def build_it(work: Workload, device: str) -> Contestant:
        model = _model_of(work, device)
        drawn = {"rng": "torch", "seed": 1} if rival == "drop-in" and "dare" in work.method else {}

        def add(**options: Any) -> list[Tensor]:
            peft_backend.RIVALS[rival](model, combination_type=work.method, **options)
            return peft_backend.weights_of(model, rival)

        return Contestant(
            add, ready=lambda: peft_backend.forget(model, rival), checked=(lambda: add(**drawn)) if drawn else None
        )

    return build_it


def _check_combination(work: Workload, results: Results, device: str) -> Mapping[str, float] | None:
    excess = peft_backend.compare(_model_of(work, device), work.method, results)
    if not excess.get("drop-in", 0.0) <= 1e-3:
        raise Disagreement(f"{work.name}: the error is {excess['drop-in']:.1e} above that of the best cut")
    return excess


FACTORS = Kind(
    {"drop-in": Entry(_combine("drop-in"), seconds=0.4), "PEFT": Entry(_combine("PEFT"), seconds=1.0)},
    _check_combination,
    checking=5,
    roofs=False,
)
# The elements of the wider layer come to those that a workload knows of.
RECOMPRESS = replace(
    FACTORS,
    checking=150,
    entries={"drop-in": Entry(_combine("drop-in"), ns=30), "PEFT": Entry(_combine("PEFT"), ns=900)},
)
LAYER = replace(
    FACTORS,
    checking=40,
    entries={"drop-in": Entry(_combine("drop-in"), ns=8), "PEFT": Entry(_combine("PEFT"), ns=200)},
    least=1,
)


# Whole adapters, disk to disk, in processes of their own.


@lru_cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """Removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="merge_engine_bench_")


@lru_cache
def _scratch_in_memory() -> tempfile.TemporaryDirectory[str]:
    """The same, where the disk does not limit how fast several processes write, if there is such a place."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="merge_engine_bench_", dir=place)


def _on_disk(work: Workload) -> list[Path]:
    folders = [Path(_scratch().name, f"{work.model}-{work.layers}-{number}") for number in range(work.adapters)]
    for seed, folder in enumerate(folders):
        if not folder.exists():
            make_adapter(folder, seed, work.layers, MODELS[work.model])
    return folders


def _whole(work: Workload, device: str) -> Contestant:
    folders, output = _on_disk(work), Path(_scratch().name, "merged")
    recipe = {"method": work.method, "density": work.density, "rank": work.rank, "overwrite": True}
    return Contestant(lambda: whole_merge.merged(folders, output, recipe), own_clock=True)


def _check_whole(work: Workload, results: Results, device: str) -> Mapping[str, float] | None:
    excess = {
        name: whole_merge.excess(_on_disk(work), folder, work.method, work.density, work.rank)
        for name, folder in results.items()
    }
    if not max(excess.values()) <= 1e-3:
        raise Disagreement(f"{work.name}: the error of one module is {max(excess.values()):.1e} above the best cut's")
    return excess


# PEFT's row comes from those of kind layer: see `whole_merge.with_extrapolation`.
WHOLE = Kind(
    {"merge-engine": Entry(_whole, ns=3, seconds=4)},
    _check_whole,
    baseline=(),
    forks=False,
    checking=0,
    roofs=False,
)


# Into a base model, whole processes.


@lru_cache
def _base_and_adapters(layers: int, model: str, in_memory: bool) -> tuple[Path, list[Path]]:
    folder = (_scratch_in_memory if in_memory else _scratch)().name
    return into_base.make_inputs(Path(folder, f"into-{model}-{layers}"), layers, MODELS[model])


def _into_base(run: Callable[[Path, list[Path], str], Sample], in_memory: bool = False) -> Build:
    def build_it(work: Workload, device: str) -> Contestant:
        base, adapters = _base_and_adapters(work.layers, work.model, in_memory)
        return Contestant(lambda: run(base, adapters, work.method), own_clock=True)

    return build_it


def _check_base(work: Workload, results: Results, device: str) -> Mapping[str, float] | None:
    base, adapters = _base_and_adapters(work.layers, work.model, False)
    into_base.check(base, adapters, work.method, results["merge-engine"])
    # Where deltas are dropped at random, the rival draws masks of its own.
    return into_base.excess(base, adapters, results) if work.method == "ties" and len(results) > 1 else None


BASE = Kind(
    {
        "merge-engine": Entry(_into_base(into_base.run_ours), seconds=7),
        "mergekit-yaml": Entry(_into_base(into_base.run_mergekit), seconds=60, asked=True),
    },
    _check_base,
    baseline=("mergekit-yaml",),
    forks=False,
    checking=0,
    roofs=False,
)


def _check_ranks(work: Workload, results: Results, device: str) -> None:
    base, adapters = _base_and_adapters(work.layers, work.model, True)
    outputs, digests = zip(*results.values(), strict=True)
    if len(set(digests)) != 1:
        raise Disagreement(f"{work.name}: the outputs of {', '.join(results)} have different bytes")
    into_base.check(base, adapters, work.method, outputs[-1])


RANKS = Kind(
    {
        "1 rank": Entry(_into_base(partial(into_base.run_ranks, 1), in_memory=True), seconds=13),
        "2 ranks": Entry(_into_base(partial(into_base.run_ranks, 2), in_memory=True), seconds=10),
    },
    _check_ranks,
    baseline=("1 rank",),
    forks=False,
    checking=0,
    roofs=False,
)


# Many recipes.


def _way(way: str, count: Callable[[list[float]], float] = sum) -> Build:
    def build_it(work: Workload, device: str) -> Contestant:
        adapters = _on_disk(work)
        return Contestant(lambda: many.measured(way, adapters, work.method, count), own_clock=True)

    return build_it


def _later(seconds: list[float]) -> float:
    """Of a merge after the first: it changes weights only."""
    return statistics.median(seconds[1:])


def _check_many(work: Workload, results: Results, device: str) -> None:
    if len(set(results.values())) != 1:
        raise Disagreement(f"{work.name}: the results of {', '.join(results)} have different bits")


CHEAP = {"linear, weights x scale": 0.08, "ties of factors, density x weights": 0.08}
MANY = Kind(
    {
        "singly": Entry(_way("singly"), ns=70, seconds=4, devices=("cpu",), share=CHEAP),
        "merge_many": Entry(_way("merge_many"), ns=30, seconds=4, devices=("cpu",), share=CHEAP),
        "Session": Entry(_way("Session"), ns=35, seconds=4, devices=("cpu",), share=CHEAP),
    },
    _check_many,
    baseline=("singly",),
    forks=False,
    checking=0,
    roofs=False,
    least=1,  # of 16 merges
)
SESSION = replace(
    MANY,
    entries={
        "singly": Entry(_way("singly", _later), ns=18, seconds=4, devices=("cpu",)),
        "Session": Entry(_way("Session", _later), ns=10, seconds=4, devices=("cpu",)),
    },
)

KINDS: dict[str, Kind] = {
    "select": SELECT,
    "deltas": DELTAS,
    "threads": THREADED,
    "parts": PARTS,
    "elements": DELTAS,
    "adapters": DELTAS,
    "factors": FACTORS,
    "recompress": RECOMPRESS,
    "layer": LAYER,
    "whole": WHOLE,
    "base": BASE,
    "ranks": RANKS,
    "many": MANY,
    "session": SESSION,
}
