"""Runs a plan: reads ahead, merges module by module, recompresses, writes behind.

The four stages overlap. At most a constant number of merged deltas is in memory at a time, and what is written appears
whole or not at all.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from merge_engine.engine.backend import Backend
from merge_engine.engine.choose_backend import choose
from merge_engine.engine.cut import MAX_RECOMPRESSIONS, Finished, scaled
from merge_engine.engine.cut_group import cut_modules
from merge_engine.engine.output import Merged, output_of
from merge_engine.engine.plan import ModulePlan, Plan, make_plan
from merge_engine.engine.prepare import prepare, work_of
from merge_engine.formats.adapter import Adapter
from merge_engine.formats.open import open_adapters
from merge_engine.rules.guesses import split_weights
from merge_engine.rules.recipe import Recipe


def merge(
    adapters: Sequence[str | Path | Adapter] | Mapping[str, float],
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: bool | None = None,
    backend: str | None = None,
    **recipe: Any,
) -> Merged:
    """scale * method(w_1 t_1, ..., w_n t_n) for every module of the adapters, cut to a rank: one merged adapter.

    adapters: folders or hub ids (``user/repo``) of LoRA adapters as PEFT writes them; or a mapping of them to weights.
    output: the folder to write, loadable by PEFT; it appears complete or not at all, and an existing one is refused
        unless overwrite. None keeps the result in memory.
    progress: a bar on standard error; None shows it on a terminal only.
    backend: "triton", "torch", or "auto" (Triton on a GPU, torch elsewhere); None: as MERGE_ENGINE_BACKEND says.
    recipe: the fields of `Recipe`: method, weights, density, space, scale, election, scope, trim_ties, convention,
        seed, rank, energy, dtype.

    No base model is loaded, and no delta of an adapter is stored. Raises MergeError before anything is written.
    """
    adapters, recipe = split_weights(adapters, recipe)
    asked = Recipe.from_mapping(recipe)
    opened = open_adapters(adapters)
    chosen = choose(backend)
    return run(make_plan(opened, asked), output, backend=chosen, overwrite=overwrite, progress=progress)


def run(
    plan: Plan,
    output: str | Path | None = None,
    *,
    backend: Backend,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Merged:
    """Carry out a plan: see `merge`."""
    with output_of(plan, backend, None if output is None else Path(output), overwrite) as result:
        for name, factors in merged_modules(plan, backend, progress):
            result.add(name, factors)
    return result.merged


def merged_modules(plan: Plan, backend: Backend, progress: bool | None = None) -> Iterator[tuple[str, Finished]]:
    """(name, result) of every module; reading, merging and recompressing overlap."""
    from tqdm import tqdm

    shown = None if progress is None else not progress
    with tqdm(total=work_of(plan), unit="element", unit_scale=True, disable=shown) as bar:
        ready = prepare(plan, backend, bar.update)
        workers = min(torch.get_num_threads(), MAX_RECOMPRESSIONS)

        def finish(module: ModulePlan, result: Finished) -> Finished:
            return scaled(result, plan.recipe, module.name)

        for module, result in cut_modules(plan, backend, ready, workers, finish):
            bar.update(module.cost)
            yield module.name, result
