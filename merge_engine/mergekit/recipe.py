"""mergekit's recipes, carried out: the same file gives the same model.

A setting is searched for at the model, then at its slice, its module and the whole recipe; the first one whose filter
fits the tensor counts. Recipes that are one merge into a base by a method of our own become a `Recipe` with
``convention="mergekit"`` (`mergekit.factors`); all others are merged tensor by tensor (`into.whole_job`).
"""

import os
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import yaml

from merge_engine.errors import RecipeError
from merge_engine.files.folder import output_path
from merge_engine.files.shards import SHARD_SIZE
from merge_engine.formats.checkpoint import FLOATS, MODEL_CONFIG, Checkpoint, open_checkpoint
from merge_engine.formats.open import open_adapter
from merge_engine.formats.peft_config import ADAPTER_CONFIG
from merge_engine.into.full_inputs import FullInput, full_input
from merge_engine.into.merge import MergedModel, merge_models
from merge_engine.into.whole_companions import MERGEKIT_FILE, companions_of, output_config
from merge_engine.into.whole_job import WholeJob, make_whole_job
from merge_engine.into.whole_write import run_whole
from merge_engine.mergekit.chat import chat_template
from merge_engine.mergekit.documents import documents_of, in_order, is_made, mark_made
from merge_engine.mergekit.factors import base_of, bind
from merge_engine.mergekit.file import MergekitRecipe, read_recipe
from merge_engine.mergekit.layers import layers_of
from merge_engine.mergekit.reader import Reference
from merge_engine.mergekit.tokens import rows_of_tokens
from merge_engine.rules.recipe import DTYPES
from merge_engine.rules.whole_methods import WHOLE_CONVENTIONS
from merge_engine.runtime.memory import parse_size


def merge_recipe(
    recipe: str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]],
    output: str | Path,
    *,
    seed: int = 0,
    shard_size: int | str = SHARD_SIZE,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool | None = None,
    backend: str | None = None,
    convention: str = "mergekit",
) -> MergedModel:
    """The model that mergekit makes from its YAML file; `merge_models` documents the other arguments.

    recipe: the file, or its parsed YAML; its methods are the rows of `rules.whole_methods.WHOLE_METHODS`. Paths in it
        are relative to the current folder, as in mergekit. Of several documents those with a name may be inputs of
        others: they are written to ``<output>.steps/<name>``, and the one without a name, or else the last, to output.
        A step that is there already, of the same recipe, is not made again. seed: of the random drops.
    convention: "mergekit" has the floors and shortcuts of its code, "published" the methods as they were published.

    All arithmetic is in float32; ``dtype`` and ``out_dtype`` only set the dtype of the output. Random drops are our
    own. Adapters (``model+lora``) are applied when a tensor is read; no copy of a model is written. Raises MergeError
    before anything is written; warns (UserWarning) of keys without effect.
    """
    if convention not in WHOLE_CONVENTIONS:
        raise RecipeError(f"convention: wanted one of {', '.join(WHOLE_CONVENTIONS)}, got {convention!r}")
    options: dict[str, Any] = {"overwrite": overwrite, "dry_run": dry_run, "progress": progress}
    path = output_path(output)
    documents, file = documents_of(recipe)
    if len(documents) > 1:
        if dry_run:
            raise RecipeError(f"{file}: dry_run: later merges need the results of earlier ones; wanted one document")
        again: dict[str, Any] = {"seed": seed, "shard_size": shard_size, "progress": progress}
        again |= {"convention": convention, "backend": backend, "overwrite": overwrite}
        for document, place, is_step in in_order(documents, file, path):
            if is_step and is_made(place, document):
                continue
            result = merge_recipe(document, place, **again)
            if is_step:
                mark_made(place, document)
        return result
    parsed = read_recipe(documents[0] if documents else None, file)
    name = base_of(parsed) if convention == "mergekit" else None
    if name is not None:
        base = _open_model(name)
        bound = bind(parsed, base)
        if bound is not None:
            inputs = [_open(entry.reference) for entry in bound.entries]
            if parsed.dtype is None:
                models = [each for each in inputs if isinstance(each, Checkpoint)]
                bound.fields["dtype"] = _promoted(parsed.file, base, models)
            fields = {**options, **bound.fields}
            return merge_models(base, inputs, path, seed=seed, shard_size=shard_size, backend=backend, **fields)
    job = whole_job(parsed, parse_size(shard_size, "shard_size"), seed, convention == "published")
    return run_whole(job, path, **options)


def _open(reference: Reference) -> Any:
    """The adapter if there is one, else the full model."""
    if reference.lora is not None:
        return open_adapter(reference.lora.path, revision=reference.lora.revision)
    return _open_model(reference)


def _open_model(reference: Reference) -> Checkpoint:
    """The full model, without its adapter. Raises MergeError: RecipeError where it is an adapter."""
    folder = Path(os.path.expanduser(reference.path))
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / MODEL_CONFIG).is_file():
        raise RecipeError(f"{reference.path} is an adapter; wanted it with its model, as MODEL+{reference.path}")
    return open_checkpoint(reference.path, revision=reference.revision)


def whole_job(recipe: MergekitRecipe, shard_size: int, seed: int, published: bool) -> WholeJob:
    """The recipe bound to its models. Raises MergeError where they do not fit it, or each other."""
    inputs = _open_all(recipe)
    found = layers_of(recipe, inputs)
    models = [each.model for each in inputs.values()]
    references = list(inputs)
    donor = inputs[recipe.base or recipe.slices[0].entries[0].reference]
    rows = None
    if recipe.tokenizer is not None:
        number = references.index(recipe.base or recipe.slices[0].entries[0].reference)
        rows = rows_of_tokens(recipe.file, recipe.tokenizer, references, models, number)
    dtype = None if recipe.dtype is None else DTYPES[recipe.dtype]
    try:
        job = make_whole_job(
            list(inputs.values()),
            found.works,
            shard_size=shard_size,
            dtype=dtype,
            rows=rows,
            published=published,
            seed=seed,
        )
    except RecipeError as error:
        raise RecipeError(f"{recipe.file}: {error}") from error
    template = None if recipe.template is None else chat_template(recipe.file, recipe.template, models)
    config = output_config(donor.model, found.layers, _written(job), None if rows is None else rows.rows, found.untied)
    text = yaml.safe_dump(dict(recipe.written), sort_keys=False)
    report = {
        "inputs": [each.source for each in inputs.values()],
        "convention": "published" if published else "mergekit",
        "recipe": dict(recipe.written),
        "added_tokens": {} if rows is None else {token: entry["id"] for token, entry in rows.added.items()},
    }
    files = companions_of(donor, rows, template, config, {MERGEKIT_FILE: text}, report)
    return job.with_companions(files)


def _open_all(recipe: MergekitRecipe) -> dict[Reference, FullInput]:
    """Every model of a recipe; one full model under several names, or with several adapters, is opened once."""
    opened: dict[tuple[str, str | None], Checkpoint] = {}
    inputs = {}
    for reference in recipe.references:
        if reference.place not in opened:
            opened[reference.place] = _open_model(reference)
        lora = reference.lora
        adapter = None if lora is None else open_adapter(lora.path, revision=lora.revision)
        inputs[reference] = full_input(opened[reference.place], adapter)
    return inputs


def _written(job: WholeJob) -> torch.dtype | None:
    """The dtype of the output's tensors; None where they have several."""
    dtypes = {slot.dtype for slot in job.layout.slots.values() if slot.dtype in FLOATS}
    return dtypes.pop() if len(dtypes) == 1 else None


def _promoted(file: str, base: Checkpoint, models: Sequence[Checkpoint]) -> str | None:
    """The dtype that mergekit writes by default: the one that all inputs of a tensor promote to; None: the base's."""
    of_base = {key: stored.dtype for key, stored in base.tensors.items() if stored.dtype in FLOATS}
    stored = [{key: each.tensors[key].dtype for key in of_base.keys() & each.tensors.keys()} for each in models]
    wanted = {
        key: reduce(torch.promote_types, [each[key] for each in stored if key in each], of_base[key]) for key in of_base
    }
    if wanted == of_base:
        return None
    names = sorted({str(dtype).removeprefix("torch.") for dtype in wanted.values()})
    if len(names) > 1 or names[0] not in DTYPES:
        raise RecipeError(f"{file}: wanted a dtype for models that come in {', '.join(names)}, got none")
    return names[0]
