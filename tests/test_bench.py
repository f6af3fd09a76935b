"""The benchmarks' own arithmetic: what they measure with, what they check results against, and what they write."""

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import measure, report, suite
from bench.agreement import Disagreement, Habit, check_kth, check_merge
from bench.contestants import KINDS, build, taking_part
from bench.measure import Contestant, Sample, fit, interleaved, spread
from bench.results import HEADLINES, Report, Row, compare, drop_in_table, markdown, read, read_csv, trends, write
from bench.suite import agreed, measured
from bench.workloads import WORKLOADS, Task, Workload
from merge_engine import reference

ROOT = Path(__file__).parent.parent
METHODS = ["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"]
SMALL = Workload("deltas", "ties", 48, 80)


@pytest.fixture
def importable() -> Iterator[None]:
    """Processes that are forked from the server import `bench`, too."""
    with mock.patch.object(sys, "path", [str(ROOT), *sys.path]):
        yield


def row(**fields: Any) -> Row:
    sizes = {"method": "ties", "rows": 8, "columns": 8, "layers": 0, "adapters": 3, "rank": 4, "elements": 64}
    known = {"kind": "deltas", "workload": "w", "contestant": "tiled", "density": 0.2, "dtype": "float32"}
    timing = {"device": "cpu", "threads": 2, "runs": 3, "seconds": 1.0, "low": 0.9, "high": 1.1}
    return Row(**{**sizes, **known, **timing, **fields})


def test_spread_is_the_median_and_the_quartiles() -> None:
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == (3.0, 2.0, 4.0, 5)
    assert spread([7.0]) == (7.0, 7.0, 7.0, 1)


def test_rounds_are_interleaved_and_a_slow_first_run_counts() -> None:
    order: list[str] = []

    def run(name: str) -> Contestant:
        return Contestant(lambda: order.append(name) or Sample(1.0, name), own_clock=True)

    first = {"a": Sample(0.1, None), "b": Sample(2 * measure.SLOW, None)}
    taken = interleaved({name: run(name) for name in "ab"}, measure.Clock(), seconds=0, first=first, least=3, most=9)
    assert "".join(order) == "aabab"
    assert [sample.seconds for sample in taken["b"]] == [2 * measure.SLOW, 1.0, 1.0]
    assert all(sample.result is None for samples in taken.values() for sample in samples)
    order.clear()
    interleaved({name: run(name) for name in "ab"}, measure.Clock(), seconds=10.5, least=1, most=9)
    assert "".join(order) == "ab" * 5  # a sixth round would end after 12 seconds


def test_the_clock_does_not_count_what_makes_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def takes(seconds: float) -> None:
        now[0] += seconds

    sample = measure.Clock().sample(Contestant(lambda: takes(3.0) or "done", ready=lambda: takes(100.0)))
    assert sample == Sample(3.0, "done")


def test_a_line_is_found_and_its_residual_told() -> None:
    xs = [1.0, 2.0, 4.0, 8.0]
    line = fit(xs, [3.0 + 2.0 * x for x in xs])
    assert (line.slope, line.intercept) == (pytest.approx(2.0), pytest.approx(3.0))
    assert line.residual < 1e-12
    assert fit(xs, [x**2 for x in xs]).residual > 0.2
    # No other line has smaller squares of (a + b x) / y - 1: their derivatives by a and b vanish.
    points = [(1.0, 1.0), (2.0, 2.0), (4.0, 8.0)]
    skew = fit(*zip(*points, strict=True))
    errors = [(skew.intercept + skew.slope * x) / y - 1 for x, y in points]
    assert sum(error / y for error, (_, y) in zip(errors, points, strict=True)) == pytest.approx(0, abs=1e-9)
    assert sum(error * x / y for error, (x, y) in zip(errors, points, strict=True)) == pytest.approx(0, abs=1e-9)
    assert skew.residual == pytest.approx(max(map(abs, errors)))
    with pytest.raises(ValueError, match="two sizes"):
        fit([1.0, 1.0], [1.0, 2.0])


@given(
    method=st.sampled_from(METHODS),
    rows=st.integers(1, 70),
    columns=st.integers(16, 90),
    adapters=st.integers(1, 5),
    rank=st.sampled_from([1, 4, 17]),
    density=st.sampled_from([0.1, 0.2, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
@settings(max_examples=40)
def test_results_of_every_shape_agree(method: str, **fields: Any) -> None:
    agreed(Workload("deltas", method, only=("tiled", "reference"), **fields), "cpu")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_contestants_agree(method: str, dtype: str) -> None:
    agreed(replace(SMALL, method=method, dtype=dtype), "cpu")


@pytest.mark.parametrize("method", METHODS)
def test_one_wrong_element_is_a_disagreement(method: str) -> None:
    task = Task(replace(SMALL, method=method))
    right = build(task.workload, "tiled", "cpu").run()
    check_merge({"right": right}, task)
    place = right.abs().flatten().argmax()
    for wrong in (0.0, math.nan, float(right.flatten()[place]) * (1 + 1e-4)):
        off = right.clone()
        off.flatten()[place] = wrong
        with pytest.raises(Disagreement, match="off is wrong in 1 elements"):
            check_merge({"right": right, "off": off}, task)


def test_another_density_weight_or_vote_is_a_disagreement() -> None:
    task = Task(replace(SMALL, rows=96))
    rivals = [replace(task.workload, density=0.25), replace(task.workload, method="magnitude_prune")]
    for rival in rivals:
        with pytest.raises(Disagreement):
            check_merge({"rival": build(rival, "tiled", "cpu").run()}, task)
    with pytest.raises(Disagreement):  # mergekit divides by the sum of the weights
        check_merge({"rival": build(task.workload, "tiled", "cpu").run()}, task, {"rival": Habit("mergekit")})


def test_a_habit_that_decides_nothing_is_a_disagreement() -> None:
    task = Task(SMALL)
    merged = build(SMALL, "tiled", "cpu").run()
    with pytest.raises(Disagreement, match="are decided"):
        check_merge({"blurred": merged}, task, {"blurred": Habit(unit=1.0)})


def test_the_kth_magnitude_is_checked() -> None:
    task = Task(Workload("select", "magnitude_prune", 40, 60, adapters=1))
    order = reference.delta(*task.pairs[0], 2.0).abs().flatten().sort(descending=True).values
    check_kth(float(order[task.kept - 1]), task, "sort")
    for wrong in (order[task.kept - 2], order[task.kept]):
        with pytest.raises(Disagreement):
            check_kth(float(wrong), task, "sort")


def test_what_does_not_fit_memory_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "limits", lambda device: measure.Limits(1e10, 1e10))
    monkeypatch.setattr(report, "_free", lambda device: 1e6)
    ours, whole = replace(SMALL, only=("tiled",)), replace(SMALL, adapters=8, rows=800)
    saved: list[int] = []
    made = report.run([whole, ours], "cpu", 60, memory=False, save=lambda so_far: saved.append(len(so_far.rows)))
    assert saved == [1]
    assert list(made.skipped) == ["deltas: ties 8x r16 800x80 d0.2 fp32"]
    assert [each.contestant for each in made.rows] == ["tiled"]


def test_workloads_have_names_of_their_own_and_contestants() -> None:
    names = [(work.kind, work.name) for work in WORKLOADS]
    assert len(set(names)) == len(names)
    assert all(taking_part(work, "cpu") for work in WORKLOADS if work.only != ("triton",))
    assert {work.kind for work in WORKLOADS} == set(KINDS)
    known = {(work.kind, size.name) for work in WORKLOADS for size in work.sizes()}
    assert {(headline.kind, headline.workload) for headline in HEADLINES} <= known


def test_rows_survive_csv_and_json(tmp_path: Path) -> None:
    rows = [row(), row(workload='a "quoted", name', peak_mib=1.5, extra_mib=0.0, flops=2**60, ratio=1 / 3)]
    kept = Report({"machine": "a, b", "cores": 2}, rows, skipped={"x": "about 3 s"})
    write(kept, tmp_path, "cpu")
    assert read(tmp_path / "cpu.json") == kept
    assert read_csv(tmp_path / "cpu.csv") == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu.csv", "cpu.json"]
    lines = (tmp_path / "cpu.csv").read_text().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("machine,cores,kind,workload,contestant")


def test_only_changes_beyond_the_spread_are_told() -> None:
    old = [row(workload=name, peak_mib=100.0) for name in "abcdef"]
    new = [
        row(workload="a", seconds=1.3, low=1.2, high=1.4, peak_mib=100.0),  # slower
        row(workload="b", seconds=1.3, low=1.05, high=1.4, peak_mib=100.0),  # quartiles overlap
        row(workload="c", seconds=0.5, low=0.4, high=0.6, peak_mib=100.0),  # faster
        row(workload="d", peak_mib=140.0),
        row(workload="e", peak_mib=105.0),
        row(workload="f", device="cuda", seconds=9.0, low=9.0, high=9.0),  # another device
        row(workload="g", seconds=9.0),  # new
    ]
    found = [(change.row.workload, change.what, change.factor) for change in compare(old, new)]
    assert found == [("d", "memory", 1.4), ("a", "time", 1.3), ("c", "time", 0.5)]
    assert str(compare(old, new)[1]) == "WORSE  deltas: a: tiled: time 1 -> 1.3 s (1.30x)"
    assert compare([row(low=1.0, high=1.0)], [row(seconds=1.04, low=1.04, high=1.04)]) == []  # below 5 %


def test_headlines_are_ratios_of_rows() -> None:
    headline = next(each for each in HEADLINES if "times as fast" in each.name)
    mine = {"kind": headline.kind, "workload": headline.workload}
    rows = [row(**mine, seconds=0.5), row(**mine, contestant="PEFT", seconds=10.0), row(contestant="PEFT", seconds=1.0)]
    assert headline.value(rows) == 20.0
    assert headline.value(rows[:1]) is None


def test_trends_are_fitted_and_tables_drawn() -> None:
    sizes = [row(kind="adapters", adapters=count, seconds=0.5 * count, extra_mib=2.0) for count in (8, 4, 16)]
    (trend,) = trends([*sizes, row()])
    assert trend.xs == [4, 8, 16]
    assert trend.line.slope == pytest.approx(0.5)
    paired = [
        row(kind="factors", contestant=name, seconds=s, peak_mib=m)
        for name, s, m in (("PEFT", 6.0, 40.0), ("drop-in", 0.05, 8.0))
    ]
    assert drop_in_table(paired).splitlines()[-1] == "| `ties` | 6 s | 50 ms | 120x | 40 and 8 MiB |"
    assert "500 ms an adapter" in markdown(Report({}, sizes))


def test_peak_memory_is_that_of_the_run_alone(importable: None) -> None:
    """What the build holds does not count, and neither does the peak of the warm-up, here four times as large."""
    work = Workload("deltas", "linear", 1024, 1024)
    peak = measure.peak_memory(build, (replace(work, rows=4096), "PEFT", "cpu"), (work, "PEFT", "cpu"))
    # Three deltas of 4 MiB, stacked, and weighted, are there at once; the result is another.
    assert peak.peak_mib is not None and peak.extra_mib is not None
    assert 36 <= peak.peak_mib <= 72  # the warm-up's would be four times as much
    assert peak.peak_mib - peak.extra_mib == pytest.approx(4.0)


def test_a_child_that_fails_says_why(importable: None) -> None:
    wrong = replace(SMALL, method="nonsense")
    with pytest.raises(RuntimeError, match="nonsense"):
        measure.peak_memory(build, (SMALL, "tiled", "cpu"), (wrong, "tiled", "cpu"))


def test_a_device_knows_its_peaks() -> None:
    """As of CUDA, where no process is forked: the largest of the samples, beyond the result and with it."""
    samples = [Sample(1.0, None, 9.0, 4.0), Sample(1.0, None, 8.0, 5.0)]
    assert suite._peak(SMALL, "triton", "cuda", samples, forks=True) == (9.0, 5.0)
    whole = [Sample(1.0, None, 9.0), Sample(1.0, None, 10.0)]
    assert suite._peak(SMALL, "merge-engine", "cpu", whole, forks=False) == (10.0, None)
    assert suite._peak(SMALL, "1 thread", "cpu", [Sample(1.0, None)], forks=False) == (None, None)


def test_a_workload_gives_tidy_rows() -> None:
    limits = measure.Limits(bandwidth=1e9, matmul=1e10)
    rows = measured(replace(SMALL, vary=("rows", (16, 32))), limits=limits, seconds=0.0, memory=False)
    names = ["tiled", "PEFT", "reference"]
    assert [(each.workload, each.contestant) for each in rows] == [
        (f"ties 3x r16 {size}x80 d0.2 fp32", name) for size in (16, 32) for name in names
    ]
    for each in rows:
        rival = next(other for other in rows if (other.workload, other.contestant) == (each.workload, "PEFT"))
        assert each.ratio == rival.seconds / each.seconds
        assert each.flops == 2 * 16 * each.rows * 80 * 3
        assert each.matmul_share == pytest.approx(each.flops / each.seconds / 1e10)
        assert each.low <= each.seconds <= each.high


def test_nothing_is_timed_where_results_disagree() -> None:
    entry = KINDS["deltas"].entries["PEFT"]
    wrong = replace(entry, build=lambda work, device: Contestant(lambda: torch.zeros(work.rows, work.columns)))
    with (
        mock.patch.dict(KINDS["deltas"].entries, {"PEFT": wrong}),  # type: ignore[arg-type]
        mock.patch.object(measure, "interleaved", side_effect=AssertionError("timed")),
        pytest.raises(Disagreement, match="PEFT is wrong"),
    ):
        measured(SMALL, memory=False)


@pytest.mark.filterwarnings("ignore")
def test_a_whole_report(
    importable: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGE_ENGINE_BACKEND", "torch")
    monkeypatch.setattr(measure, "limits", lambda device: measure.Limits(1e10, 1e10))
    by_rows = Workload("elements", "ties", 64, 128, only=("tiled",), vary=("rows", (64, 128)))
    by_adapters = Workload("adapters", "ties", 64, 64, only=("tiled", "PEFT"), vary=("adapters", (2, 4)))
    monkeypatch.setattr(
        report, "WORKLOADS", [by_rows, by_adapters, Workload("deltas", "ties", 8192, 8192, only=("reference",))]
    )
    options = ["--budget", "40", "--shrink", "2", "--output", str(tmp_path)]
    assert report.main([*options, "--markdown"]) == 0
    made = read(tmp_path / "cpu.json")
    assert {row.kind for row in made.rows} == {"elements", "adapters"}
    assert list(made.skipped) == ["deltas: ties 3x r16 4096x4096 d0.2 fp32"]
    assert read_csv(tmp_path / "cpu.csv") == made.rows
    assert {"machine", "cores", "torch", "peft", "commit", "date"} <= set(made.about)
    assert {path.name for path in tmp_path.glob("*.png")} >= {"elements.png", "adapters.png", "memory.png"}
    assert "| workload | contestant | median |" in capsys.readouterr().out

    slower = tmp_path / "old.json"
    found = json.loads((tmp_path / "cpu.json").read_text())
    for each in found["rows"]:
        each.update(seconds=each["seconds"] / 1e3, low=each["low"] / 1e3, high=each["high"] / 1e3)
    slower.write_text(json.dumps(found))
    assert report.main([*options, "--only", "elements", "--compare", str(slower)]) == 0
    assert "WORSE  elements: ties" in capsys.readouterr().out
