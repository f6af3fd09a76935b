"""Writes the tensors of a merged model: each is read once, merged in float32, rounded once and put to its place."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from xxhash import xxh3_128

from merge_engine.engine.backend import Backend
from merge_engine.engine.cut import cut, scale_of, scaled
from merge_engine.engine.plan import ModulePlan
from merge_engine.engine.prepare import Loaded, Preparation, load_group, merge_loaded, names_of, prepare, work_of
from merge_engine.errors import ModelError, about
from merge_engine.files.journal import Journal
from merge_engine.files.safetensors_writer import tensor_bytes
from merge_engine.files.shards import ShardFiles, Slot
from merge_engine.into.job import IntoJob
from merge_engine.into.resume import finished_keys
from merge_engine.lowrank.products import squared_norm
from merge_engine.models.finetuned import Finetuned, read_finite
from merge_engine.runtime.finite import finite
from merge_engine.runtime.processes import Ranks
from merge_engine.runtime.threads import ahead


class Item(NamedTuple):
    """A tensor on its way to the disk: merged, or to be copied."""

    keys: list[str]
    merged: Tensor | None
    cost: int  # elements, as the progress bar counts them


def write_tensors(job: IntoJob, folder: Path, backend: Backend, ranks: Ranks, progress: bool | None) -> int:
    """Write those of this rank's tensors that no earlier run has finished; how many of the model's were finished."""
    from tqdm import tqdm

    files = ShardFiles(folder, job.layout)
    try:
        with Journal(folder, ranks.rank) as journal:
            done = finished_keys(job, files, folder)
            ranks.wait()  # every rank has read the journal before one adds to it
            keys = list(job.layout.slots)
            keys = [keys[i] for i in ranks.share(_costs(job, keys))]
            plan = replace(job.plan, ranks=ranks, share=_share(job, keys))
            shown = None if progress is None and ranks.rank == 0 else not progress or ranks.rank > 0
            with tqdm(total=work_of(plan), unit="element", unit_scale=True, disable=shown) as bar:
                ready = prepare(plan, backend, bar.update)
                items = _items(replace(job, plan=plan), keys, done, backend, ready)
                for cost in ahead(lambda item: _write(job, files, journal, item), items):
                    bar.update(cost)
    finally:
        files.close()
    return len(done)


def _items(job: IntoJob, keys: Sequence[str], done: set[str], backend: Backend, ready: Preparation) -> Iterator[Item]:
    """Everything that is to be written: merged modules, and between them what is copied, as the base has them."""
    groups = [
        group
        for group in backend.groups(job.plan)
        if not all(done.issuperset(job.keys_of(module.name)) for module in group)
    ]
    copies = [key for key in keys if key not in job.module_of and key not in done]
    loads = ahead(lambda group: _load(job, backend, group), groups)
    for number, (group, bases, loaded) in enumerate(loads, 1):
        with about(names_of(group)):
            merged = _merge(job, backend, bases, loaded, ready)
        for module, tensor in zip(group, merged, strict=True):
            yield Item(job.keys_of(module.name), job.targets[module.name].tensor(tensor.cpu()), module.cost)
        yield from (Item([key], None, 0) for key in copies[number - 1 :: len(groups)])
    if not groups:
        yield from (Item([key], None, 0) for key in copies)


def _load(
    job: IntoJob, backend: Backend, group: Sequence[ModulePlan]
) -> tuple[Sequence[ModulePlan], list[Tensor], Loaded]:
    """A group with its base tensors as [M, N], and its tasks."""
    mixed = any(isinstance(source, Finetuned) for source in job.plan.adapters)
    bases = []
    for module in group:
        target = job.targets[module.name]
        stored = target.stored
        bases.append(target.matrix(read_finite(stored, job.base.name) if mixed else stored.read()))
    return group, bases, load_group(job.plan, backend, group, bases)


def _merge(job: IntoJob, backend: Backend, bases: Sequence[Tensor], loaded: Loaded, ready: Preparation) -> list[Tensor]:
    """base + merged of every module of a group, in the output's dtype, or float32 where its modules differ in that."""
    plan, recipe = job.plan, job.plan.recipe
    dtypes = {job.layout.slots[job.targets[module.name].stored.key].dtype for module in loaded.group}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # rounded by the writer then
    if recipe.space != "factors" and not (plan.on_cores or plan.lifts) and recipe.scale != "auto":
        group = ready.group(plan, loaded.modules, "delta", loaded.packed["delta"])
        return backend.merge(group, scale=recipe.scale, base=bases, dtype=dtype)  # in one pass
    merged = []
    for work, base in zip(merge_loaded(plan, backend, loaded, ready), bases, strict=True):
        if "delta" in work.merged and not plan.lifts:
            delta = work.merged["delta"]
            scale = scale_of(recipe, work.norms(), squared_norm(delta))
            merged.append(delta.mul_(scale).add_(base.to(delta.device)).to(dtype))
        else:
            A, B, _ = scaled(cut(plan, backend, work), recipe, work.module.name).factors
            merged.append(backend.add_product(A.to(backend.device), B.to(backend.device), base, dtype))
    return merged


def _write(job: IntoJob, files: ShardFiles, journal: Journal, item: Item) -> int:
    """Put a tensor to its places and say so in the journal; its cost."""
    for key in item.keys:
        slot, position, digest = job.layout.slots[key], 0, xxh3_128()
        for piece in job.pieces(key, item.merged):
            same = item.merged is None and piece.dtype == slot.dtype  # copied byte for byte
            data = tensor_bytes(piece if same else _cast(piece, slot, merged=item.merged is not None))
            digest.update(data)
            files.write(slot, position, data)
            position += data.nbytes
        journal.finished(key, digest.hexdigest())
    return item.cost


def _cast(tensor: Tensor, slot: Slot, *, merged: bool) -> Tensor:
    """The tensor in its place's dtype; raises ModelError where a value does not fit, or what is merged is no number."""
    cast = tensor.to(slot.dtype)
    if (merged or slot.dtype == torch.float16) and not finite(cast):
        name, largest = str(slot.dtype).removeprefix("torch."), torch.finfo(slot.dtype).max
        wanted = "another dtype, or smaller weights"
        raise ModelError(f"{slot.key} has a value beyond {largest:.5g}, the largest of {name}, or NaN; wanted {wanted}")
    return cast


def _share(job: IntoJob, keys: Sequence[str]) -> frozenset[str]:
    """The modules that are merged into these keys; that of twins goes with the first of them."""
    mine = set(keys)
    return frozenset(name for name, target in job.targets.items() if target.stored.key in mine)


def _costs(job: IntoJob, keys: Sequence[str]) -> list[int]:
    """What each tensor takes, in elements of one task tensor: four bytes are written in the time of one of these.

    That of twins goes with the first of them, as in `_share`.
    """
    costs = dict.fromkeys(keys, 1)
    for module in job.plan.modules:
        costs[job.targets[module.name].stored.key] += module.cost
    for key in keys:
        writer = job.targets[job.module_of[key]].stored.key if key in job.module_of else key
        costs[writer] += job.layout.slots[key].nbytes // 4
    return list(costs.values())


def estimate(job: IntoJob, backend: Backend) -> float:
    """Seconds that the job would take, from merging its module of middle size, and writing at 1 GB/s."""
    seconds = job.layout.nbytes / 1e9
    modules = sorted(job.plan.modules, key=lambda module: module.cost)
    if modules:
        one = replace(job.plan, share=frozenset([modules[len(modules) // 2].name]))
        rule = replace(one.rule, scope="tensor", majority=False)
        sample = replace(job, plan=replace(one, rule=rule))
        ready = Preparation({side: {} for side in one.sides}, dict.fromkeys(one.sides, 1))
        for _ in range(2):  # the first time also loads what computes
            start = time.perf_counter()
            for _ in _items(sample, [], set(), backend, ready):
                pass
        seconds += (time.perf_counter() - start) * work_of(job.plan) / work_of(sample.plan)
    return seconds
