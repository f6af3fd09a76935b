"""The rows of the two tables: kernels, and whole merges. Estimates, all of them: nothing was run on a GPU."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from merge_engine.kernels.launch import Launch
from merge_engine.kernels.search import BINS, DEVIATIONS
from merge_engine.kernels.source import Dense
from merge_engine.kernels.trims import CHUNK, TILES_A_PROGRAM, list_length, sample_of, search_bytes

from bench.static import recompression
from bench.static.cost import Cost, costs, occupancy, seconds, sweep_seconds
from bench.static.gpus import GPUS, MODELS
from bench.static.kernels import METHODS, SEARCH, SELECTIONS, Case
from bench.static.pipes import clocks
from bench.static.recompression import OPERATOR_SECONDS

# Assumed of the host, which no machine code tells.
LAUNCH_SECONDS = 20e-6  # one of Triton's
OPERATORS = 20  # a group, at most: tests/kernels/test_trims.py counts them
COMPILE_SECONDS = 3.0  # one kernel, cold
GROUP_BYTES = 1 << 30  # engine.triton_backend: of merged deltas in a group, and of the search
BRACKET_PASSES = 35  # over the sample: two searches of 17 steps and a count
GRAIN = 0.45 / 256  # of the elements, in a step of the 16 bits of a sample, at the threshold
LIST_PASSES = 50  # over the list: about 20 steps for the bits, 24 for the place


@dataclass(frozen=True)
class KernelRow:
    """One kernel on one target.

    Instructions for one output element: per_adapter in the loop, for each adapter; cold in the branch of the loop that
    is rarely taken; per_element outside of the loop. A consensus has two loops, which per_adapter adds up. clocks: of
    one processor for an element and adapter in the loop, by the pipe that binds. occupancy: see `cost.occupancy`.
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
    clocks: float
    binds: str


RANK = 16  # of the adapters
RANKS = {3: 48, 100: 64}  # of the result, by the number of adapters: the sum of the ranks, or one that was asked for
ASSUMED = f"""\
Estimated from machine code and from counts of operations; nothing was run on a GPU. Seconds at best.
A whole merge reads bfloat16 adapters of rank {RANK} and makes one adapter: of rank {RANKS[3]} from 3 adapters, and of
rank {RANKS[100]} from 100. Of `linear` only factors are multiplied, so no kernel runs.
Assumed: an operator of the framework takes {OPERATOR_SECONDS * 1e6:.0f} us of the host, a launch of Triton's \
{LAUNCH_SECONDS * 1e6:.0f} us, and the first
compilation of a kernel {COMPILE_SECONDS:.0f} s; the cut to a rank runs at the published float64 rate and takes all its
steps, and one core decomposes its small matrices; nothing overlaps. Reading and writing files is not in it."""


@dataclass(frozen=True)
class MergeRow:
    """A whole merge of bfloat16 adapters of rank 16 over all modules of a model into one adapter: an estimate.

    Least seconds: of the sweeps before the merge, of the small kernels between them, of the merge pass, and of writing
    the result in bfloat16 once, which the merge pass overlaps with. kernel_seconds: their sum, where the merge pass
    takes the larger of its two. host_seconds: operators and launches, as assumed in this file.
    cut_seconds: of the cut to a rank on the device, and cut_host_seconds on the host: see `recompression`.
    seconds: the sum of kernels, host and cut, as if nothing overlapped. compiles: of distinct kernels, and
    compile_seconds, once. first_seconds: of a merge that has to compile.
    """

    target: str
    gpu: str
    model: str
    method: str
    adapters: int
    rank: int
    sweep_seconds: float
    small_seconds: float
    merge_seconds: float
    write_seconds: float
    kernel_seconds: float
    binds: str
    host_seconds: float
    cut_seconds: float
    cut_host_seconds: float
    seconds: float
    compiles: int
    compile_seconds: float
    first_seconds: float


def kernel_rows(
    targets: Sequence[str] = tuple(GPUS),
    names: Sequence[str] = (*METHODS, "vote_balance", "terms", *SEARCH, *SELECTIONS),
) -> list[KernelRow]:
    """Compile each kernel for each target, with factors in bfloat16 and float32."""
    rows = []
    for target in targets:
        cases = [Case(name, dtype) for name in names for dtype in ("bf16", "fp32")]
        for case, c in zip(cases, costs(cases, target), strict=True):
            tile = c.launch.block_m, c.launch.block_n, c.launch.num_warps
            resources = c.registers, c.spill_bytes, c.shared_bytes, occupancy(c, GPUS[target])
            counts = c.per_adapter, c.cold / c.elements, c.per_element
            pipes = clocks(c.loop_opcodes, target)
            binds = max(pipes, key=lambda pipe: pipes[pipe])
            rest = *tile, *resources, *counts, pipes[binds] / c.elements, binds
            rows.append(KernelRow(target, GPUS[target].name, case.name, case.dtype, *rest))
    return rows


def merge_rows(targets: Sequence[str] = tuple(GPUS)) -> list[MergeRow]:
    """Compile what `ties` and `dare_ties` launch for each target, and add it up over the modules of each model."""
    rows = []
    for target in targets:
        names = ("ties", "dare_ties", *SEARCH)
        found = dict(zip(names, costs([Case(name) for name in names], target), strict=True))
        for model in MODELS:
            rows += [merge_row(found, target, model, method, n) for method in ("ties", "dare_ties") for n in RANKS]
            rows.append(merge_row(found, target, model, "linear", 3))
    return rows


def merge_row(found: dict[str, Cost], target: str, model: str, method: str, adapters: int) -> MergeRow:
    """The estimate of one whole merge. found: the costs of what it launches."""
    modules, layers = MODELS[model]
    gpu, summed, rank = GPUS[target], method == "linear", RANKS[adapters]
    total = dict.fromkeys(("sweeps", "small", "code", "tensor", "HBM", "cut", "cut on the host"), 0.0)
    groups = 0
    for rows, columns, count in modules:
        many = count * layers
        nbytes = 4 * rows * columns + adapters * search_bytes(rows * columns) * (method == "ties")
        groups += -(-many // max(1, GROUP_BYTES // nbytes))
        cut = recompression.seconds(gpu, rows, columns, many, adapters * RANK, rank, summed=summed)
        total["cut"] += cut.device
        total["cut on the host"] += cut.host
        if not summed:
            for limit, time in seconds(found[method], target, rows, columns, adapters, RANK, 2).items():
                total[limit] += many * time
        if method == "ties":
            sweeps, small = search_seconds(found, target, rows, columns)
            total["sweeps"] += many * adapters * sweeps
            total["small"] += many * adapters * small
    merge = max(total["code"], total["tensor"])
    launched = {"ties": 2 + len(SEARCH), "dare_ties": 2, "linear": 0}[method]
    compiled = compiles(model, method)
    limits = {"sweeps": total["sweeps"], "merge": merge, "write": total["HBM"]}
    kernels = total["sweeps"] + total["small"] + max(merge, total["HBM"])
    host = 0.0 if summed else groups * (launched * LAUNCH_SECONDS + OPERATORS * OPERATOR_SECONDS)
    whole = kernels + host + total["cut"] + total["cut on the host"]
    return MergeRow(
        target=target,
        gpu=gpu.name,
        model=model,
        method=method,
        adapters=adapters,
        rank=rank,
        sweep_seconds=total["sweeps"],
        small_seconds=total["small"],
        merge_seconds=merge,
        write_seconds=total["HBM"],
        kernel_seconds=kernels,
        binds="none" if summed else max(limits, key=lambda limit: limits[limit]),
        host_seconds=host,
        cut_seconds=total["cut"],
        cut_host_seconds=total["cut on the host"],
        seconds=whole,
        compiles=compiled,
        compile_seconds=compiled * COMPILE_SECONDS,
        first_seconds=whole + compiled * COMPILE_SECONDS,
    )


def compiles(model: str, method: str) -> int:
    """How many kernels are compiled for a whole merge: tests/kernels/test_compiles.py counts them.

    Of a search the sample's kernel depends on which elements it takes, and three others on the length of a list.
    """
    if method != "ties":
        return {"dare_ties": 2, "linear": 0}[method]
    tensors = [Dense(torch.empty(1, 1, rows, columns, device="meta")) for rows, columns, _ in MODELS[model][0]]
    samples = {sample_of(tensor, Launch(64, 64, 16, 4))[1] for tensor in tensors}
    lengths = {list_length(tensor.x.numel()) for tensor in tensors}
    return 2 + len(SEARCH) - 4 + len(samples) + 3 * len(lengths)


def search_seconds(found: dict[str, Cost], target: str, rows: int, columns: int) -> tuple[float, float]:
    """(sweeps, small kernels) of the search in one task tensor."""
    gpu, elements = GPUS[target], rows * columns
    tensor = Dense(torch.empty(1, 1, rows, columns, device="meta"))
    tiles, every = sample_of(tensor, found["sample"].launch)
    area = found["sample"].launch.block_m * found["sample"].launch.block_n
    # Of a bell curve at density 0.2: the bracket, and what a bin of it holds, each element in a tile of its own.
    share = 2 * DEVIATIONS.value * math.sqrt(0.2 * 0.8 / (tiles * area // every)) + GRAIN
    listed = min(1.0, share * area / (BINS.value / 2))
    warp = gpu.target.warp_size
    sweeps = (
        sweep_seconds(found["sample"], target, tiles * area)
        + sweep_seconds(found["count"], target, elements, TILES_A_PROGRAM, cold=1 - (1 - share) ** warp)
        + sweep_seconds(found["collect"], target, elements, TILES_A_PROGRAM, cold=listed)
    )
    threads = 4 * warp

    def alone(cost: Cost, passes: int, length: int, chunk: int) -> float:
        busiest = max(
            once + passes * -(-length // chunk) * each
            for once, each in zip(
                clocks(cost.outside_opcodes, target).values(), clocks(cost.loop_opcodes, target).values(), strict=True
            )
        )
        return threads * busiest / (gpu.processors * gpu.clock)

    small = (
        alone(found["bracket"], BRACKET_PASSES, tiles * area // every, CHUNK)
        + alone(found["narrow"], 0, 0, 1)
        + alone(found["finish"], LIST_PASSES, max(1024, int(share * elements / (BINS.value / 2))), 1024)
    )
    return sweeps, small
