"""The estimate of costs: what is read from machine code, and what is computed from it."""

from collections.abc import Callable
from typing import Any

import pytest
from merge_engine.kernels.launch import Launch

from bench.static import recompression
from bench.static.cost import Cost, costs, occupancy, seconds, sweep_seconds
from bench.static.gpus import GPUS, MODELS, Gpu
from bench.static.kernels import SEARCH, Case
from bench.static.machine_code import Code, loops_of
from bench.static.pipes import clocks, pipe_of
from bench.static.rows import kernel_rows, merge_rows, search_seconds

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
    assert loops_of(code) == ({3, 4, 6, 7, 8, 9}, {5})
    assert loops_of(code, 2) == ({1, 2, 3, 4, 6, 7, 8, 9}, {5})
    assert loops_of(Code([("MOV", ""), ("EXIT", "")], {})) == (set(), set())


@pytest.mark.quick
def test_seconds_and_occupancy_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu("", GPUS["sm_90"].target, processors=10, clock=1e9, lanes=128, tensor=1e12, bandwidth=1e9, float64=1e10)
    monkeypatch.setitem(GPUS, "sm_90", gpu)
    found = Cost(
        Launch(64, 64, 16, 4),
        registers=168,
        spill_bytes=0,
        shared_bytes=0,
        hot=64,
        cold=4,
        outside=32,
        elements=32,
        loop_opcodes={"FMUL": 20, "LOP3.LUT": 40, "BRA": 4},
        cold_opcodes={"STG": 4},
        opcodes={"FMUL": 20, "LOP3.LUT": 40, "BRA": 4, "STG": 4, "MUFU.RCP": 32},
    )
    assert found.per_adapter == 2 and found.per_element == 1
    assert found.outside_opcodes == {"MUFU.RCP": 32}
    assert occupancy(found, gpu) == 12 / 64  # 65536 / (168 * 32) = 12.2 warps, in blocks of 4
    limits = seconds(found, "sm_90", 1000, 500, adapters=6, rank=16, size=2)
    # 40 logic instructions of 64 lanes a clock, six times, against 32 of 16 lanes once, and 64 * 6 + 32 of 128
    assert limits["code"] == pytest.approx(500_000 * max(6 * 40 / 64, 32 / 16, (6 * 64 + 32) / 128) / 32 / 1e10)
    assert limits["tensor"] == pytest.approx(2 * 16 * 500_000 * 6 / 1e12)
    assert limits["HBM"] == pytest.approx(2 * (500_000 + 6 * 16 * 1500) / 1e9)
    # Sixteen tiles share what is outside the loop, and half of them store.
    assert sweep_seconds(found, "sm_90", 500_000, 16, cold=0.5) == pytest.approx(500_000 * 40 / 64 / 32 / 1e10)


@pytest.mark.quick
def test_pipes_of_instructions() -> None:
    found = {op: pipe_of(op) for op in ("LOP3.LUT", "IADD3", "VIMNMX3.U32", "FMUL2", "IMAD.WIDE", "BSYNC", "I2F.RP")}
    assert list(found.values()) == ["ALU", "ALU", "ALU", "FMA", "IMAD", None, "XU"]
    assert [pipe_of(op) for op in ("v_add_f32", "v_mfma_f32", "s_add_u32", "ds_read_b32", "buffer_load_dword")] == [
        "VALU",
        None,
        "SALU",
        "LDS",
        "VMEM",
    ]
    by_pipe = clocks({"FFMA": 128, "IMAD": 64, "BRA": 10, "FMUL2": 4}, "sm_90")
    assert by_pipe["FMA"] == (128 + 64 + 8) / 128 and by_pipe["issue"] == 206 / 128 and by_pipe["IMAD"] == 1


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
        assert row.clocks == pytest.approx(max(clocks(found.loop_opcodes, "sm_90").values()) / found.elements)


def test_a_consensus_counts_both_of_its_loops(aot: Aot) -> None:
    """The products are made twice: two loops load both factors."""
    linear, consensus = aot(costs, [Case("linear"), Case("consensus")], "sm_90")
    loads = [sum(n for op, n in found.loop_opcodes.items() if op.startswith("LDG")) for found in (linear, consensus)]
    assert loads[1] == 2 * loads[0]


def test_rows_of_merges_add_up_and_name_the_limit_that_binds(aot: Aot) -> None:
    rows = aot(merge_rows, ["sm_90"])
    assert [row.model for row in rows[::5]] == list(MODELS)
    names = ("ties", "dare_ties", *SEARCH)
    found = dict(zip(names, aot(costs, [Case(name) for name in names], "sm_90"), strict=True))
    modules, layers = MODELS["Llama-7B"]
    many = [(m, n) for m, n, count in modules for _ in range(count * layers)]
    limits = [seconds(found["ties"], "sm_90", m, n, 3, 16, 2) for m, n in many]
    searches = [search_seconds(found, "sm_90", m, n) for m, n in many]
    by_method = {(row.method, row.adapters): row for row in rows if row.model == "Llama-7B"}
    row = by_method["ties", 3]
    assert (row.rank, row.compiles) == (48, 12)
    assert row.sweep_seconds == pytest.approx(3 * sum(sweeps for sweeps, _ in searches))
    assert row.small_seconds == pytest.approx(3 * sum(small for _, small in searches))
    assert row.merge_seconds == pytest.approx(sum(max(limit["code"], limit["tensor"]) for limit in limits))
    assert row.write_seconds == pytest.approx(sum(limit["HBM"] for limit in limits))
    assert row.kernel_seconds == pytest.approx(row.sweep_seconds + row.small_seconds + row.merge_seconds)
    assert row.binds == "sweeps"
    cuts = [recompression.seconds(GPUS["sm_90"], m, n, count * layers, 48, 48, summed=False) for m, n, count in modules]
    assert row.cut_seconds == pytest.approx(sum(cut.device for cut in cuts))
    assert row.cut_host_seconds == pytest.approx(sum(cut.host for cut in cuts))
    # A group holds 1 GiB of deltas in float32 and of the search: 15 of 4096 x 4096, and 5 of 4096 x 11008.
    assert row.host_seconds == pytest.approx((9 + 13 + 7) * (8 * 20e-6 + 20 * 5e-6))
    parts = row.kernel_seconds + row.host_seconds + row.cut_seconds + row.cut_host_seconds
    assert row.seconds == pytest.approx(parts) and row.first_seconds == pytest.approx(parts + 12 * 3)
    linear = by_method["linear", 3]
    assert linear.kernel_seconds == linear.host_seconds == linear.compiles == 0 and linear.binds == "none"
    assert linear.seconds == pytest.approx(linear.cut_seconds + linear.cut_host_seconds) and linear.seconds > 0


def test_a_whole_merge_keeps_to_what_was_promised(aot: Aot) -> None:
    """On an H100, 4096 x 4096, by the pipe that binds: what a regression of a kernel's code would show."""
    rows = {(row.model, row.method, row.adapters): row.kernel_seconds for row in aot(merge_rows, ["sm_90"])}
    assert rows["one 4096 x 4096", "ties", 3] <= 110e-6
    assert rows["one 4096 x 4096", "ties", 100] <= 3.2e-3
    assert rows["one 4096 x 4096", "dare_ties", 3] <= 67e-6
