"""The rows of the two tables: kernels, and merges of whole models."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.static.cost import costs, occupancy, seconds
from bench.static.gpus import GPUS, MODELS
from bench.static.kernels import METHODS, SELECTIONS, Case


@dataclass(frozen=True)
class KernelRow:
    """One kernel on one target.

    Instructions for one output element: per_adapter in the loop, for each adapter; cold in the branch of the loop that
    is rarely taken; per_element outside of the loop. occupancy: see `cost.occupancy`.
    """

    target: str
    gpu: str
    kernel: str
    dtype: str
    block_m: int
    block_n: int
    num_warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    occupancy: float
    per_adapter: float
    cold: float
    per_element: float


@dataclass(frozen=True)
class MergeRow:
    """The merge pass over all modules of a model: `ties` of three bfloat16 adapters of rank 16.

    Least seconds by each limit: issue of instructions, matrix units, HBM. binds: the limit with the most seconds.
    """

    target: str
    gpu: str
    model: str
    issue_seconds: float
    tensor_seconds: float
    hbm_seconds: float
    binds: str


def kernel_rows(
    targets: Sequence[str] = tuple(GPUS), names: Sequence[str] = (*METHODS, "vote_balance", *SELECTIONS)
) -> list[KernelRow]:
    """Compile each kernel for each target, with factors in bfloat16 and float32."""
    rows = []
    for target in targets:
        cases = [Case(name, dtype) for name in names for dtype in ("bf16", "fp32")]
        for case, c in zip(cases, costs(cases, target), strict=True):
            tile = c.launch.block_m, c.launch.block_n, c.launch.num_warps
            resources = c.registers, c.spill_bytes, c.shared_bytes, occupancy(c, GPUS[target])
            counts = c.per_adapter, c.cold / c.elements, c.per_element
            rows.append(KernelRow(target, GPUS[target].name, case.name, case.dtype, *tile, *resources, *counts))
    return rows


def merge_rows(targets: Sequence[str] = tuple(GPUS)) -> list[MergeRow]:
    """Compile `ties` for each target, and add up its least time over the modules of each model."""
    rows = []
    for target in targets:
        gpu, (cost,) = GPUS[target], costs([Case("ties")], target)
        for model, (modules, layers) in MODELS.items():
            total = dict.fromkeys(("issue", "tensor", "HBM"), 0.0)
            for rows_of, columns, count in modules:
                for limit, time in seconds(cost, gpu, rows_of, columns, 3, 16, 2).items():
                    total[limit] += time * count * layers
            rows.append(MergeRow(target, gpu.name, model, *total.values(), max(total, key=lambda limit: total[limit])))
    return rows
