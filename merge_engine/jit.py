"""Whether the compiled loops can be used: they need Numba, which is optional (``pip install "merge-engine[cpu]"``)."""

import functools
import logging
from types import ModuleType

logger = logging.getLogger(__name__)


@functools.cache
def loops() -> ModuleType | None:
    """`merge_engine.loops`, or None where Numba cannot be imported; operators do the same work then."""
    try:
        from merge_engine import loops as compiled
    except ImportError as error:  # not installed, or too old for this numpy
        logger.info("the loops of the torch backend are not compiled: %s", error)
        return None
    return compiled
