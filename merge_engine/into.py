"""Merges into a full model: base + scale * merged, streamed tensor by tensor from disk to disk.

The inputs are adapters, whose deltas are never stored, or full models, whose tasks are finetuned - base. Each tensor of
the base is read once, merged in float32, rounded once and written to its place in the shards; what no input touches is
copied byte for byte. Reading, merging and writing overlap. A journal makes an interrupted run go on.
"""

import hashlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from xxhash import xxh3_128

from merge_engine import __version__, jit, ops
from merge_engine.adapter import Adapter, open_adapter, open_adapters
from merge_engine.checkpoint import FLOATS, Checkpoint, open_checkpoint
from merge_engine.engine import Preparation, names_of, prepare, work_of
from merge_engine.errors import MergeError, ModelError, OutputError, RecipeError, about
from merge_engine.finetuned import Finetuned, Target, added_rows, open_finetuned, read_finite
from merge_engine.journal import Journal, check_same, read_journal, remove_journal
from merge_engine.model_files import write_companions
from merge_engine.ops import ModelBackend
from merge_engine.passes import finite
from merge_engine.pipeline import ahead
from merge_engine.place import check_space, check_target, place_folder, sync, wipe, working_folder
from merge_engine.plan import ModulePlan, Plan, make_plan
from merge_engine.ranks import Ranks, join
from merge_engine.recipe import DTYPES, Recipe
from merge_engine.shards import SHARD_SIZE, Layout, ShardFiles, Slot, lay_out, parse_size
from merge_engine.source import is_hub_id
from merge_engine.stream import tensor_bytes, writing
from merge_engine.targets import (
    check_tokens,
    saved_tensors,
    saved_vocabulary,
    targets_of_adapters,
    targets_of_models,
)
from merge_engine.tensors import StoredTensor
from merge_engine.vocabulary import Union, unite

logger = logging.getLogger(__name__)

_HEAD = 1 << 20  # bytes of a file that say what it is

Input = Adapter | Checkpoint


@dataclass(frozen=True)
class MergedModel:
    """A merged full model: where it is (None after a dry run), its size, and what became of its tensors."""

    plan: Plan
    path: Path | None
    nbytes: int
    merged: int  # tensors
    copied: int
    resumed: int  # of these, found finished from an earlier run
    seconds: float  # that it took, or is estimated to take
    shards: dict[str, int]  # bytes by file


@dataclass(frozen=True)
class Job:
    """A plan bound to its base and to the layout of its output."""

    base: Checkpoint
    plan: Plan
    targets: dict[str, Target]  # by module
    saved: dict[str, StoredTensor]  # by key of the base: layers that adapters hold whole
    layout: Layout
    shard_size: int
    union: Union | None = None  # of the vocabularies, where they are united

    @cached_property
    def module_of(self) -> dict[str, str]:
        """The module that is merged into a key; twins of a key are written with it."""
        names = {target.stored.key: name for name, target in self.targets.items()}
        twins = {key: names[first] for key, first in self.base.twins.items() if first in names}
        return names | twins

    def source(self, key: str) -> StoredTensor:
        """What is copied to a key that no module is merged into."""
        return self.saved.get(key, self.base.tensors[key])

    def pieces(self, key: str, merged: Tensor | None) -> Iterable[Tensor]:
        """What is written to a key, in order: a copy, or the merged tensor, and behind it rows that the base lacks.

        Rows of added tokens come into the merged tensor too, in place of the base's padding.
        """
        if merged is None:
            return self.source(key).pieces()
        if self.union is None or not self.union.added or key not in self.union.keys:
            return [merged]
        models = [source for source in self.plan.adapters if isinstance(source, Finetuned)]
        added = added_rows(models, self.base.twins.get(key, key))
        inside = self.union.base_rows - self.union.first
        merged[self.union.first :][: len(added)] = added[:inside].to(merged.dtype)
        return [merged, added[inside:]]

    def keys_of(self, module: str) -> list[str]:
        """The keys that a module is merged into: one, and its twins."""
        key = self.targets[module].stored.key
        return [key, *(twin for twin, first in self.base.twins.items() if first == key)]


class Item(NamedTuple):
    """A tensor on its way to the disk: merged, or to be copied."""

    keys: list[str]
    merged: Tensor | None
    cost: int  # elements, as the progress bar counts them


def merge_into(
    base: str | Path | Checkpoint,
    adapters: Sequence[str | Path | Adapter],
    output: str | Path,
    *,
    shard_size: int | str = SHARD_SIZE,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool | None = None,
    backend: str | None = None,
    vocab: str = "base",
    **recipe: Any,
) -> MergedModel:
    """base + scale * method(w_1 d_1, ..., w_n d_n): adapters merged into a full model, a folder for transformers.

    base: a folder or hub id of a full model: sharded or single safetensors, or ``.bin`` files.
    adapters: folders or hub ids of LoRA adapters trained on it.
    output: the folder to write; it appears complete or not at all. What an interrupted run leaves beside it
        (``.<name>.partial``) is taken up by the next run of the same merge, and refused by any other.
    shard_size: of each weight file at most, as "5GB". dry_run: check and estimate, write nothing.
    vocab: as in `merge_models`.
    recipe: the fields of `Recipe`, without rank and energy; dtype is that of the output, None for the base's own.

    Each merged tensor is base + scale * merged delta in float32, rounded once. Raises MergeError; all but a full disk
    and unreadable files are found before anything is written.
    """
    return merge_models(
        base,
        open_adapters(adapters),
        output,
        shard_size=shard_size,
        overwrite=overwrite,
        dry_run=dry_run,
        progress=progress,
        backend=backend,
        vocab=vocab,
        **recipe,
    )


def merge_models(
    base: str | Path | Checkpoint,
    models: Sequence[str | Path | Input],
    output: str | Path,
    *,
    shard_size: int | str = SHARD_SIZE,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool | None = None,
    backend: str | None = None,
    vocab: str = "base",
    **recipe: Any,
) -> MergedModel:
    """base + scale * method(w_1 (m_1 - base), ...): full models merged with each other, each tensor a task tensor.

    models: folders or hub ids of full models fine-tuned from the base, and of adapters on it, in any mixture.
    vocab: whose tokens the output has: the "base"'s, which every model has to share, or the "union" of all. In a union
        rows of embedding and head are aligned by the strings of their tokens, as tokenizer.json has them. The base's
        tokens keep their indices, and merge as everything does; a model that lacks one counts as unchanged there.
        Others come behind them in order of first appearance, each with the mean of its rows in the models that have it.
        An adapter that holds embedding and head whole, as PEFT saves them with added tokens, is a model in these.
    Other arguments, result and errors as in `merge_into`.
    """
    asked = Recipe.from_mapping(recipe)
    size = parse_size(shard_size)
    opened = base if isinstance(base, Checkpoint) else open_checkpoint(base)
    inputs = [model if isinstance(model, Adapter | Checkpoint) else open_input(model) for model in models]
    job = make_job(opened, inputs, asked, size, vocab)
    return run(job, Path(output), backend=ops.choose(backend), overwrite=overwrite, dry_run=dry_run, progress=progress)


def open_input(source: str | Path) -> Input:
    """An adapter if the folder has an adapter_config.json, else a full model."""
    folder = Path(source).expanduser()
    if not folder.exists() and not is_hub_id(str(source)):
        wanted = "a folder with adapter_config.json or config.json, or a hub id user/repo"
        raise ModelError(f"{source} does not exist, wanted {wanted}")
    if not folder.exists():  # a hub id: what it holds says what it is
        try:
            return open_adapter(source)
        except MergeError:
            return open_checkpoint(source)
    return open_adapter(source) if (folder / "adapter_config.json").is_file() else open_checkpoint(source)


def make_job(base: Checkpoint, inputs: Sequence[Input], recipe: Recipe, shard_size: int, vocab: str = "base") -> Job:
    """Check that the inputs fit the base and the recipe, and say where every tensor of the output goes."""
    if vocab not in ("base", "union"):
        raise RecipeError(f"vocab: wanted base or union, got {vocab!r}")
    adapters = [each for each in inputs if isinstance(each, Adapter)]
    held = {}  # of adapters, as models of their own
    if vocab == "union":
        held = {each: model for each in adapters if (model := saved_vocabulary(base, each)) is not None}
    found = [each if isinstance(each, Checkpoint) else held.get(each) for each in inputs]
    models = [model for model in found if model is not None]
    if recipe.rank != "auto" or recipe.energy is not None:
        raise RecipeError("rank: a merge into a base model is not cut to a rank; wanted neither rank nor energy")
    if models and (recipe.space == "factors" or recipe.method == "cat"):
        what = "is a full model" if models[0] in inputs else "holds its vocabulary whole"
        raise RecipeError(f"space: {models[0].name} {what} and has no factors; wanted space='delta', not cat")
    if recipe.method == "cat":  # stacked factors multiply out to the sum of the deltas
        recipe = replace(recipe, space="delta")
    targets = targets_of_models(base, models, targets_of_adapters(base, adapters))
    described = {name: module for adapter in adapters for name, module in adapter.modules.items()}
    union = unite(base, models) if vocab == "union" else None

    def bind(each: Input) -> Adapter | Finetuned:
        if isinstance(each, Checkpoint):
            return open_finetuned(each, base, targets, described, union)
        return open_finetuned(held[each], base, targets, described, union, each) if each in held else each

    bound = [bind(each) for each in inputs]
    plain = [each for each in adapters if each not in held]
    if union is not None:
        check_tokens(base, plain, targets, union)
    saved = saved_tensors(base, plain)
    plan = make_plan(bound, recipe)
    for key in {target.stored.key for target in targets.values()} & saved.keys():
        raise ModelError(f"{key} is both merged and saved whole by an adapter; such layers cannot be merged")
    dtype = DTYPES[recipe.dtype] if recipe.dtype else None
    shapes = {
        key: (
            dtype if dtype and stored.dtype in FLOATS else stored.dtype,
            (union.rows, *stored.shape[1:]) if union is not None and key in union.keys else stored.shape,
        )
        for key, stored in base.tensors.items()
    }
    return Job(base, plan, targets, saved, lay_out(shapes, shard_size), shard_size, union)


def run(
    job: Job,
    output: Path,
    *,
    backend: ModelBackend,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool | None = None,
) -> MergedModel:
    """Carry out a job: see `merge_into`."""
    start = time.perf_counter()
    touched = len(job.module_of)
    result = MergedModel(
        job.plan, None, job.layout.nbytes, touched, len(job.layout.slots) - touched, 0, 0.0, job.layout.sizes
    )
    inputs = [job.base.path, *job.plan.inputs]
    if dry_run:
        with writing(output):
            check_target(output, overwrite, inputs)
        return replace(result, seconds=_estimate(job, backend))
    ranks = join()
    place: AbstractContextManager[Path] = nullcontext(working_folder(output))
    if ranks.rank == 0:
        place = place_folder(output, overwrite, resume=True, inputs=inputs)
    with place as folder:
        if ranks.rank == 0:
            _take_up(job, output, folder, backend)
        ranks.wait()
        try:
            resumed = _write_tensors(job, folder, backend, ranks, progress)
        except MergeError as error:
            if not isinstance(error, OutputError):
                wipe(folder)  # a mistake in the inputs: there is nothing to go on with
            raise
        ranks.wait()
        if ranks.rank == 0:
            write_companions(folder, job.base, job.plan, job.layout, backend.name, job.union)
            with writing(output):
                sync(folder)  # which takes a while, in which a kill leaves the journal to go on from
            remove_journal(folder)
    ranks.wait()
    return replace(result, path=output, resumed=resumed, seconds=time.perf_counter() - start)


def _take_up(job: Job, output: Path, folder: Path, backend: ModelBackend) -> None:
    """Make the working folder ready: as an earlier run of the same merge left it, or new. Checks the disk's space."""
    identity = _identity(job, backend)
    found, _ = read_journal(folder)
    if found is None:
        wipe(folder)
    else:
        check_same(found, identity, output, folder)
    files = ShardFiles(folder, job.layout)
    try:
        check_space(output, job.layout.nbytes - files.on_disk())
        if found is None:
            with Journal(folder) as journal:
                journal.begin(identity)
        files.create()
    finally:
        files.close()


def _write_tensors(job: Job, folder: Path, backend: ModelBackend, ranks: Ranks, progress: bool | None) -> int:
    """Write those of this rank's tensors that no earlier run has finished; how many of the model's were finished."""
    from tqdm import tqdm

    files = ShardFiles(folder, job.layout)
    try:
        with Journal(folder, ranks.rank) as journal:
            done = _finished(job, files, folder)
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


def _finished(job: Job, files: ShardFiles, folder: Path) -> set[str]:
    """The tensors that the journal says are finished, and that are on the disk as it says."""
    done = set()
    for key, digest in read_journal(folder)[1].items():
        slot = job.layout.slots.get(key)
        if slot is not None and files.digest(slot) == digest:
            done.add(key)
        else:
            logger.warning("%s: %s is damaged, it is made again", folder, key)
    return done


def _items(job: Job, keys: Sequence[str], done: set[str], backend: ModelBackend, ready: Preparation) -> Iterator[Item]:
    """Everything that is to be written: merged modules, and between them what is copied, as the base has them."""
    groups = [
        group
        for group in backend.groups(job.plan)
        if not all(done.issuperset(job.keys_of(module.name)) for module in group)
    ]
    copies = [key for key in keys if key not in job.module_of and key not in done]
    for number, (group, bases, packed) in enumerate(ahead(lambda group: _load(job, backend, group), groups), 1):
        with about(names_of(group)):
            merged = _merge(job, backend, group, bases, packed, ready)
        for module, tensor in zip(group, merged, strict=True):
            yield Item(job.keys_of(module.name), job.targets[module.name].tensor(tensor.cpu()), module.cost)
        yield from (Item([key], None, 0) for key in copies[number - 1 :: len(groups)])
    if not groups:
        yield from (Item([key], None, 0) for key in copies)


def _load(
    job: Job, backend: ModelBackend, group: Sequence[ModulePlan]
) -> tuple[Sequence[ModulePlan], list[Tensor], dict[str, Any]]:
    """A group with its base tensors as [M, N], and its tasks packed by side."""
    mixed = any(isinstance(source, Finetuned) for source in job.plan.adapters)
    bases = []
    for module in group:
        target = job.targets[module.name]
        stored = target.stored
        bases.append(target.matrix(read_finite(stored, job.base.name) if mixed else stored.read()))
    tasks = [job.plan.read(module, base) for module, base in zip(group, bases, strict=True)]
    return group, bases, {side: backend.pack(job.plan, group, tasks, side) for side in job.plan.sides}


def _merge(
    job: Job,
    backend: ModelBackend,
    group: Sequence[ModulePlan],
    bases: Sequence[Tensor],
    packed: dict[str, Any],
    ready: Preparation,
) -> list[Tensor]:
    """base + merged of every module of a group, in the output's dtype, or float32 where its modules differ in that."""
    plan = job.plan
    dtypes = {job.layout.slots[job.targets[module.name].stored.key].dtype for module in group}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # rounded by the writer then

    def merge(side: str, scale: float, **onto: Any) -> list[Tensor]:
        trims, tied = ready.trims[side], ready.tied[side]
        return backend.merge(plan, group, packed[side], side, trims, scale=scale, tied=tied, **onto)

    if plan.recipe.space == "delta":
        return merge("delta", plan.recipe.scale, base=bases, dtype=dtype)
    pairs = zip(merge("A", 1.0), merge("B", plan.recipe.scale), bases, strict=True)
    return [backend.add_product(A, B, base, dtype) for A, B, base in pairs]


def _write(job: Job, files: ShardFiles, journal: Journal, item: Item) -> int:
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


def _share(job: Job, keys: Sequence[str]) -> frozenset[str]:
    """The modules that are merged into these keys; that of twins goes with the first of them."""
    mine = set(keys)
    return frozenset(name for name, target in job.targets.items() if target.stored.key in mine)


def _costs(job: Job, keys: Sequence[str]) -> list[int]:
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


def _estimate(job: Job, backend: ModelBackend) -> float:
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


def _identity(job: Job, backend: ModelBackend) -> dict[str, Any]:
    """What decides every byte of the output: recipe, layout, inputs (by size, time of change and header), versions."""
    recipe = job.plan.recipe
    weights = recipe.weights_for([source.name for source in job.plan.adapters])
    return {
        "recipe": {**recipe.as_dict(), "weights": list(weights)},
        "shard_size": job.shard_size,
        "vocab": "base" if job.union is None else f"union of {len(job.union.tokens)} tokens {job.union.digest[:16]}",
        "backend": backend.name + (" without Numba" if backend.name == "torch" and jit.loops() is None else ""),
        "base": _files(job.base.path, job.base.files),
        "inputs": [_files_of(source) for source in job.plan.adapters],
        "versions": {"merge-engine": __version__, "torch": str(torch.__version__)},
    }


def _files_of(source: Adapter | Finetuned) -> dict[str, Any]:
    if isinstance(source, Finetuned):
        if source.adapter is None:
            return _files(source.model.path, source.model.files)
        source = source.adapter
    return _files(source.path, [file for file in sorted(source.path.iterdir()) if file.name.startswith("adapter_")])


def _files(folder: Path, files: Sequence[Path]) -> dict[str, Any]:
    """{file: size, time of change, and the hash of its first bytes, a header} of what an input is read from."""
    found: dict[str, Any] = {"folder": str(folder.resolve())}
    for file in files:
        stat = file.stat()
        with open(file, "rb") as opened:
            head = hashlib.sha256(opened.read(_HEAD)).hexdigest()
        found[file.name] = f"{stat.st_size} bytes, {stat.st_mtime_ns}, {head[:16]}"
    return found
