"""The cut of all modules of a group at once, for a device on which small operators cost more than their arithmetic."""

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from merge_engine.engine.backend import Backend
from merge_engine.engine.cut import (
    CutFactors,
    Decompositions,
    Finished,
    cut,
    finished,
    merge_cores,
    start_rows,
    strengths_of,
    widest_start,
)
from merge_engine.engine.plan import ModulePlan, Plan
from merge_engine.engine.prepare import Preparation, Work, merged_groups
from merge_engine.errors import about
from merge_engine.lowrank.batched import PART_BYTES, cut_matrices
from merge_engine.lowrank.batched_stack import Stacks
from merge_engine.lowrank.core_methods import MergedCore
from merge_engine.lowrank.cores import Cores
from merge_engine.runtime.threads import ahead

logger = logging.getLogger(__name__)
MAX_GROUPS = 2  # cut at a time: each holds the merged deltas of a group
_Found = list[CutFactors | None]  # None: a module that is left to `cut`


def cut_modules(
    plan: Plan,
    backend: Backend,
    ready: Preparation,
    workers: int,
    finish: Callable[[ModulePlan, Finished], Finished],
) -> Iterator[tuple[ModulePlan, Finished]]:
    """Every module of a plan, merged, and cut by so many threads in the background, which call `finish` as well."""

    def cut_part(works: Sequence[Work]) -> list[tuple[ModulePlan, Finished]]:
        results = cut_works(plan, backend, works)
        return [(work.module, finish(work.module, each)) for work, each in zip(works, results, strict=True)]

    parts = (part for works in merged_groups(plan, backend, ready) for part in cut_at_once(backend, works))
    for results in ahead(cut_part, parts, cutters(backend, workers)):
        yield from results


def cut_at_once(backend: Backend, works: list[Work]) -> list[list[Work]]:
    """The modules of a group in parts that `cut_works` takes: all of them where the backend says so, or one by one."""
    return [works] if backend.cuts_groups else [[work] for work in works]


def cutters(backend: Backend, workers: int) -> int:
    """How many of `workers` threads cut such parts."""
    return min(workers, MAX_GROUPS) if backend.cuts_groups else workers


def cut_works(plan: Plan, backend: Backend, works: Sequence[Work]) -> list[Finished]:
    """The cut of each module."""
    return cut_group(plan, backend, works) if backend.cuts_groups else [cut(plan, backend, work) for work in works]


def cut_group(plan: Plan, backend: Backend, works: Sequence[Work]) -> list[Finished]:
    """What `cut` makes of each module, by as few operators on the device for many modules as for one.

    Results agree with those of `cut` to the tolerance of `lowrank.krylov.from_matrix`, and to rounding where factors
    add up or cores are merged. Modules whose cut is not found so go through `cut`, as do all of them where the device
    is out of memory, and where there is nothing to decompose: stacked factors, rules on factors, common spaces.

    Raises RecipeError, naming the module, where numbers overflow float32.
    """
    alike: dict[Hashable, list[int]] = {}
    for i, work in enumerate(works):
        alike.setdefault(_shape(work), []).append(i)
    results: dict[int, Finished] = {}
    for numbers in _parts(plan, works, alike.values()):
        some = [works[i] for i in numbers]
        try:
            found = _together(plan, backend, some)
        except torch.OutOfMemoryError:
            logger.info("%s: out of memory with %d modules cut at once, going on one by one", backend.device, len(some))
            found = [None] * len(some)
        for i, work, each in zip(numbers, some, found, strict=True):
            if each is None:
                results[i] = cut(plan, backend, work)
            else:
                with about(work.module.name):
                    results[i] = finished(plan, work, each, Decompositions())
    return [results[i] for i in range(len(works))]


def _shape(work: Work) -> Hashable:
    """Modules of which this is the same are cut at once."""
    module = work.module
    ranks = tuple(len(task[0]) if isinstance(task, tuple) else None for task in work.factors)
    return module.rows, module.columns, module.rank, ranks


def _parts(plan: Plan, works: Sequence[Work], alike: Iterable[list[int]]) -> Iterator[list[int]]:
    """Modules that are cut at once; of merged deltas, `cut_matrices` bounds the memory."""
    for numbers in alike:
        size = len(numbers)
        if plan.by_factors:
            module, factors = works[numbers[0]].module, works[numbers[0]].factors
            ranks = sum(len(A) for A, _ in factors)
            size = max(1, PART_BYTES // Stacks.nbytes(max(ranks, 1), module.rows, module.columns))
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


def _together(plan: Plan, backend: Backend, works: Sequence[Work]) -> _Found:
    if plan.lifts or plan.stacks:
        return [None] * len(works)
    if plan.on_cores:
        return _on_cores(plan, backend, works)
    if plan.by_factors:
        return _sums(plan, backend, works)
    if "delta" in works[0].merged:
        return _matrices(plan, backend, works)
    return [None] * len(works)


def _matrices(plan: Plan, backend: Backend, works: Sequence[Work]) -> _Found:
    """Merged deltas."""
    rank, merged = works[0].module.rank, _stacked([work.merged["delta"] for work in works])
    rows = _side(works, 0)
    if rows.shape[1] > widest_start(rank):
        rows = torch.stack([start_rows([A.float() for A, _ in work.factors], rank) for work in works])
    cuts = cut_matrices(merged, rows.to(merged.device), rank, plan.recipe.energy)
    return [None if each is None else CutFactors(each, {}) for each in map(cuts.of, range(len(works)))]


def _sums(plan: Plan, backend: Backend, works: Sequence[Work]) -> _Found:
    """Sums of products."""
    stacks = _stacks(backend, works)
    if stacks is None:
        return [None] * len(works)
    strengths = [strengths_of(work.module) for work in works]
    cuts, values = stacks.cut(strengths, works[0].module.rank, plan.recipe.energy)
    found = map(cuts.of, range(len(works)))
    return [None if each is None else CutFactors(each, {}, own) for each, own in zip(found, values, strict=True)]


def _on_cores(plan: Plan, backend: Backend, works: Sequence[Work]) -> _Found:
    """Methods on cores."""
    stacks = _stacks(backend, works)
    if stacks is None:
        return [None] * len(works)
    merged: list[tuple[MergedCore, dict[str, float]] | None] = [None] * len(works)
    for i, work in enumerate(works):
        if stacks.found[i]:
            with about(work.module.name):
                merged[i] = merge_cores(plan.recipe, work.module, Cores(stacks.triangles(i), work.module.scalings))
    cores = [None if each is None else each[0].svd for each in merged]
    noises = [0.0 if each is None else each[0].noise for each in merged]
    cuts, values = stacks.unfold(cores, noises, works[0].module.rank, plan.recipe.energy)
    found: _Found = []
    for i, own in enumerate(merged):
        each = cuts.of(i)
        found.append(None if each is None or own is None else CutFactors(each, own[1], values[i]))
    return found


def _stacks(backend: Backend, works: Sequence[Work]) -> Stacks | None:
    """The factors of a group, decomposed; None where the ranks add up to more than a side."""
    module, ranks = works[0].module, [len(A) for A, _ in works[0].factors]
    if not 0 < sum(ranks) <= min(module.rows, module.columns):
        return None
    rows, columns = (_side(works, side).to(backend.device).float() for side in (0, 1))
    return Stacks(rows, columns, ranks)


def _side(works: Sequence[Work], side: int) -> Tensor:
    """All A [G, R, N], or all B^T [G, R, M], their adapters stacked; in one dtype, where they are stored."""
    factors = [task[side] if side == 0 else task[side].T for work in works for task in work.factors]
    if len({factor.dtype for factor in factors}) > 1:
        factors = [factor.float() for factor in factors]
    joined = torch.cat(factors)
    return joined.view(len(works), -1, joined.shape[1])


def _stacked(matrices: Sequence[Tensor]) -> Tensor:
    """[G, M, N]: a view where the matrices are the slices of one tensor, as a launch leaves them."""
    first = matrices[0]
    start, size = first.storage_offset(), first.numel()
    in_a_row = all(
        each.is_contiguous()
        and each.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and each.storage_offset() == start + i * size
        for i, each in enumerate(matrices)
    )
    if in_a_row:
        return first.as_strided((len(matrices), *first.shape), (size, *first.stride()), start)
    return torch.stack(list(matrices))
