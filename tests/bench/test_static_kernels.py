"""The compiled kernels, without a GPU: they compile, do not spill, and move 128 bits at a time."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from merge_engine.kernels.launch import Launch, launch_for

from bench.static.cost import Cost, costs, resources
from bench.static.gpus import GPUS
from bench.static.kernels import METHODS, SEARCH, SELECTIONS, SMALL, Case

Aot = Callable[..., Any]

# Every kernel and method as launched for bfloat16 factors, and the kernels with the most code for other kinds of tile.
CASES = [Case(name) for name in (*METHODS, "vote_balance", "terms", *SEARCH, *SELECTIONS)]
for name in ("ties", "ties, mergekit, unequal weights", "dare_ties, unequal weights", "finish"):
    CASES += [Case(name, "fp32", base=True), Case(name, "fp16", rank=128, base=True), Case(name, rank=0, base=True)]
CASES += [
    Case("count", "fp32"),
    Case("collect", "fp32"),
    Case("breadcrumbs", "fp32", base=True),
    Case("consensus", "fp32", rank=128),
    Case("elect_max", rank=0),
]
CASES += [Case("ties", "fp32", recipes=2), Case("dare_ties, unequal weights", "fp32", recipes=2, base=True)]

# On the other targets, the kernels of a merge and those with the most registers.
GATED = ("sm_80", "sm_90", "sm_100", "gfx942")
SOME = [Case(name) for name in ("linear", "ties", "dare_ties", "breadcrumbs_ties, frequency", "consensus", *SEARCH)]


def is_wide(cost: Cost, target: str, *, stores: bool = True) -> bool:
    """Whether tiles move 128 bits at a time; single numbers may take 32, but none takes fewer.

    stores: whether the kernel stores tiles. A selection stores only counts, and flags of the one row that is cut.
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


def moves(cost: Cost) -> dict[str, int]:
    return {op: count for op, count in cost.opcodes.items() if "LD" in op.upper() or "ST" in op.upper()}


@pytest.mark.parametrize("target", GPUS)
def test_kernels_do_not_spill_and_move_128_bits(target: str, aot: Aot) -> None:
    """All cases in one test, since they are disassembled together."""
    cases = CASES if target in GATED else SOME
    found = dict(zip(cases, aot(costs, cases, target), strict=True))
    assert {case: cost.spill_bytes for case, cost in found.items() if cost.spill_bytes} == {}
    tiles = {case: cost for case, cost in found.items() if case.name not in SMALL}
    wide = {case: is_wide(cost, target, stores=case.name in METHODS) for case, cost in tiles.items()}
    assert {case: moves(found[case]) for case in tiles if not wide[case]} == {}


def test_the_checks_see_a_spill_and_narrow_moves(aot: Aot) -> None:
    assert aot(resources, Case("ties"), "sm_90", Launch(128, 128, 16, 4)).spill_bytes > 0
    aligned, unaligned = aot(costs, [Case("ties"), Case("ties", aligned=False)], "sm_90")
    assert is_wide(aligned, "sm_90")
    assert not is_wide(unaligned, "sm_90")


@pytest.mark.parametrize("name", ["ties", "dare_ties", "vote_balance", *SEARCH, *SELECTIONS])
def test_kernels_compile_where_sizes_are_one(name: str, aot: Aot) -> None:
    """The JIT makes a constant of an integer that is 1, and a constant is no tensor."""
    for ones in (("M",), ("N", "stride_xr")):
        assert aot(resources, Case(name, aligned=False, ones=ones), "sm_90").registers > 0


def test_the_loop_of_ties_takes_at_most_12_instructions_an_element(aot: Aot) -> None:
    """This includes loads and the product, and the branch that only tiles with a cut row take."""
    (found,) = aot(costs, [Case("ties")], "sm_90")
    assert any("GMMA" in op for op in found.loop_opcodes)
    assert found.per_adapter <= 8
    assert (found.hot + found.cold) / found.elements <= 12


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_float32_factors_are_not_rounded_unless_asked(target: str, aot: Aot) -> None:
    precisions = ["ieee", "tf32"]
    found = aot(costs, [Case("ties", "fp32", precision=precision) for precision in precisions], target)
    for precision, cost in zip(precisions, found, strict=True):
        is_rounded = precision == "tf32"
        assert any(re.match(r"(H|HG|UTC\w*)MMA", op) for op in cost.opcodes) == is_rounded
        assert (cost.opcodes.get("FFMA", 0) + 2 * cost.opcodes.get("FFMA2", 0) >= 512) != is_rounded


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
    assert launch_for(64, 64, 32, torch.float32, "sm_90", recipes=4).recipes == 1
    assert launch_for(64, 64, 16, torch.bfloat16, "sm_90", recipes=4).recipes == 1
    assert {launch_for(64, 64, 16, torch.bfloat16, f"sm_{kind}").num_warps for kind in (100, 103, 110)} == {2}
    assert launch_for(64, 64, 16, torch.bfloat16, "sm_90").options["enable_fp_fusion"] is False
