"""Many merges of the same adapters: a grid of recipes, merged in as few passes over the modules as memory allows."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from merge_engine.engine.backend import Backend
from merge_engine.engine.choose_backend import choose
from merge_engine.engine.output import Merged, output_bytes, output_of
from merge_engine.engine.plan import Plan
from merge_engine.errors import MergeError, OutputError, RecipeError
from merge_engine.files.folder import check_space, output_path
from merge_engine.formats.adapter import Adapter
from merge_engine.many.budget import OWN, result_bytes, room
from merge_engine.many.one_pass import FinishedOrError, merged_modules
from merge_engine.many.pool import Pool, RecipeLike
from merge_engine.runtime.progress import Bar

MOST_TOGETHER = 64  # recipes in one pass; an interrupted sweep loses no more than these


@dataclass(frozen=True)
class Failed:
    """Takes the place of a result that could not be merged, or written."""

    index: int
    name: str
    error: Exception


@dataclass(frozen=True)
class BoundRecipe:
    """One recipe with its number, its name, its plan and its folder."""

    index: int
    name: str
    plan: Plan
    path: Path | None


def merge_many(
    adapters: Sequence[str | Path | Adapter],
    recipes: Sequence[RecipeLike],
    output_dir: str | Path | None = None,
    *,
    names: Sequence[str] | None = None,
    memory: int | str = "4GB",
    overwrite: bool = False,
    progress: bool | None = None,
    backend: str | None = None,
) -> Iterator[Merged | Failed] | list[Merged | Failed]:
    """The results of all recipes, in their order, each with the bits of a single `engine.merge`.

    With an output folder everything is merged and written when the call returns, and the results are a list. Without
    one they are an iterator, and each pass is merged when its first result is asked for.

    adapters: folders, hub ids, or opened adapters. Each is read once.
    recipes: `Recipe` objects, or mappings of its fields and optionally adapters: numbers or names of those to merge, in
        order. They may differ in every field.
    output_dir: each result gets a folder of its own in it, which appears complete or not at all; it is written whether
        anybody looks at the result or not. None keeps results in memory. names: of the folders; default: "000", "001"
        and so on.
    memory: what this process may hold, as "4GB" or in bytes. Results that the caller has taken do not count.
    overwrite, progress, backend: as in `engine.merge`.

    Recipes that share work are merged in one pass over the modules, up to 64 at once, and their results are yielded
    when the pass ends. A recipe that fails on the way yields `Failed`, and the others go on. Raises MergeError, which
    names the recipe, before anything is written.
    """
    results = merge_each(
        *(adapters, recipes, output_dir),
        names=names,
        memory=memory,
        overwrite=overwrite,
        progress=progress,
        backend=backend,
    )
    return results if output_dir is None else list(results)


def merge_each(
    adapters: Sequence[str | Path | Adapter],
    recipes: Sequence[RecipeLike],
    output_dir: str | Path | None = None,
    *,
    names: Sequence[str] | None = None,
    memory: int | str = "4GB",
    overwrite: bool = False,
    progress: bool | None = None,
    backend: str | None = None,
) -> Iterator[Merged | Failed]:
    """`merge_many`, with results as the passes end; what is wrong with a recipe is raised by the call."""
    pool = Pool(adapters, memory)
    paths = _paths(len(recipes), output_dir, names, overwrite)
    merges = [
        BoundRecipe(index, name, _bound(pool, recipe, name), path)
        for index, ((name, path), recipe) in enumerate(zip(paths, recipes, strict=True))
    ]
    if output_dir is not None:
        _check_space(Path(output_dir), sum(output_bytes(merge.plan) for merge in merges))
    passes = _passes(merges, pool)
    chosen = choose(backend)
    for part in passes:
        room([merge.plan for merge in part], chosen, pool.memory, in_memory=output_dir is None)
    return _results(passes, chosen, pool, overwrite, progress)


def _results(
    passes: Sequence[Sequence[BoundRecipe]], backend: Backend, pool: Pool, overwrite: bool, progress: bool | None
) -> Iterator[Merged | Failed]:
    modules = [module for part in passes for merge in part for module in merge.plan.modules]
    work = count = 0
    with Bar(sum(module.cost for module in modules), len(modules), progress) as bar:
        for part in passes:
            results = _one_pass(part, backend, pool, overwrite, bar)
            work += sum(module.cost for merge in part for module in merge.plan.modules)
            count += sum(len(merge.plan.modules) for merge in part)
            for result in results:
                bar.reach(work, count)  # the pass is over, and modules of what failed were left out
                yield result


def _one_pass(
    merges: Sequence[BoundRecipe], backend: Backend, pool: Pool, overwrite: bool, bar: Bar
) -> Iterator[Merged | Failed]:
    plans = [merge.plan for merge in merges]
    shares = pool.begin(plans, backend, in_memory=merges[0].path is None)
    makings = deque(_Making(merge, backend, overwrite) for merge in merges)
    failed = {number for number, making in enumerate(makings) if making.error is not None}
    try:
        for number, module, outcome in merged_modules(plans, backend, pool, shares, failed):
            if not makings[number].take(module.name, outcome):
                failed.add(number)
            bar.finished(module.cost)
        for making in makings:
            making.finish()
    except BaseException as error:
        for making in reversed(makings):  # the first one last: it created the folder that all are in
            making.fail(error)
        raise
    while makings:
        yield makings.popleft().result  # and nothing here holds its memory any more


class _Making:
    """One result while it is being merged."""

    def __init__(self, merge: BoundRecipe, backend: Backend, overwrite: bool) -> None:
        self.merge = merge
        self.error: BaseException | None = None
        self._open = ExitStack()
        try:
            self._output = self._open.enter_context(output_of(merge.plan, backend, merge.path, overwrite))
        except Exception as error:
            self.error = error

    def take(self, module: str, outcome: FinishedOrError) -> bool:
        """Take one module's factors, or its error. False if this result has failed."""
        try:
            if isinstance(outcome, Exception):
                raise outcome
            self._output.add(module, outcome)
        except Exception as error:
            self.fail(error)
        return self.error is None

    def fail(self, error: BaseException) -> None:
        """Remove the folder. Of several errors the first one is kept."""
        if self.error is None:
            self.error = error
            with suppress(Exception):
                self._open.__exit__(type(error), error, error.__traceback__)

    def finish(self) -> None:
        """Every module is there: complete the folder."""
        if self.error is None:
            try:
                self._open.close()
            except Exception as error:
                self.error = error

    @property
    def result(self) -> Merged | Failed:
        if isinstance(self.error, Exception):
            return Failed(self.merge.index, self.merge.name, self.error)
        return self._output.merged


def _paths(
    count: int, output_dir: str | Path | None, names: Sequence[str] | None, overwrite: bool
) -> list[tuple[str, Path | None]]:
    """(name, folder) of each result."""
    found = [f"{index:03}" for index in range(count)] if names is None else list(names)
    if len(found) != count:
        raise RecipeError(f"names: wanted {count}, one for each recipe, got {len(found)}")
    for name in found:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise RecipeError(f"names: wanted the name of a folder, got {name!r}")
        if found.count(name) > 1:
            raise RecipeError(f"names: wanted each one once, got {name!r} {found.count(name)} times")
    if output_dir is None:
        return [(name, None) for name in found]
    paths = [output_path(output_dir) / name for name in found]
    for path in paths:
        if os.path.lexists(path) and not overwrite:
            raise OutputError(f"{path} already exists; pass overwrite to replace it")
    return list(zip(found, paths, strict=True))


def _bound(pool: Pool, recipe: RecipeLike, name: str) -> Plan:
    try:
        return pool.bind(recipe)
    except MergeError as error:
        raise type(error)(f"recipe {name}: {error}") from error


def _check_space(folder: Path, nbytes: int) -> None:
    """Raise OutputError if the results do not fit on the disk together."""
    folder = folder.absolute()
    while not folder.parent.exists():
        folder = folder.parent
    check_space(folder, nbytes)


def _passes(merges: Sequence[BoundRecipe], pool: Pool) -> list[list[BoundRecipe]]:
    """The recipes in passes, in order. Results that stay in memory take at most half of the budget in each pass."""
    passes: list[list[BoundRecipe]] = []
    held = 0
    for merge in merges:
        nbytes = result_bytes(merge.plan) if merge.path is None else 0
        if not passes or len(passes[-1]) == MOST_TOGETHER or held + nbytes > (pool.memory - OWN) // 2:
            passes.append([])
            held = 0
        passes[-1].append(merge)
        held += nbytes
    return passes
