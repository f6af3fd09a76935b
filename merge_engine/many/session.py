"""A search over recipes: the same adapters are merged again and again, and each merge pays only for what changed.

with merge_engine.Session(["sql", "chat", "ads"]) as session:
    best = max(grid, key=lambda scale: score(session.merge(method="ties", density=0.2, scale=scale)))
"""

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from types import TracebackType

from typing_extensions import Unpack

from merge_engine.engine.choose_backend import choose
from merge_engine.engine.output import Merged, output_of
from merge_engine.errors import RecipeError, some
from merge_engine.files.folder import output_path
from merge_engine.formats.adapter import Adapter
from merge_engine.many.one_pass import merged_modules
from merge_engine.many.pool import Pool
from merge_engine.rules.fields import BoundFields
from merge_engine.runtime.memory import size_text

_SHOWN = 4  # adapters that a repr names


class Session:
    """Adapters that stay open, and a cache, within a memory budget, of what their merges have in common.

    The cache holds factors, thresholds by density, decomposed stacks (for methods that keep every element) and the
    factors of results. So other weights need no new selection and no new decomposition, and another scale needs one
    product. Adapters are read and checked when the session opens; a later change of their files may go unnoticed.

    adapters: folders, hub ids, or opened adapters. memory: what this process may hold, as "4GB" or in bytes.
    backend: as in `engine.merge`. Threads may share a session; they take turns, since one merge uses all cores.
    Raises MergeError for adapters that cannot be merged, or an invalid size.
    """

    def __init__(
        self, adapters: Sequence[str | Path | Adapter], *, memory: int | str = "4GB", backend: str | None = None
    ) -> None:
        self._backend = choose(backend)
        self._pool: Pool | None = Pool(adapters, memory, keeps_results=True)
        self._turn = Lock()

    def merge(
        self, output: str | Path | None = None, *, overwrite: bool = False, **recipe: Unpack[BoundFields]
    ) -> Merged:
        """`engine.merge` of the session's adapters, bit for bit.

        recipe: the fields of `Recipe`, and adapters: numbers or names of those to merge, in order; None: all.
        Raises MergeError before anything is written: also if the budget is too small for the merge, or the session is
        closed (RecipeError).
        """
        path = None if output is None else output_path(output)
        with self._turn:
            if self._pool is None:
                raise RecipeError("session: wanted an open one, got one that is closed")
            plan = self._pool.bind(recipe)
            room = self._pool.begin([plan], self._backend, in_memory=path is None)
            with output_of(plan, self._backend, path, overwrite) as result:
                for _, module, outcome in merged_modules([plan], self._backend, self._pool, room, set()):
                    if isinstance(outcome, Exception):
                        raise outcome
                    result.add(module.name, outcome)
        return result.merged

    def close(self) -> None:
        """Forget the adapters, and free the cache."""
        with self._turn:
            self._pool = None

    def __repr__(self) -> str:
        pool = self._pool
        if pool is None:
            return "Session(closed)"
        names = [adapter.name for adapter in pool.adapters]
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        modules = len({module for adapter in pool.adapters for module in adapter.modules})
        cache = f"cache {size_text(pool.cache.held)} of {size_text(pool.cache.limit)}"
        return f"Session({some(len(names), 'adapter')}: {shown}; {some(modules, 'module')}; {cache})"

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
