"""Merges into a full model: base + scale * merged, streamed tensor by tensor from disk to disk.

The inputs are adapters, whose deltas are never stored, and full models, whose task tensors are finetuned - base. Each
tensor of the base is read once, merged in float32, rounded once and written to its place in the shards. Tensors that no
input changes are copied byte for byte. Reading, merging and writing overlap. A journal lets an interrupted run go on
where it stopped.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from merge_engine.engine.backend import Backend
from merge_engine.engine.choose_backend import choose
from merge_engine.engine.plan import Plan
from merge_engine.errors import some, writing
from merge_engine.files.folder import check_target, output_path
from merge_engine.files.locate import SINGLE
from merge_engine.files.shards import SHARD_SIZE, Layout
from merge_engine.formats.adapter import Adapter
from merge_engine.formats.checkpoint import Checkpoint, open_checkpoint
from merge_engine.formats.open import open_adapters
from merge_engine.formats.push import push_output
from merge_engine.into.companions import names_beside, write_companions
from merge_engine.into.job import Input, IntoJob, make_job, open_input
from merge_engine.into.place import place
from merge_engine.into.resume import identity
from merge_engine.into.write import estimate, write_tensors
from merge_engine.models.targets import check_goes_into_a_base
from merge_engine.rules.fields import RecipeFields
from merge_engine.rules.guesses import split_weights
from merge_engine.rules.recipe import Recipe
from merge_engine.runtime.memory import parse_size
from merge_engine.runtime.processes import Ranks


@dataclass(frozen=True)
class MergedModel:
    """A merged full model: its folder (None after a dry run), its size, and how many tensors were merged and copied."""

    plan: Plan | None  # None where whole tensors were merged
    inputs: int  # models and adapters that were merged
    path: Path | None
    nbytes: int
    merged: int  # tensors
    copied: int
    resumed: int  # of these, finished by an earlier run
    seconds: float  # taken, or estimated by a dry run
    shards: dict[str, int]  # bytes by file

    def __repr__(self) -> str:
        where = "not written" if self.path is None else str(self.path)
        tensors = f"{some(self.merged, 'tensor')} merged, {self.copied} copied"
        return f"MergedModel({where}: {some(self.inputs, 'input')}, {tensors}, {some(self.nbytes, 'byte')})"

    def push_to_hub(self, repo: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Send the model to ``user/repo`` on the hub, with a card that loads it from there; the address.

        private: of a new repository; None: as the account has it. token: None: that of ``hf auth login``.
        Raises OutputError: it was a dry run, or the hub does not take it.
        """
        return push_output(self.path, repo, private=private, token=token)


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
    **recipe: Unpack[RecipeFields],
) -> MergedModel:
    """base + scale * method(w_1 d_1, ..., w_n d_n): adapters merged into a full model, a folder for transformers.

    base: a folder or hub id of a full model: sharded or single safetensors, or ``.bin`` files.
    adapters: folders or hub ids of LoRA adapters trained on it.
    output: the folder to write; it appears complete or not at all. An interrupted run leaves ``.<name>.partial`` beside
        it. The next run of the same merge goes on from there; any other merge into that folder raises OutputError.
    shard_size: the most that one weight file holds, as "5GB". dry_run: check and estimate, write nothing.
    vocab: as in `merge_models`.
    recipe: the fields of `Recipe`, without rank and energy; dtype: of the output, None for the base's own.

    Each merged tensor is base + scale * merged delta in float32, rounded once. Raises MergeError, before anything is
    written unless the disk is full or a file cannot be read.
    """
    path = output_path(output)
    adapters, fields = split_weights(adapters, recipe)
    return merge_models(
        base,
        open_adapters(adapters),
        path,
        shard_size=shard_size,
        overwrite=overwrite,
        dry_run=dry_run,
        progress=progress,
        backend=backend,
        vocab=vocab,
        **fields,
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
    **recipe: Unpack[RecipeFields],
) -> MergedModel:
    """base + scale * method(w_1 (m_1 - base), ...): full models merged with each other, each tensor a task tensor.

    models: folders or hub ids of full models fine-tuned from the base, and of adapters on it, in any mixture.
    vocab: the tokens of the output: "base", and then every model must have the base's tokens, or the "union" of all. In
        a union the rows of embedding and head are aligned by the strings of their tokens in tokenizer.json. The base's
        tokens keep their indices, and their rows are merged like all others; a model that lacks one of them counts as
        unchanged in its row. Added tokens follow in order of first appearance; the row of each is the mean of its rows
        in the models that have it. An adapter that holds embedding and head whole, as PEFT saves them with added
        tokens, counts as a full model in these two tensors.
    Other arguments, result and errors as in `merge_into`.
    """
    path = output_path(output)
    models, given = split_weights(models, recipe)
    fields = Recipe.from_mapping(given)
    size = parse_size(shard_size, "shard_size")
    for model in models:
        if isinstance(model, str | Path) and str(model).endswith(SINGLE):
            model = open_input(model)
        if isinstance(model, Adapter):
            check_goes_into_a_base(model)  # before a base is fetched
    opened = base if isinstance(base, Checkpoint) else open_checkpoint(base)
    inputs = [model if isinstance(model, Adapter | Checkpoint) else open_input(model) for model in models]
    job = make_job(opened, inputs, fields, size, vocab)
    return run(job, path, backend=choose(backend), overwrite=overwrite, dry_run=dry_run, progress=progress)


def run(
    job: IntoJob,
    output: Path,
    *,
    backend: Backend,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool | None = None,
) -> MergedModel:
    """Carry out a job: see `merge_into`."""
    start = time.perf_counter()
    touched = len(job.module_of)
    result = MergedModel(
        job.plan,
        len(job.plan.adapters),
        None,
        job.layout.nbytes,
        touched,
        len(job.layout.slots) - touched,
        0,
        0.0,
        job.layout.sizes,
    )
    merge = _Into(job, backend)
    if dry_run:
        with writing(output):
            check_target(output, overwrite, merge.inputs)
        return replace(result, seconds=estimate(job, backend))
    resumed = place(merge, output, overwrite=overwrite, progress=progress)
    return replace(result, path=output, resumed=resumed, seconds=time.perf_counter() - start)


@dataclass(frozen=True)
class _Into:
    """A job and who computes it, as `into.place` carries it out."""

    job: IntoJob
    backend: Backend

    @property
    def layout(self) -> Layout:
        return self.job.layout

    @property
    def inputs(self) -> list[Path]:
        return [self.job.base.path, *self.job.plan.inputs]

    def identity(self) -> dict[str, Any]:
        return identity(self.job, self.backend)

    @property
    def companions(self) -> set[str]:
        return names_beside(self.job.base)

    def write(self, folder: Path, ranks: Ranks, progress: bool | None) -> int:
        return write_tensors(self.job, folder, self.backend, ranks, progress)

    def finish(self, folder: Path) -> None:
        write_companions(folder, self.job.base, self.job.plan, self.job.layout, self.backend.name, self.job.union)
