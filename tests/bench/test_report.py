"""`python -m bench.report` as a whole."""

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from bench import report
from bench.harness import machine
from bench.harness.processes import Peak
from bench.harness.workloads import Workload
from bench.reporting.files import read, read_csv
from bench.static import rows as static

SMALL = Workload("deltas", "ties", 48, 80)


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's rates are not measured."""
    monkeypatch.setattr(machine, "limits", lambda device: machine.Limits(1e10, 1e10))


def test_a_workload_that_does_not_fit_into_memory_is_skipped(rates: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda device: 1e6)
    ours, whole = replace(SMALL, only=("tiled",)), replace(SMALL, adapters=8, rows=800)
    saved: list[int] = []
    made = report.run([whole, ours], "cpu", 60, memory=False, save=lambda so_far: saved.append(len(so_far.rows)))
    assert saved == [1]
    assert list(made.skipped) == ["deltas: ties 8x r16 800x80 d0.2 fp32"]
    assert [each.contestant for each in made.rows] == ["tiled"]


@pytest.mark.filterwarnings("ignore")
def test_a_whole_report(
    importable: None, rates: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGE_ENGINE_BACKEND", "torch")
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

    monkeypatch.setattr("bench.harness.suite.peak_memory", lambda *arguments: Peak(2.0, 1.0))
    faster = tmp_path / "old.json"
    found = json.loads((tmp_path / "cpu.json").read_text())
    for each in found["rows"]:
        each.update(seconds=each["seconds"] / 1e3, low=each["low"] / 1e3, high=each["high"] / 1e3)
    faster.write_text(json.dumps(found))
    assert report.main([*options, "--only", "elements", "--compare", str(faster)]) == 0
    assert "WORSE  elements: ties" in capsys.readouterr().out


@pytest.mark.quick
def test_static_figures_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = 64, 64, 4, 168, 0, 9216, 0.1875, 7.46875, 3.25, 31.5, 0.0583, "issue"
    kernel = static.KernelRow("sm_90", "H100 SXM", "ties", "bf16", *figures)
    seconds = 2.9e-3, 1.8e-4, 1.6e-3, 6.01e-4, 4.76e-3, "sweeps", 1.3e-3, 0.55, 1.02, 1.576
    merges = static.MergeRow("sm_90", "H100 SXM", "TinyLlama", "ties", 3, 48, *seconds, 8, 24.0, 25.6)
    monkeypatch.setattr(static, "kernel_rows", lambda: [kernel])
    monkeypatch.setattr(static, "merge_rows", lambda: [merges])
    assert report.main(["--only", "static", "--output", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["static_kernels.csv", "static_merges.csv"]
    for name, made in (("static_kernels", kernel), ("static_merges", merges)):
        with (tmp_path / f"{name}.csv").open(newline="") as file:
            (line,) = csv.DictReader(file)
        assert {"torch", "triton", "commit"} <= set(line)
        assert {key: line[key] for key in asdict(made)} == {key: str(value) for key, value in asdict(made).items()}
    printed = capsys.readouterr().out
    assert "| sm_90 | H100 SXM | ties | bf16 | 64 | 64 | 4 | 168 | 0 | 9216 | 0.188 | 7.47 |" in printed
    assert "| 0.55 | 1.02 | 1.58 | 8 | 24 | 25.6 |" in printed
    assert printed.startswith("Estimated from machine code") and "nothing was run on a GPU" in printed


@pytest.mark.quick
@pytest.mark.parametrize("only", ["static,deltas", "nonsense"])
def test_unknown_kinds_are_refused(only: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        report.main(["--only", only, "--output", str(tmp_path)])
    assert "wanted some of select, deltas" in capsys.readouterr().err
