"""Whether the compiled loops can be used: they need Numba, which is installed where it has wheels."""

import functools
import logging
import threading
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

logger = logging.getLogger(__name__)
LATE = 2.0  # seconds after which it is said what takes so long; from the cache the loops come in less


class Loops(NamedTuple):
    """The two modules of compiled loops."""

    tile: ModuleType
    matrix: ModuleType


def _was_compiled() -> bool:
    """Whether Numba has left machine code beside the loops; where it may not write there, it has a cache of its own."""
    return any(Path(__file__).parent.glob("__pycache__/tile_loops.*.nbi"))


@functools.cache
def loops() -> Loops | None:
    """The compiled loops, or None where Numba cannot be imported: torch's operators do the same work then."""
    saying = threading.Timer(LATE, logger.warning, ["compiling the loops for this CPU, once: some 10 s"])
    saying.daemon = True
    if not _was_compiled():
        saying.start()
    try:
        from merge_engine.loops import matrix_loops, tile_loops
    except ImportError as error:  # not installed, or too old for this numpy
        logger.info("the loops of the CPU backend are not compiled: %s", error)
        return None
    finally:
        saying.cancel()
    return Loops(tile_loops, matrix_loops)
