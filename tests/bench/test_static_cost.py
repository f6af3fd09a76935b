"""The estimate of costs: what is read from machine code, and what is computed from it."""

from collections.abc import Callable
from typing import Any

import pytest
from merge_engine.kernels.launch import Launch

from bench.static.cost import Cost, costs, occupancy, seconds
from bench.static.gpus import GPUS, MODELS, Gpu
from bench.static.kernels import Case
from bench.static.machine_code import Code, loop_of
from bench.static.rows import kernel_rows, merge_rows

Aot = Callable[..., Any]


@pytest.mark.quick
def test_the_loop_is_the_longest_and_its_branches_are_cold() -> None:
    code = Code(
        [
            ("MOV", ""),  # 0
            ("FADD", ""),  # 1: a short loop
            ("BRA", "@P0 0x10"),
            ("LDG", ""),  # 3: the long loop
            ("BRA", "@!P1 0x60"),  # skips 5
            ("STG", ""),
            ("BRA", "@P2 0x80"),  # 6: skips an inner loop, which is hot all the same
            ("BRA", "@P3 0x70"),  # 7: the inner loop
            ("BRA", "0x90"),  # 8: no condition, so it skips nothing
            ("BRA", "@P0 0x30"),
            ("EXIT", "@P1"),  # 10: may not exit
            ("EXIT", ""),
            ("BRA", "0x00"),  # 12: out of line, after the last exit
        ],
        {2: 1, 4: 6, 6: 8, 7: 7, 8: 9, 9: 3, 12: 0},
    )
    assert loop_of(code) == ({3, 4, 6, 7, 8, 9}, {5})
    assert loop_of(Code([("MOV", ""), ("EXIT", "")], {})) == (set(), set())


@pytest.mark.quick
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
    names = ["ties", "coarse_histogram"]
    rows = aot(kernel_rows, ["sm_90"], names)
    cases = [Case(name, dtype) for name in names for dtype in ("bf16", "fp32")]
    assert [(row.kernel, row.dtype) for row in rows] == [(case.name, case.dtype) for case in cases]
    for row, found in zip(rows, aot(costs, cases, "sm_90"), strict=True):
        assert (row.gpu, row.registers, row.spill_bytes) == ("H100 SXM", found.registers, found.spill_bytes)
        assert (row.per_adapter, row.per_element) == (found.per_adapter, found.per_element)
        assert row.cold * found.elements == pytest.approx(found.cold)
        assert row.occupancy == occupancy(found, GPUS["sm_90"])


def test_rows_of_merges_add_up_and_name_the_limit_that_binds(aot: Aot) -> None:
    rows = aot(merge_rows, ["sm_90"])
    assert [row.model for row in rows] == list(MODELS)
    (found,) = aot(costs, [Case("ties")], "sm_90")
    modules, layers = MODELS["Llama-7B"]
    limits = [seconds(found, GPUS["sm_90"], m, n, 3, 16, 2) for m, n, count in modules for _ in range(count)]
    row = rows[1]
    wanted = {name: layers * sum(limit[name] for limit in limits) for name in ("issue", "tensor", "HBM")}
    got = (row.issue_seconds, row.tensor_seconds, row.hbm_seconds)
    assert got == pytest.approx(tuple(wanted.values()))
    assert wanted[row.binds] == max(wanted.values())
