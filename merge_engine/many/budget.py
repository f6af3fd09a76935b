"""How a memory budget is divided."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from merge_engine.engine.backend import Backend
from merge_engine.engine.cut import (
    MAX_RECOMPRESSIONS,
    cutting_bytes,
    factor_bytes,
    joined_bytes,
    joining_bytes,
    matrix_bytes,
)
from merge_engine.engine.plan import Plan
from merge_engine.errors import RecipeError
from merge_engine.runtime.memory import size_text

# Bytes that do not depend on the merge: a process that has imported torch, triton and Numba and has merged something
# small holds some 450 MB; the rest is what allocators keep.
OWN = 544 << 20


class Room(NamedTuple):
    """How a memory budget is divided."""

    together: int  # merged matrices of one module, made at once
    workers: int  # threads that cut them
    cache: int  # bytes


def room(plans: Sequence[Plan], backend: Backend, memory: int, *, in_memory: bool) -> Room:
    """How ``memory`` bytes are divided for one pass of these plans; in_memory: whether their results stay in memory.

    Raises RecipeError where not even one matrix at a time fits; the message says how much memory would be enough.
    """
    pairs = [(plan, module) for plan in plans for module in plan.modules]
    matrix = max(matrix_bytes(plan, module) for plan, module in pairs)
    cutting = max(cutting_bytes(plan, module) for plan, module in pairs)
    factors = 4 * max(factor_bytes(plan, module) for plan, module in pairs)
    adapters = max(len(module.adapters) for _, module in pairs)
    working = backend.working_bytes(adapters)
    another = matrix + backend.working_bytes(adapters, 2) - working  # bytes of one more result at a time
    results = sum(map(result_bytes, plans)) if in_memory else 0
    joined = max(joined_bytes(plan, module) for plan, module in pairs)
    joining = max(joining_bytes(plan, module) for plan, module in pairs)
    fixed = OWN + results + factors + working + joining + 4 * joined  # read ahead, merged and waiting
    for workers in range(min(torch.get_num_threads(), MAX_RECOMPRESSIONS), 0, -1):
        free = memory - fixed - workers * (cutting + joined) - (workers + 2) * matrix
        if free >= 0:
            more = min(len(plans) - 1, free // (2 * another))
            return Room(1 + more, workers, free - more * another)
    wanted = size_text(memory - free, up=True)
    raise RecipeError(f"memory: wanted at least {wanted} for this merge, got {size_text(memory)}")


def result_bytes(plan: Plan) -> int:
    """The most bytes that a plan's result takes in memory."""
    return sum(4 * module.rank * (module.rows + module.columns) for module in plan.modules)
