"""Reports on disk."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.harness.row import Row
from bench.reporting.files import Report, read, read_csv, write


@pytest.mark.quick
def test_rows_survive_csv_and_json(tmp_path: Path, row: Callable[..., Row]) -> None:
    rows = [row(), row(workload='a "quoted", name', peak_mib=1.5, extra_mib=0.0, flops=2**60, ratio=1 / 3)]
    kept = Report({"machine": "a, b", "cores": 2}, rows, skipped={"x": "about 3 s"})
    write(kept, tmp_path, "cpu")
    assert read(tmp_path / "cpu.json") == kept
    assert read_csv(tmp_path / "cpu.csv") == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu.csv", "cpu.json"]
    lines = (tmp_path / "cpu.csv").read_text().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("machine,cores,kind,workload,contestant")
