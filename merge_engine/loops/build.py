"""How the loops are compiled by Numba, for this CPU and kept on disk.

Numba's cache does not see a change in a helper that lies in another file: a loop and its helpers are in one file, and
whoever changes this one clears the caches (`__pycache__` beside it).
"""

from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

F0, F1 = np.float32(0), np.float32(1)


def _folder() -> Path | None:
    """Where Numba keeps machine code: beside this file or in the user's cache; None if it can nowhere."""
    try:
        path = numba.njit(cache=True)(_folder).stats.cache_path
    except RuntimeError:  # no place for it
        return None
    return None if path is None else Path(path)


FOLDER = _folder()
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
part = numba.njit(**OPTIONS)  # of a loop; its machine code is kept with that of its caller


def compiled(*signatures: Any) -> Any:
    """Compiled when this module is imported, for these types only, and always in this order.

    Numba numbers the files of its cache as they come: in any other order, processes that fill it at once could take
    each other's.
    """
    return numba.njit(list(signatures), cache=FOLDER is not None, **OPTIONS)


flag, u16, u32, i64, u64 = numba.boolean, numba.uint16, numba.uint32, numba.int64, numba.uint64
f32, f64 = numba.float32, numba.float64


@intrinsic
def wide(context):
    """Let the loops of the function that calls this have vectors of 512 bits where the CPU has them.

    On Intel's CPUs LLVM takes 256 bits of its own accord. With 512 `passes` take 1.3 to 1.5 times less time there, a
    merge 1.2 times, and selection the same.
    """

    def generate(context, builder, signature, arguments):
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # its own `add` refuses what has a value
        return context.get_dummy_value()

    return types.void(), generate
