"""What the kernels cost on GPUs that are not here: an estimate, read off their machine code.

    python -m bench.report --only static

Each shipped kernel is compiled ahead of time with its Launch. From the binary come registers, spills and shared memory;
from its instructions, per output element and adapter, those of the loop over adapters. Set against the published
figures of a GPU they say which limit binds, and how long a merge would take at best.

Nothing here was measured on a GPU. Assumed: every scheduler issues each cycle at the boost clock; factors are read from
HBM once, and otherwise from the L2 cache; tiles are full; a tile does not hold the row where ties are cut (that branch
is counted apart, as `cold`); a count is per lane, hence a matrix instruction counts once for the elements it makes.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from merge_engine.kernels import merge, select
from merge_engine.kernels.launch import Launch, launch_for
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@dataclass(frozen=True)
class Gpu:
    """A target and the published figures of a GPU that runs it (vendors' data sheets; dense, without sparsity)."""

    name: str
    target: GPUTarget
    processors: int  # SMs or CUs
    clock: float  # boost, Hz
    lanes: int  # instructions a processor issues a cycle, times lanes of one
    tensor: float  # bfloat16 matrix units, flop/s
    bandwidth: float  # HBM, byte/s
    registers: int = 65536  # a processor, 32 bits
    warps: int = 64


GPUS = {
    "sm_80": Gpu("A100 80GB SXM", GPUTarget("cuda", 80, 32), 108, 1.41e9, 128, 312e12, 2.04e12),
    "sm_90": Gpu("H100 SXM", GPUTarget("cuda", 90, 32), 132, 1.83e9, 128, 989e12, 3.35e12),
    "sm_100": Gpu("B200", GPUTarget("cuda", 100, 32), 148, 1.85e9, 128, 2250e12, 8.0e12),
    "gfx942": Gpu("MI300X", GPUTarget("hip", "gfx942", 64), 304, 2.1e9, 64, 1307e12, 5.3e12, 131072, 32),
}

# (rows, columns, how many a layer) of the linear modules, and layers.
MODELS = {
    "TinyLlama": ([(2048, 2048, 2), (256, 2048, 2), (5632, 2048, 2), (2048, 5632, 1)], 22),
    "Llama-7B": ([(4096, 4096, 4), (11008, 4096, 2), (4096, 11008, 1)], 32),
    "Llama-70B": ([(8192, 8192, 2), (1024, 8192, 2), (28672, 8192, 2), (8192, 28672, 1)], 80),
}

TIES = {"KEEP": "magnitude", "ELECT": "total", "WEIGH": "never", "DIVISOR": "count"}
# What the table of methods and conventions makes of the merge kernel: the constexprs of a few that differ most.
METHODS: dict[str, dict[str, str]] = {
    "linear": {"KEEP": "all", "ELECT": "none", "WEIGH": "before", "DIVISOR": "one"},
    "magnitude_prune": {"KEEP": "magnitude", "ELECT": "none", "WEIGH": "before", "DIVISOR": "one"},
    "ties": TIES,
    "ties, unequal weights": {**TIES, "WEIGH": "after"},
    "ties, frequency": {**TIES, "ELECT": "frequency"},
    "ties, frequency, unequal weights": {**TIES, "ELECT": "frequency", "WEIGH": "after"},
    "ties, mergekit, unequal weights": {**TIES, "WEIGH": "before", "DIVISOR": "weight"},
    "dare_linear": {"KEEP": "bernoulli", "ELECT": "none", "WEIGH": "before", "DIVISOR": "one"},
    "dare_ties": {**TIES, "KEEP": "bernoulli"},
    "dare_ties, unequal weights": {**TIES, "KEEP": "bernoulli", "WEIGH": "after"},
    "dare_ties, frequency, unequal weights": {
        **TIES,
        "KEEP": "bernoulli",
        "ELECT": "frequency",
        "WEIGH": "after",
    },
    "dare_ties, mergekit": {"KEEP": "bernoulli", "ELECT": "total", "WEIGH": "before", "DIVISOR": "one"},
}
SELECTIONS = ("coarse_histogram", "fine_histogram", "tied_rows", "tied_columns", "l1_norms")

_POINTERS = {
    "terms_ptr": "*i32",
    "tied_ptr": "*i32",
    "counts_ptr": "*i32",
    "interval_ptr": "*i32",
    "value_ptr": "*i32",
    "row_ptr": "*i32",
    "flags_ptr": "*i8",
    "balance_ptr": "*i64",
    "scale_ptr": "*fp32",
    "scaling_ptr": "*fp32",
    "norms_ptr": "*fp32",
}


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel: a method of the merge, "vote_balance", or one of SELECTIONS."""

    name: str
    dtype: str = "bf16"  # of factors and output: "fp32", "fp16", "bf16"
    rank: int = 16  # 0: dense
    recipes: int = 1
    base: bool = False
    precision: str = "ieee"
    aligned: bool = True  # rows start at multiples of 16 bytes, as they do wherever sizes are multiples of 16
    ones: tuple[str, ...] = ()  # integer arguments that are 1, which the JIT makes constants


@dataclass(frozen=True)
class Cost:
    """What a binary says of itself. Instructions are per thread (lane)."""

    launch: Launch
    registers: int
    spill_bytes: int
    shared_bytes: int
    hot: int  # in the loop, where no tie is cut
    cold: int  # in the loop, behind a branch that is not taken by then
    outside: int
    elements: float  # output elements a thread
    loop_opcodes: dict[str, int] = field(repr=False)
    opcodes: dict[str, int] = field(repr=False)

    @property
    def per_adapter(self) -> float:
        return self.hot / self.elements

    @property
    def per_element(self) -> float:
        return self.outside / self.elements


def launch_of(case: Case, target: str) -> Launch:
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[case.dtype]
    random = case.name.startswith("dare") or case.name == "l1_norms"
    return launch_for(4096, 4096, case.rank, dtype, target, recipes=case.recipes, random=random)


def compiled(case: Case, target: str, launch: Launch) -> Any:
    """The kernel of a case, compiled for a target as the JIT would."""
    constexprs: dict[str, Any] = {
        "RANK": case.rank,
        "SUBTRACT": case.rank == 0,
        "ADD": case.base,
        "PRECISION": case.precision,
        "RECIPES": launch.recipes,
        "TILES": select.TILES_A_PROGRAM,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_R": launch.block_r,
        **dict.fromkeys(case.ones, 1),
    }
    if case.name in METHODS:
        kernel = merge._merge_deltas_kernel
        constexprs |= METHODS[case.name]
    elif case.name == "vote_balance":
        kernel = merge._vote_balance_kernel
        constexprs |= TIES
    else:
        kernel = getattr(select, f"_{case.name}_kernel")
    constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
    signature = {
        name: "constexpr"
        if name in constexprs
        else _POINTERS.get(name, f"*{case.dtype}")
        if name.endswith("_ptr")
        else "i32"
        for name in kernel.arg_names
    }
    divisible = [
        i
        for i, name in enumerate(kernel.arg_names)
        if name not in constexprs and (name.endswith("_ptr") or name.startswith("stride") or name in ("M", "N"))
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in divisible} if case.aligned else {}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=GPUS[target].target, options=launch.options)


def cost(case: Case, target: str, launch: Launch | None = None) -> Cost:
    """Compile and read. Picklable both ways, since tests call it in another process."""
    launch = launch or launch_of(case, target)
    binary = compiled(case, target, launch)
    if GPUS[target].target.backend == "cuda":
        registers, spills, static = _nvidia_resources(binary)
        lines = _disassembly(binary)
    else:
        registers, spills, static = _amd_resources(binary)
        lines = binary.asm["amdgcn"].splitlines()
    code, labels = _instructions(lines)
    hot, cold = _loop(code, labels)
    body = hot | cold
    threads = launch.num_warps * GPUS[target].target.warp_size
    return Cost(
        launch=launch,
        registers=registers,
        spill_bytes=spills,
        shared_bytes=static + binary.metadata.shared,
        hot=len(hot),
        cold=len(cold),
        outside=sum(op not in ("NOP", "s_nop") for i, (op, _) in enumerate(code) if i not in body),
        elements=launch.block_m * launch.block_n / threads,
        loop_opcodes=dict(Counter(code[i][0] for i in sorted(hot))),
        opcodes=dict(Counter(op for op, _ in code)),
    )


def occupancy(cost: Cost, gpu: Gpu) -> float:
    """Warps that registers leave room for, as a share of those that a processor holds."""
    granule = 8
    registers = -(-cost.registers // granule) * granule * gpu.target.warp_size
    warps = min(gpu.registers // registers, gpu.warps)
    return warps // cost.launch.num_warps * cost.launch.num_warps / gpu.warps


def seconds(cost: Cost, gpu: Gpu, rows: int, columns: int, adapters: int, rank: int, size: int) -> dict[str, float]:
    """At best, for one module: {limit: seconds}; the largest binds. size: bytes an element of factors and output."""
    elements = rows * columns
    instructions = elements * (adapters * cost.per_adapter + cost.per_element)
    return {
        "issue": instructions / (gpu.processors * gpu.lanes * gpu.clock),
        "tensor": 2 * rank * elements * adapters / gpu.tensor,
        "HBM": size * (elements + adapters * rank * (rows + columns)) / gpu.bandwidth,
    }


def _nvidia_resources(binary: Any) -> tuple[int, int, int]:
    """(registers, bytes of stack that only spills use, static shared memory)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        dump = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", dump)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"], usage["SHARED"]


def _disassembly(binary: Any) -> list[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        return _run(knobs.nvidia.nvdisasm.path, "-c", file.name).splitlines()


def _amd_resources(binary: Any) -> tuple[int, int, int]:
    """(vector registers, bytes of scratch memory, 0): shared memory is all in the metadata.

    A spilled scalar register is kept in a lane of a vector register, and takes no memory.
    """
    text = binary.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise ValueError(f"the assembly has no .{name}")
        return int(found.group(1))

    return number("vgpr_count"), 4 * number("vgpr_spill_count") + number("private_segment_fixed_size"), 0


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


_LABEL = re.compile(r"^\s*(\.L\w+):")
_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)(.*?);")
_GCN = re.compile(r"^\s+((?:s|v|ds|global|buffer)_\w+)(.*)$")


def _instructions(lines: list[str]) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """([(opcode, the rest)], {label: index of what follows it}); a predicate stays before its opcode's rest."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in lines:
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(code)
        elif sass := _SASS.match(line):
            code.append((sass.group(2), f"{sass.group(1) or ''}{sass.group(3)}"))
        elif gcn := _GCN.match(line):
            code.append((gcn.group(1), gcn.group(2)))
    return code, labels


def _loop(code: list[tuple[str, str]], labels: dict[str, int]) -> tuple[set[int], set[int]]:
    """(hot, cold) instructions of the longest loop; cold are those that a forward branch within it may skip.

    A loop within (over recipes, or steps of a rank above 64) is hot, and counted once: as for one recipe or step.
    Code after the last exit is out of line (waits on barriers), and a branch back from there closes no loop.
    """
    end = next((i for i, (op, rest) in enumerate(code) if op in ("EXIT", "s_endpgm") and "@" not in rest), len(code))
    first, last = 0, -1
    for i, target in _branches(code, labels):
        if target <= i < end and i - target > last - first:
            first, last = target, i
    cold: set[int] = set()
    branches = _branches(code, labels)
    for i, target in branches:
        skips_a_loop = any(i < back <= j < target for j, back in branches)
        if first <= i < target <= last + 1 and _conditional(*code[i]) and not skips_a_loop:
            cold.update(range(i + 1, target))
    return set(range(first, last + 1)) - cold, cold


def _branches(code: list[tuple[str, str]], labels: dict[str, int]) -> list[tuple[int, int]]:
    found = []
    for i, (op, rest) in enumerate(code):
        target = re.search(r"(\.L\w+)", rest)
        if op.startswith(("BRA", "s_cbranch", "s_branch")) and target and target.group(1) in labels:
            found.append((i, labels[target.group(1)]))
    return found


def _conditional(op: str, rest: str) -> bool:
    return op.startswith("s_cbranch") or "@" in rest or "P" in rest.split("`")[0]


@dataclass(frozen=True)
class KernelRow:
    """One kernel on one target. per_adapter, cold, per_element: instructions an output element, in the loop for an
    adapter, in its branch that is rarely taken, and outside of it; occupancy: see `occupancy`."""

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
    """The merge pass of all modules of a model by `ties`, three bfloat16 adapters of rank 16, at best: seconds by what
    issues instructions, by matrix units and by memory, and the limit that binds."""

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
        for name in names:
            for dtype in ("bf16", "fp32"):
                c = cost(Case(name, dtype), target)
                tile = c.launch.block_m, c.launch.block_n, c.launch.num_warps
                resources = c.registers, c.spill_bytes, c.shared_bytes, occupancy(c, GPUS[target])
                counts = c.per_adapter, c.cold / c.elements, c.per_element
                rows.append(KernelRow(target, GPUS[target].name, name, dtype, *tile, *resources, *counts))
    return rows


def merge_rows(targets: Sequence[str] = tuple(GPUS)) -> list[MergeRow]:
    """The same for whole models."""
    rows = []
    for target in targets:
        gpu, c = GPUS[target], cost(Case("ties"), target)
        for model, (modules, layers) in MODELS.items():
            total = dict.fromkeys(("issue", "tensor", "HBM"), 0.0)
            for rows_of, columns, count in modules:
                for limit, time in seconds(c, gpu, rows_of, columns, 3, 16, 2).items():
                    total[limit] += time * count * layers
            rows.append(MergeRow(target, gpu.name, model, *total.values(), max(total, key=lambda limit: total[limit])))
    return rows
