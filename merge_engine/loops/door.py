"""Where the compiled loops come in: they need Numba, which is installed where it has wheels.

Where it is installed, `loops` are loaded once there is enough to do for them: until then operators of numpy and torch
do the same work, and give the same bits. The loops for products with a matrix are another matter: nothing else gives
their bits, so that `matrix_loops` are loaded whenever they are asked for.
"""

import functools
import importlib
import importlib.util
import logging
import threading
from types import ModuleType

logger = logging.getLogger(__name__)
# Elements of task tensors. Operators take some 25 ns longer for each than loops do, on one thread.
LOADING = 1 << 24  # 0.4 s, as Numba and the loops take to load
COMPILING = 1 << 28  # 7 s; compiling takes 13 s on one thread
LATE = 2.0  # seconds after which it is said what takes so long; from the cache the loops come in less

_lock = threading.Lock()
_loaded: dict[str, ModuleType | None] = {}
_seen = 0  # work so far


@functools.cache
def installed() -> bool:
    """Whether Numba is installed: products of factors are then summed in the order of the loops, whoever computes."""
    return importlib.util.find_spec("numba") is not None


def loops(work: int = 0) -> ModuleType | None:
    """`tile_loops`, or None where operators are to do the work: without Numba, or as long as there is little to do.

    work: elements of task tensors that are about to be looked at. Once it is not None it stays so.
    """
    return _where_it_pays("tile_loops", work)


def rank_loops(work: int = 0) -> ModuleType | None:
    """`rank_loops`, or None: as `loops`."""
    return _where_it_pays("rank_loops", work)


def whole_loops(work: int = 0) -> ModuleType | None:
    """`whole_loops`, or None: as `loops`."""
    return _where_it_pays("whole_loops", work)


def matrix_loops() -> ModuleType | None:
    """`matrix_loops`, or None without Numba."""
    return _load("matrix_loops") if installed() else None


def load() -> bool:
    """Load all loops, whatever there is to do. Returns whether there are any."""
    names = ("tile_loops", "matrix_loops", "rank_loops", "whole_loops")
    return installed() and all([_load(name) for name in names])


def state() -> str:
    """What to say of the loops here; nothing is compiled for it."""
    if not installed():
        return "not installed, so that merges on the CPU take about twice as long"
    try:
        from merge_engine.loops import kept
    except ImportError as error:
        return f"not used, since it cannot be imported, so that merges on the CPU take longer: {error}"
    return "compiled loops" if kept.is_kept("tile_loops") else "loops that are compiled when a merge first needs them"


def _where_it_pays(name: str, work: int) -> ModuleType | None:
    global _seen
    if not installed():
        return None
    if work and name not in _loaded:
        _seen += work  # two threads at once may lose some: it is an estimate
        if _seen >= LOADING and _is_worth_it(name):
            return _load(name)
    return _loaded.get(name)


def _is_worth_it(name: str) -> bool:
    """Whether machine code is on disk, or there is so much to do that it is better to wait for the compiler."""
    if _seen >= COMPILING:
        return True
    try:
        from merge_engine.loops import kept
    except ImportError:
        return True  # `_load` says what is wrong
    return kept.is_kept(name) or not kept.compile_in_background()


def _load(name: str) -> ModuleType | None:
    """A module of loops, compiled now if there is no machine code on disk; None where Numba cannot be imported."""
    if name in _loaded:
        return _loaded[name]
    with _lock:
        if name not in _loaded:
            saying = threading.Timer(LATE, logger.warning, ["compiling the loops for this CPU, once: some 10 s"])
            saying.daemon = True
            try:
                from merge_engine.loops import kept

                if not kept.is_kept(name):
                    saying.start()
                _loaded[name] = importlib.import_module(f"merge_engine.loops.{name}")
                kept.keep(name)
            except ImportError as error:  # too old for this numpy, say
                logger.warning("Numba is installed, but cannot be imported, so that merges take longer: %s", error)
                _loaded[name] = None
            finally:
                saying.cancel()
        return _loaded[name]
