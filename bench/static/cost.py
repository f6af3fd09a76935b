"""What the kernels should cost on GPUs that are not here: an estimate, read from their machine code.

    python -m bench.report --only static

Each shipped kernel is compiled ahead of time with its Launch. The binary gives registers, spills and shared memory; its
instructions give, per output element and adapter, those of the loop over adapters. Together with the published figures
of a GPU they say which limit binds, and how long a merge would take at best.

Nothing here was measured on a GPU. Assumed: every scheduler issues an instruction each cycle at the boost clock, and
every pipe takes as many lanes as its vendor says (`pipes`): the busiest binds;
factors are read from HBM once, and otherwise from the L2 cache; tiles are full; a tile does not hold the row where ties
are cut (that branch is counted apart, as `cold`). Counts are per lane, so a matrix instruction counts once for the
elements it makes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from merge_engine.kernels.launch import Launch

from bench.static.gpus import GPUS, Gpu, target_of
from bench.static.kernels import Case, compiled, launch_of, loops_in
from bench.static.machine_code import (
    Code,
    Resources,
    amd_code,
    amd_resources,
    loops_of,
    nvidia_code,
    nvidia_resources,
)
from bench.static.pipes import clocks


@dataclass(frozen=True)
class Cost:
    """What the machine code of a kernel says. Instructions are per thread (lane)."""

    launch: Launch
    registers: int
    spill_bytes: int
    shared_bytes: int
    hot: int  # in the loop, where no tie is cut
    cold: int  # in the loop, behind a branch that is rarely taken
    outside: int
    elements: float  # output elements a thread
    loop_opcodes: dict[str, int] = field(repr=False)
    cold_opcodes: dict[str, int] = field(repr=False)
    opcodes: dict[str, int] = field(repr=False)

    @property
    def per_adapter(self) -> float:
        """Instructions of the loop for one output element and adapter."""
        return self.hot / self.elements

    @property
    def per_element(self) -> float:
        """Instructions outside of the loop for one output element."""
        return self.outside / self.elements

    @property
    def outside_opcodes(self) -> dict[str, int]:
        """Instructions that are neither in the loop nor behind its branches."""
        rest = Counter(self.opcodes)
        rest.subtract(self.loop_opcodes)
        rest.subtract(self.cold_opcodes)
        return {op: count for op, count in rest.items() if count and op not in ("NOP", "s_nop")}


def costs(cases: Sequence[Case], target: str, launch: Launch | None = None) -> list[Cost]:
    """Compile the cases for a target, and read their machine code. launch: that of each case by default."""
    launches = [launch or launch_of(case, target) for case in cases]
    binaries = [compiled(case, target, each) for case, each in zip(cases, launches, strict=True)]
    codes = nvidia_code(binaries) if _is_nvidia(target) else map(amd_code, binaries)
    every = zip(cases, binaries, codes, launches, strict=True)
    return [_cost(binary, code, target, each, loops_in(case)) for case, binary, code, each in every]


def resources(case: Case, target: str, launch: Launch | None = None) -> Resources:
    """The same without the instructions, which takes less time."""
    return _resources(compiled(case, target, launch or launch_of(case, target)), target)


def _is_nvidia(target: str) -> bool:
    return target_of(target).backend == "cuda"


def _resources(binary: Any, target: str) -> Resources:
    return nvidia_resources(binary) if _is_nvidia(target) else amd_resources(binary)


def _cost(binary: Any, code: Code, target: str, launch: Launch, loops: int) -> Cost:
    registers, spills, static = _resources(binary, target)
    hot, cold = loops_of(code, loops)
    ops = [op for op, _ in code.instructions]
    threads = launch.num_warps * target_of(target).warp_size
    return Cost(
        launch=launch,
        registers=registers,
        spill_bytes=spills,
        shared_bytes=static + binary.metadata.shared,
        hot=len(hot),
        cold=len(cold),
        outside=sum(op not in ("NOP", "s_nop") for i, op in enumerate(ops) if i not in hot and i not in cold),
        elements=launch.block_m * launch.block_n / threads,
        loop_opcodes=dict(Counter(ops[i] for i in sorted(hot))),
        cold_opcodes=dict(Counter(ops[i] for i in sorted(cold))),
        opcodes=dict(Counter(ops)),
    )


def occupancy(cost: Cost, gpu: Gpu) -> float:
    """Warps that registers leave room for, as a share of those that a processor holds."""
    granule = 8
    registers = -(-cost.registers // granule) * granule * gpu.target.warp_size
    warps = min(gpu.registers // registers, gpu.warps)
    return warps // cost.launch.num_warps * cost.launch.num_warps / gpu.warps


def seconds(cost: Cost, target: str, rows: int, columns: int, adapters: int, rank: int, size: int) -> dict[str, float]:
    """Least seconds of the merge pass of one module, by limit. size: bytes an element of factors and output.

    "code" is the pipe of the processors that takes longest.
    """
    gpu, elements = GPUS[target], rows * columns
    loop, rest = clocks(cost.loop_opcodes, target), clocks(cost.outside_opcodes, target)
    busiest = max(adapters * loop[pipe] + rest[pipe] for pipe in loop) / cost.elements
    return {
        "code": elements * busiest / (gpu.processors * gpu.clock),
        "tensor": 2 * rank * elements * adapters / gpu.tensor,
        "HBM": size * (elements + adapters * rank * (rows + columns)) / gpu.bandwidth,
    }


def sweep_seconds(cost: Cost, target: str, elements: int, tiles: int = 1, cold: float = 0.0) -> float:
    """Least seconds of a kernel that looks at so many elements. tiles: a program, which share what is outside the loop.

    cold: the share of tiles that enter the branch. A kernel without a loop over tiles has all of it outside.
    """
    gpu = GPUS[target]
    parts = ((cost.loop_opcodes, 1.0), (cost.cold_opcodes, cold), (cost.outside_opcodes, 1 / tiles))
    each = [(clocks(opcodes, target), share) for opcodes, share in parts]
    busiest = max(sum(share * found[pipe] for found, share in each) for pipe in each[0][0]) / cost.elements
    return elements * busiest / (gpu.processors * gpu.clock)
