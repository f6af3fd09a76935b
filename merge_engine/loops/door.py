"""Whether the compiled loops can be used: they need Numba, which is optional (``pip install "merge-engine[cpu]"``)."""

import functools
import logging
from types import ModuleType
from typing import NamedTuple

logger = logging.getLogger(__name__)


class Loops(NamedTuple):
    """The two modules of compiled loops."""

    tile: ModuleType
    matrix: ModuleType


@functools.cache
def loops() -> Loops | None:
    """The compiled loops, or None where Numba cannot be imported: torch's operators do the same work then."""
    try:
        from merge_engine.loops import matrix_loops, tile_loops
    except ImportError as error:  # not installed, or too old for this numpy
        logger.info("the loops of the CPU backend are not compiled: %s", error)
        return None
    return Loops(tile_loops, matrix_loops)
