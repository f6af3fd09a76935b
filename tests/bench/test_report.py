"""The benchmarks' own arithmetic: what they measure with, what they check results against, and what they write."""

import csv
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bench import into_base, measure, report, static_cost, suite
from bench.agreement import Disagreement, Habit, check_kth, check_merge
from bench.contestants import KINDS, build, taking_part
from bench.inputs import MODELS, TINY_LLAMA, llama
from bench.measure import Contestant, Sample, fit, interleaved, spread
from bench.results import (
    EXTRAPOLATED,
    HEADLINES,
    Report,
    Row,
    compare,
    drop_in_table,
    markdown,
    read,
    read_csv,
    trends,
    write,
)
from bench.suite import agreed, expected, measured
from bench.whole_merge import with_extrapolation
from bench.workloads import WORKLOADS, Task, Workload
from merge_engine.rules import reference

ROOT = Path(__file__).parents[2]
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

    class Told(measure.Clock):
        def sample(self, contestant: Contestant) -> Sample:
            return Sample(1.0, contestant.run())

    contestants = {name: Contestant(lambda name=name: order.append(name)) for name in "ab"}
    first = {"a": Sample(0.1, None), "b": Sample(2 * measure.SLOW, None)}
    taken = interleaved(contestants, Told(), seconds=0, first=first, least=3, most=9)
    assert "".join(order) == "aabab"
    assert [sample.seconds for sample in taken["b"]] == [2 * measure.SLOW, 1.0, 1.0]
    assert all(sample.result is None for samples in taken.values() for sample in samples)
    order.clear()
    interleaved(contestants, Told(), seconds=10.5, least=1, most=9)
    assert "".join(order) == "ab" * 5  # a sixth round would end after 12 seconds


def test_rounds_of_processes_count_from_the_first_and_end_by_the_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may report less than they take: here 1 of 20 seconds."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def run() -> Sample:
        now[0] += 20.0
        return Sample(1.0, None)

    contestants = {name: Contestant(run, own_clock=True) for name in "ab"}
    first = {"a": Sample(0.5, None), "b": Sample(0.1, None)}
    taken = interleaved(contestants, measure.Clock(), seconds=50.0, first=first, least=1, most=9)
    assert [sample.seconds for sample in taken["a"]] == [0.5, 1.0]
    assert len(taken["b"]) == 2


def test_the_clock_does_not_count_what_makes_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: 2 * now[0])

    def takes(seconds: float) -> None:
        now[0] += seconds

    sample = measure.Clock().sample(Contestant(lambda: takes(3.0) or "done", ready=lambda: takes(100.0)))
    assert sample == Sample(3.0, "done", processor=6.0)


def test_a_process_knows_the_time_of_its_children_on_cpus() -> None:
    """A thread and a child of the process, 0.2 seconds each."""
    spin = "import time\nwhile time.process_time() < 0.2: pass"
    both = f"import subprocess, sys\n{spin}\nsubprocess.run([sys.executable, '-S', '-c', {spin!r}])"
    sample = measure.whole_process([sys.executable, "-S", "-c", both])
    assert sample.processor is not None and sample.processor >= 0.4
    with pytest.raises(RuntimeError, match="nonsense"):
        measure.whole_process([sys.executable, "-S", "-c", "import nonsense"])


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


def test_every_kind_has_a_place_in_ten_minutes() -> None:
    """As the table of expected costs has it; kinds come in order of importance."""
    kinds = [work.kind for work in WORKLOADS]
    last = max(kinds.index(kind) for kind in KINDS)
    assert sum(expected(work, "cpu") for work in WORKLOADS[: last + 1]) <= 600 - report.ENDING


def test_pefts_whole_merge_is_a_sum_of_its_layers() -> None:
    block = sum(rows * columns for rows, columns in TINY_LLAMA.values())
    whole = row(kind="whole", contestant="merge-engine", layers=3, rows=0, columns=0, seconds=2.0, elements=3 * block)
    whole = replace(whole, processor=4.0, peak_mib=500.0, excess=1e-5, kept_energy=0.3)
    took = {(256, 2048): 0.25, (2048, 2048): 2.0, (2048, 5632): 8.0, (5632, 2048): 5.0}
    layers = [
        row(
            kind="layer", workload=f"{m}x{n}", contestant=name, method="ties_svd", rows=m, columns=n, seconds=t * faster
        )
        for (m, n), t in took.items()
        for name, faster in (("PEFT", 1.0), ("drop-in", 0.01))
    ]
    layers = [replace(each, low=0.5 * each.seconds, processor=2 * each.seconds, peak_mib=9.0) for each in layers]
    for rows in ([whole, *layers], [*layers, whole]):
        made = with_extrapolation(rows)
        assert with_extrapolation(made) == made
        ours, theirs = (each for each in made if each.kind == "whole")
        assert [each for each in made if each.kind == "layer"] == layers
        # Of a block: q and o; k and v; gate and up; down.
        assert theirs.contestant == EXTRAPOLATED
        assert theirs.seconds == 3 * (2 * 2.0 + 2 * 0.25 + 2 * 5.0 + 8.0)
        assert (theirs.low, theirs.processor) == (theirs.seconds / 2, theirs.seconds * 2)
        assert (theirs.peak_mib, theirs.excess, theirs.kept_energy) == (None, None, None)
        assert theirs.source.startswith("6 x layer: 256x2048, PEFT + 6 x layer: 2048x2048, PEFT + 3 x ")
        assert (ours.baseline, ours.ratio) == (EXTRAPOLATED, theirs.seconds / 2.0)
        assert replace(ours, baseline="", ratio=None) == whole
    assert theirs.source in markdown(Report({}, made))
    for rows in ([whole, *layers[2:]], [replace(whole, rank=8), *layers], [replace(whole, elements=64), *layers]):
        assert with_extrapolation(rows) == rows


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a model whose layers are small."""
    monkeypatch.setenv("MERGE_ENGINE_BACKEND", "torch")
    monkeypatch.setitem(MODELS, "tiny", llama(64, 64, 96))
    return "tiny"


def test_a_whole_merge_knows_its_energy_and_error(tiny: str) -> None:
    (made,) = measured(Workload("whole", "ties", layers=2, model=tiny), least=1, most=1)
    assert made.peak_mib is not None and made.peak_mib > 50  # an interpreter with torch
    assert made.processor is not None and made.processor > 0
    assert made.kept_energy is not None and 0.2 < made.kept_energy < 1
    assert made.excess is not None and -1e-6 < made.excess <= 1e-3
    assert (made.layers, made.elements) == (2, 2 * (4 * 64 * 64 + 3 * 64 * 96))


def test_many_recipes_are_counted_and_compared(tiny: str) -> None:
    work = Workload("many", "linear, weights x scale", adapters=8, layers=1, model=tiny, only=("singly", "merge_many"))
    singly, at_once = measured(work, least=1, most=1)
    assert (singly.contestant, at_once.contestant, singly.ratio) == ("singly", "merge_many", 1.0)
    assert at_once.ratio == singly.seconds / at_once.seconds
    assert all(each.processor and each.peak_mib for each in (singly, at_once))
    for kind in ("many", "session"):
        with pytest.raises(Disagreement, match="different bits"):
            KINDS[kind].check(work, {"singly": "one", "Session": "other"}, "cpu")


def test_a_session_counts_what_changes_weights_only(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(way: str, adapters: list[Path], grid: str, count: Callable[[list[float]], float]) -> Sample:
        return Sample(count([9.0, 1.0, 4.0, 2.0]), "digest")

    monkeypatch.setattr("bench.many.measured", told)
    work = Workload("session", "ties, other weights", adapters=8, layers=1, model=tiny)
    assert [made.seconds for made in measured(work, least=1, most=1)] == [2.0, 2.0]
    work = replace(work, kind="many", method="ties, density x scale")
    assert [made.seconds for made in measured(work, least=1, most=1)] == [16.0] * 3


def test_errors_of_merges_into_a_base_are_against_rounding_once(tiny: str, tmp_path: Path) -> None:
    work, check = Workload("base", "ties", layers=1, model=tiny), KINDS["base"].check
    sample = build(work, "merge-engine", "cpu").run()
    assert sample.seconds > 0 and sample.peak_mib > 50 and sample.processor > 0
    assert check(work, {"merge-engine": sample.result}, "cpu") is None

    name = "model.safetensors"
    ours = {key: tensor.float() for key, tensor in load_file(sample.result / name).items()}
    save_file({key: tensor * 1.01 for key, tensor in ours.items()}, tmp_path / name)
    excess = check(work, {"merge-engine": sample.result, "mergekit-yaml": tmp_path}, "cpu")
    assert excess is not None and excess["merge-engine"] == 0.0
    exact = load_file(into_base.output_of(sample.result, "float32") / name)
    merged = [key for key in exact if "_proj" in key]
    assert len(merged) == 7
    errors = [
        torch.cat([(wanted - exact[key]).double().flatten() for key, wanted in of.items() if key in merged]).norm()
        for of in ({key: tensor * 1.01 for key, tensor in ours.items()}, {k: t.bfloat16() for k, t in exact.items()})
    ]
    assert excess["mergekit-yaml"] == pytest.approx(float(errors[0] / errors[1]) - 1)

    with pytest.raises(Disagreement, match=r"elements of .*q_proj are off"):
        check(work, {"merge-engine": tmp_path}, "cpu")


def test_ranks_have_to_write_the_same_bytes(tiny: str) -> None:
    work, check = Workload("ranks", "dare_ties", layers=1, model=tiny), KINDS["ranks"].check
    begun = time.perf_counter()
    sample = build(work, "2 ranks", "cpu").run()
    assert 0 <= sample.seconds < time.perf_counter() - begun  # the merge's own report, a part of it
    output, digest = sample.result
    assert sorted(file.name for file in output.parent.iterdir()) == ["a", "b", "base", "c", output.name]
    check(work, {"1 rank": sample.result, "2 ranks": sample.result}, "cpu")

    with (output / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    other = into_base.digest(output)
    assert other != digest
    with pytest.raises(Disagreement, match="different bytes"):
        check(work, {"1 rank": sample.result, "2 ranks": (output, other)}, "cpu")


def test_static_figures_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = static_cost.KernelRow(
        "sm_90", "H100 SXM", "ties", "bf16", 64, 64, 4, 168, 0, 9216, 0.1875, 7.46875, 3.25, 31.5
    )
    merges = static_cost.MergeRow("sm_90", "H100 SXM", "TinyLlama", 1.695e-3, 9.4e-5, 6.01e-4, "issue")
    monkeypatch.setattr(static_cost, "kernel_rows", lambda: [kernel])
    monkeypatch.setattr(static_cost, "merge_rows", lambda: [merges])
    assert report.main(["--only", "static", "--output", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["static_kernels.csv", "static_merges.csv"]
    for name, made in (("static_kernels", kernel), ("static_merges", merges)):
        with (tmp_path / f"{name}.csv").open(newline="") as file:
            (line,) = csv.DictReader(file)
        assert {"torch", "triton", "commit"} <= set(line)
        assert {key: line[key] for key in asdict(made)} == {key: str(value) for key, value in asdict(made).items()}
    assert "| sm_90 | H100 SXM | ties | bf16 | 64 | 64 | 4 | 168 | 0 | 9216 | 0.188 | 7.47 |" in capsys.readouterr().out
    for only in ("static,deltas", "nonsense"):
        with pytest.raises(SystemExit):
            report.main(["--only", only, "--output", str(tmp_path)])


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
