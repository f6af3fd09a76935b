"""Writes the tensors of a merged model: each is read once, merged in float32, rounded once and written to its place."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from merge_engine.engine.backend import Backend
from merge_engine.engine.cut import MAX_RECOMPRESSIONS, Finished, recompress, rounding_of, scale_of
from merge_engine.engine.output import warn_of_one_start
from merge_engine.engine.plan import ModulePlan
from merge_engine.engine.prepare import (
    Loaded,
    Preparation,
    Work,
    load_group,
    merge_loaded,
    names_of,
    prepare,
    work_of,
)
from merge_engine.errors import about
from merge_engine.files.journal import Journal
from merge_engine.files.shards import ShardFiles
from merge_engine.into.job import IntoJob
from merge_engine.into.resume import finished_keys
from merge_engine.into.write_pieces import write_pieces
from merge_engine.lowrank.products import squared_norm
from merge_engine.models.finetuned import Finetuned, read_finite
from merge_engine.rules.recipe import Recipe
from merge_engine.runtime.processes import Ranks
from merge_engine.runtime.progress import Bar
from merge_engine.runtime.threads import ahead, threads

GROUP_BYTES = 1 << 26  # of the base, in a group: three are read or merged at a time
Figures = dict[str, Mapping[str, float]]  # by module; see `engine.cut.Finished`
Load = tuple[list[Tensor], Loaded]  # the base tensors of a group as [M, N], and its tasks
MergedTensors = Iterator[tuple[ModulePlan, Tensor]]


class Item(NamedTuple):
    """A tensor on its way to the disk; merged: waits for it and gives it, None where it is copied from the base."""

    keys: list[str]
    merged: Callable[[], Tensor] | None
    cost: int  # elements, as the progress bar counts them


def write_tensors(job: IntoJob, folder: Path, backend: Backend, ranks: Ranks, progress: bool | None) -> int:
    """Write the tensors of this rank that no earlier run has finished.

    Returns how many tensors of the whole model earlier runs had finished.
    """
    files = ShardFiles(folder, job.layout)
    try:
        with Journal(folder, ranks.rank) as journal:
            done = finished_keys(job.layout, files, folder)
            ranks.wait()  # no rank may add to the journal before every rank has read it
            keys = list(job.layout.slots)
            keys = [keys[i] for i in ranks.share(_costs(job, keys))]
            plan = replace(job.plan, ranks=ranks, share=_share(job, keys))
            work, count = work_of(plan), len(plan.mine)
            with Bar(work, count, progress if ranks.rank == 0 else False) as bar:
                ready = prepare(plan, backend, bar.update)
                figures: Figures = {}
                items = _items(replace(job, plan=plan), keys, done, backend, ready, figures)
                for cost in ahead(lambda item: _write(job, files, journal, item), items):
                    if cost:
                        bar.finished(cost)
                bar.reach(work, count)  # with what an earlier run has finished
                if ranks.rank == 0:
                    warn_of_one_start(plan, figures, f"merge into {job.base.name}")
    finally:
        files.close()
    return len(done)


def _items(
    job: IntoJob, keys: Sequence[str], done: set[str], backend: Backend, ready: Preparation, figures: Figures
) -> Iterator[Item]:
    """All items to write: merged modules, with copied tensors spread between them.

    figures: filled with the figures of the modules that are cut.
    """
    groups = [
        group
        for group in within(backend.groups(job.plan), partial(_base_bytes, job), GROUP_BYTES)
        if not all(done.issuperset(job.keys_of(module.name)) for module in group)
    ]
    copies = [key for key in keys if key not in job.module_of and key not in done]
    count = sum(map(len, groups))
    loads = ahead(lambda group: _load(job, backend, group), groups)
    by_factors = _by_factors(job)
    merged = _factors_onto(job, backend, loads, ready, figures) if by_factors else _onto(job, backend, loads, ready)
    for number, (module, tensor) in enumerate(merged):
        arrived = partial(_arrived, job, module, backend.home(tensor))
        del tensor  # else a result of the group before would be held while the next is merged
        yield Item(job.keys_of(module.name), arrived, module.cost)
        yield from (Item([key], None, 0) for key in copies[number::count])
    if not groups:
        yield from (Item([key], None, 0) for key in copies)


def within(
    groups: Iterable[Sequence[ModulePlan]], nbytes: Callable[[ModulePlan], int], most: int
) -> list[Sequence[ModulePlan]]:
    """The groups, cut so that the modules of each take at most so many bytes, or are one."""
    cut: list[Sequence[ModulePlan]] = []
    for group in groups:
        start, held = 0, 0
        for i, module in enumerate(group):
            if i > start and held + nbytes(module) > most:
                cut.append(group[start:i])
                start, held = i, 0
            held += nbytes(module)
        cut.append(group[start:])
    return cut


def _base_bytes(job: IntoJob, module: ModulePlan) -> int:
    """Host memory that a module's whole matrices take: the base's, and those of full models."""
    models = sum(isinstance(job.plan.adapters[number], Finetuned) for number in module.adapters)
    return module.rows * module.columns * job.targets[module.name].stored.dtype.itemsize * (1 + models)


def _arrived(job: IntoJob, module: ModulePlan, home: Callable[[], Tensor]) -> Tensor:
    return job.targets[module.name].tensor(home())


def _load(job: IntoJob, backend: Backend, group: Sequence[ModulePlan]) -> Load:
    mixed = any(isinstance(source, Finetuned) for source in job.plan.adapters)
    bases = []
    for module in group:
        target = job.targets[module.name]
        stored = target.stored
        bases.append(backend.staged(target.matrix(read_finite(stored, job.base.name) if mixed else stored.read())))
    return bases, load_group(job.plan, backend, group, bases)


def _by_factors(job: IntoJob) -> bool:
    """Whether merging makes factors, and not matrices of the base's shape."""
    plan = job.plan
    return plan.on_cores or plan.lifts or plan.recipe.space == "factors"


def _onto(job: IntoJob, backend: Backend, loads: Iterable[Load], ready: Preparation) -> MergedTensors:
    """base + scale * merged of every module, where merging makes matrices of the base's shape."""
    plan, scale = job.plan, job.plan.recipe.scale
    for bases, loaded in loads:
        dtype = _dtype(job, loaded.group)
        with about(names_of(loaded.group)):
            if scale == "auto":
                works = merge_loaded(plan, backend, loaded, ready)
                tensors = [
                    _scaled_onto(work, base, dtype, plan.recipe) for work, base in zip(works, bases, strict=True)
                ]
            else:  # in one pass
                group = ready.group(plan, loaded.modules, "delta", loaded.packed["delta"])
                tensors = backend.merge(group, scale=scale, base=bases, dtype=dtype)
        yield from zip(loaded.group, tensors, strict=True)


def _scaled_onto(work: Work, base: Tensor, dtype: torch.dtype, recipe: Recipe) -> Tensor:
    """base + scale * merged, where the scale depends on the merged delta's norm."""
    delta = work.merged["delta"]
    with threads(1):  # on several threads the sum would differ in its last bits
        norms = work.norms()
        scale = scale_of(recipe, work.module.name, norms, squared_norm(delta), rounding_of(work.module, norms))
    return delta.mul_(scale).add_(base.to(delta.device)).to(dtype)


def _factors_onto(
    job: IntoJob, backend: Backend, loads: Iterable[Load], ready: Preparation, figures: Figures
) -> MergedTensors:
    """base + B A of every module. Modules are cut in the background, on one thread each, as in `engine.merge`."""

    def works() -> Iterator[tuple[Tensor, Work]]:
        for bases, loaded in loads:
            with about(names_of(loaded.group)):
                merged = merge_loaded(job.plan, backend, loaded, ready)
            yield from zip(bases, merged, strict=True)

    def finished(each: tuple[Tensor, Work]) -> tuple[Tensor, ModulePlan, Finished]:
        return each[0], *recompress(job.plan, backend, each[1])

    workers = min(torch.get_num_threads(), MAX_RECOMPRESSIONS)
    for base, module, result in ahead(finished, works(), workers):
        figures[module.name] = result.figures
        A, B = (factor.to(backend.device) for factor in result.factors[:2])
        yield module, backend.add_product(A, B, base, _dtype(job, [module]))


def _dtype(job: IntoJob, group: Sequence[ModulePlan]) -> torch.dtype:
    """The output's dtype; float32 where it differs between the modules, and then the writer rounds."""
    dtypes = {job.layout.slots[job.targets[module.name].stored.key].dtype for module in group}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _write(job: IntoJob, files: ShardFiles, journal: Journal, item: Item) -> int:
    """Write a tensor to its places, and to the journal that it is finished. Returns its cost."""
    merged = None if item.merged is None else item.merged()
    for key in item.keys:
        write_pieces(files, journal, job.layout.slots[key], job.pieces(key, merged), merged=merged is not None)
    return item.cost


def _share(job: IntoJob, keys: Sequence[str]) -> frozenset[str]:
    """The modules that are merged into these keys; the module of twins belongs to the first of them."""
    chosen = set(keys)
    return frozenset(name for name, target in job.targets.items() if target.stored.key in chosen)


def _costs(job: IntoJob, keys: Sequence[str]) -> list[int]:
    """The cost of each tensor, in elements of a task tensor; writing four bytes takes the time of one element.

    The cost of twins belongs to the first of them, as in `_share`.
    """
    costs = dict.fromkeys(keys, 1)
    for module in job.plan.modules:
        costs[job.targets[module.name].stored.key] += module.cost
    for key in keys:
        writer = job.targets[job.module_of[key]].stored.key if key in job.module_of else key
        costs[writer] += job.layout.slots[key].nbytes // 4
    return list(costs.values())


def estimate(job: IntoJob, backend: Backend) -> float:
    """Seconds that the job would take: measured on its module of median size, plus writing at 1 GB/s."""
    seconds = job.layout.nbytes / 1e9
    modules = sorted(job.plan.modules, key=lambda module: module.cost)
    if modules:
        one = replace(job.plan, share=frozenset([modules[len(modules) // 2].name]))
        rule = replace(one.rule, scope="tensor", majority=False)
        sample = replace(job, plan=replace(one, rule=rule))
        ready = Preparation({side: {} for side in one.sides}, dict.fromkeys(one.sides, 1))
        for _ in range(2):  # the first time includes loading compiled code
            start = time.perf_counter()
            for item in _items(sample, [], set(), backend, ready, {}):
                if item.merged is not None:
                    item.merged()
        seconds += (time.perf_counter() - start) * work_of(job.plan) / work_of(sample.plan)
    return seconds
