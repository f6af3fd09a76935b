"""Runs a plan: reads ahead, merges module by module, recompresses, writes behind.

The four stages overlap. At most a constant number of merged deltas is in memory at a time, and what is written appears
whole or not at all.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from typing_extensions import Unpack

from merge_engine.engine.backend import Backend
from merge_engine.engine.choose_backend import choose
from merge_engine.engine.cut import MAX_RECOMPRESSIONS, Finished, scaled
from merge_engine.engine.cut_group import cut_modules
from merge_engine.engine.output import Merged, output_of
from merge_engine.engine.plan import ModulePlan, Plan, make_plan
from merge_engine.engine.prepare import prepare, work_of
from merge_engine.files.folder import output_path
from merge_engine.formats.adapter import Adapter
from merge_engine.formats.open import open_adapters
from merge_engine.rules.fields import RecipeFields
from merge_engine.rules.guesses import split_weights
from merge_engine.rules.recipe import Recipe
from merge_engine.runtime.progress import Bar


def merge(
    adapters: Sequence[str | Path | Adapter] | Mapping[str, float],
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: bool | None = None,
    backend: str | None = None,
    **recipe: Unpack[RecipeFields],
) -> Merged:
    """scale * method(w_1 t_1, ..., w_n t_n) for every module of the adapters, cut to a rank: one merged adapter.

    adapters: folders, ``.safetensors`` files or hub ids (``user/repo``) of LoRA adapters on one base; or a mapping of
        them to weights.
    output: the folder to write, loadable by PEFT (a ``.safetensors`` file where the adapters are such files); it
        appears complete or not at all; an existing one is refused unless overwrite. None keeps the result in memory.
    progress: a bar on standard error; None shows it on a terminal only.
    backend: "triton", "torch", or "auto" (Triton on a GPU, torch elsewhere); None: as MERGE_ENGINE_BACKEND says.

    Fields of the recipe; the value after the colon is the default, and `Recipe` says more:
    method: "ties"; any of those that ``merge-engine merge --help`` lists.
    weights: None, which is 1.0 for each adapter; they are not normalised.
    density: None, which is 0.2: the share of elements, 0 to 1, that a trim or a drop keeps.
    scale: 1.0; multiplies the result. "auto": each merged layer is as large as the adapters' are on average.
    gain: 1.0; multiplies scale="auto".
    space: "delta"; or "factors", "core", "knots". balance: None; or "pico".
    convention: "peft"; or "mergekit", "paper". election: "total"; or "frequency".
    scope, trim_ties: None, as the convention says; or "tensor", "model" and "exact", "keep".
    normalize, rescale: None, as the convention says; or True, False and "density", "l1".
    seed: 0; of random drops.
    rank: "auto", the sum of the ranks; or a number. energy: None; or the share of the squared norm to keep, 0 to 1, by
        the smallest rank up to `rank`; 1 keeps all that is not rounding.
    ranks: "one", the same rank for all modules of what is written; or "own". dtype: None, that of the adapters.
    saved: None, which refuses whole layers that differ between adapters; or "average", "first".
    gamma: 0.01; breadcrumbs drops this share of the elements, the largest ones.
    mask: 0.4, a ratio. min_tasks: 2, a number of adapters. Both belong to consensus.
    ridge: 1.0, in units of the mean eigenvalue; belongs to actmat.
    block_weights, module_weights, module_densities: None; or tables by module.
    combination_type, majority_sign_method, svd_rank: PEFT's names for method and space, election, and rank.

    No base model is loaded, and no delta of an adapter is stored. Raises MergeError before anything is written.
    """
    path = None if output is None else output_path(output)
    adapters, fields = split_weights(adapters, recipe)
    asked = Recipe.from_mapping(fields)
    opened = open_adapters(adapters)
    chosen = choose(backend)
    return run(make_plan(opened, asked), path, backend=chosen, overwrite=overwrite, progress=progress)


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
    with Bar(work_of(plan), len(plan.modules), progress) as bar:
        ready = prepare(plan, backend, bar.update)
        workers = min(torch.get_num_threads(), MAX_RECOMPRESSIONS)

        def finish(module: ModulePlan, result: Finished) -> Finished:
            return scaled(result, plan.recipe, module.name)

        for module, result in cut_modules(plan, backend, ready, workers, finish):
            bar.finished(module.cost)
            yield module.name, result
