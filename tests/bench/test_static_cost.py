"""What can be said of the compiled kernels without a GPU: they compile, do not spill, and move 128 bits at a time."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from merge_engine.kernels.launch import Launch, launch_for

from bench.static_cost import (
    GPUS,
    METHODS,
    MODELS,
    SELECTIONS,
    Case,
    Cost,
    Gpu,
    cost,
    kernel_rows,
    merge_rows,
    occupancy,
    seconds,
)

Aot = Callable[..., Any]

# Every kernel and method as it is launched for bfloat16 factors, and the other kinds of tile for those that carry most.
CASES = [Case(name) for name in (*METHODS, "vote_balance", *SELECTIONS)]
for name in ("ties", "ties, mergekit, unequal weights", "dare_ties, unequal weights", "fine_histogram"):
    CASES += [Case(name, "fp32", base=True), Case(name, "fp16", rank=128, base=True), Case(name, rank=0, base=True)]
CASES += [Case("ties", "fp32", recipes=2), Case("dare_ties, unequal weights", "fp32", recipes=2, base=True)]


def wide(cost: Cost, target: str, *, stores: bool = True) -> bool:
    """Whether tiles move 128 bits at a time; single numbers may take 32, but none takes fewer.

    stores: whether the kernel stores tiles; a selection stores only counts, and flags of the one row that is cut.
    """
    if target.startswith("gfx"):
        moves = [op for op in cost.opcodes if re.match(rf"(global|buffer)_(load{'|store' * stores})_", op)]
        narrow = [op for op in moves if "short" in op or "byte" in op]
        loads = any(op.endswith("load_dwordx4") for op in moves)
        short = [op for op in moves if "store" in op and not op.endswith("dwordx4")]
    else:
        moves = [op for op in cost.opcodes if op.startswith(("LDG", "STG")[: 1 + stores])]
        narrow = [op for op in moves if re.search(r"\.[US](8|16)\b", op)]
        loads = any(".128" in op for op in moves if op.startswith("LDG"))
        short = [op for op in moves if op.startswith("STG") and ".128" not in op]
    return loads and not narrow and not short


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.dtype}-r{case.rank}-x{case.recipes}")
def test_kernels_do_not_spill_and_move_128_bits(case: Case, target: str, aot: Aot) -> None:
    found = aot(cost, case, target)
    assert found.spill_bytes == 0
    assert wide(found, target, stores=case.name in METHODS), {
        op: n for op, n in found.opcodes.items() if "LD" in op or "ST" in op
    }


def test_the_checks_see_a_spill_and_narrow_moves(aot: Aot) -> None:
    assert aot(cost, Case("ties"), "sm_90", Launch(128, 128, 16, 4)).spill_bytes > 0
    assert not wide(aot(cost, Case("ties", aligned=False), "sm_90"), "sm_90")


@pytest.mark.parametrize("name", ["ties", "dare_ties", "vote_balance", *SELECTIONS])
def test_kernels_compile_where_sizes_are_one(name: str, aot: Aot) -> None:
    """The JIT makes a constant of an integer that is 1, and a constant is no tensor."""
    for ones in (("modules", "adapters", "M", "recipes"), ("N", "stride_xr")):
        assert aot(cost, Case(name, aligned=False, ones=ones), "sm_90").registers > 0


def test_the_loop_of_ties_takes_at_most_12_instructions_an_element(aot: Aot) -> None:
    """Loads and the product included, and even the branch that only tiles with a cut row take."""
    found = aot(cost, Case("ties"), "sm_90")
    assert any("GMMA" in op for op in found.loop_opcodes)
    assert found.per_adapter <= 8
    assert (found.hot + found.cold) / found.elements <= 12


@pytest.mark.parametrize(("precision", "is_rounded"), [("ieee", False), ("tf32", True)])
def test_float32_factors_are_not_rounded_unless_asked(precision: str, is_rounded: bool, aot: Aot) -> None:
    for target in ("sm_80", "sm_90", "sm_100"):
        opcodes = aot(cost, Case("ties", "fp32", precision=precision), target).opcodes
        assert any(re.match(r"(H|HG|UTC\w*)MMA", op) for op in opcodes) == is_rounded
        assert (opcodes.get("FFMA", 0) + 2 * opcodes.get("FFMA2", 0) >= 512) != is_rounded


def test_seconds_and_occupancy_by_hand() -> None:
    gpu = Gpu("", GPUS["sm_90"].target, processors=10, clock=1e9, lanes=128, tensor=1e12, bandwidth=1e9)
    found = Cost(Launch(64, 64, 16, 4), 168, 0, 0, hot=64, cold=0, outside=32, elements=32, loop_opcodes={}, opcodes={})
    assert found.per_adapter == 2 and found.per_element == 1
    assert occupancy(found, gpu) == 12 / 64  # 65536 / (168 * 32) = 12.2 warps, in blocks of 4
    limits = seconds(found, gpu, 1000, 500, adapters=3, rank=16, size=2)
    assert limits["issue"] == pytest.approx(500_000 * 7 / 1.28e12)
    assert limits["tensor"] == pytest.approx(2 * 16 * 500_000 * 3 / 1e12)
    assert limits["HBM"] == pytest.approx(2 * (500_000 + 3 * 16 * 1500) / 1e9)


def test_rows_of_kernels_are_their_costs(aot: Aot) -> None:
    rows = aot(kernel_rows, ["sm_90"], ["ties", "coarse_histogram"])
    assert [(row.kernel, row.dtype) for row in rows] == [
        (name, dtype) for name in ("ties", "coarse_histogram") for dtype in ("bf16", "fp32")
    ]
    for row in rows:
        found = aot(cost, Case(row.kernel, row.dtype), "sm_90")
        assert (row.gpu, row.registers, row.spill_bytes) == ("H100 SXM", found.registers, found.spill_bytes)
        assert (row.per_adapter, row.per_element) == (found.per_adapter, found.per_element)
        assert row.cold * found.elements == pytest.approx(found.cold)
        assert row.occupancy == occupancy(found, GPUS["sm_90"])


def test_rows_of_merges_add_up_and_name_what_binds(aot: Aot) -> None:
    rows = aot(merge_rows, ["sm_90"])
    assert [row.model for row in rows] == list(MODELS)
    found = aot(cost, Case("ties"), "sm_90")
    modules, layers = MODELS["Llama-7B"]
    limits = [seconds(found, GPUS["sm_90"], m, n, 3, 16, 2) for m, n, count in modules for _ in range(count)]
    row = rows[1]
    wanted = {name: layers * sum(limit[name] for limit in limits) for name in ("issue", "tensor", "HBM")}
    got = (row.issue_seconds, row.tensor_seconds, row.hbm_seconds)
    assert got == pytest.approx(tuple(wanted.values()))
    assert wanted[row.binds] == max(wanted.values())


def test_launch_is_a_pure_function_of_its_arguments() -> None:
    for arch in (*GPUS, "cpu"):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for rank in (0, 16, 48, 64, 96, 128, 640):
                launch = launch_for(4096, 4096, rank, dtype, arch)
                assert launch == launch_for(4096, 4096, rank, dtype, arch)
                assert rank % launch.block_r == 0 and 16 <= launch.block_r <= 64
                assert launch.block_m % 16 == launch.block_n % 16 == 0
                assert launch_for(4096, 4096, rank, dtype, arch, recipes=3).recipes == 1
    assert launch_for(64, 64, 16, torch.float32, "sm_90", recipes=4).recipes == 2
    assert launch_for(64, 64, 16, torch.bfloat16, "sm_90", recipes=4).recipes == 1
    assert launch_for(64, 64, 16, torch.bfloat16, "sm_90").options["enable_fp_fusion"] is False
