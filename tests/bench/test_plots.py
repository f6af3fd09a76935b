"""The charts of README and docs come from what was measured."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from bench.reporting import plots
from bench.reporting.files import read_csv

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows():
    return read_csv(ROOT / "bench" / "results" / "cpu.csv")


def test_what_readme_says_first_is_what_its_chart_shows(rows):
    whole = plots.beside_peft(rows)[0]
    text = " ".join(re.sub("<!--.*?-->", "", (ROOT / "README.md").read_text()).split())
    ours, peft = re.search(r"in (\d+) seconds on two CPU cores, where PEFT needs ([\d.]+) minutes", text).groups()
    assert (ours, peft) == (f"{whole.ours:.0f}", f"{whole.peft / 60:.1f}")


def test_memory_is_beyond_the_result(rows):
    memory = plots.beside_peft(rows)[2]
    (peft,) = (
        row
        for row in rows
        if row.kind == "deltas" and row.workload.startswith("ties") and row.rows == 4096 and row.contestant == "PEFT"
    )
    assert memory.peft == peft.extra_mib == peft.peak_mib - 64  # the result is 4096 x 4096 x 4 bytes


def test_without_a_row_there_is_no_chart(rows):
    assert plots.beside_peft([row for row in rows if row.kind != "whole"]) == []
    assert plots.beside_peft([replace(row, extra_mib=None) for row in rows]) == []


@pytest.fixture
def drawn(monkeypatch):
    """Each figure as it is saved."""
    pytest.importorskip("matplotlib").use("agg")
    from matplotlib import pyplot

    found = []
    monkeypatch.setattr(pyplot, "close", found.append)
    yield found
    monkeypatch.undo()
    pyplot.close("all")


def test_time_and_memory_are_drawn_from_zero(rows, tmp_path, drawn):
    paths = plots.plot(rows, tmp_path)
    by_name = {path.stem: figure for path, figure in zip(paths, drawn, strict=True)}
    for axes in by_name["peft"].axes:
        assert axes.get_xscale() == "linear" and axes.get_xlim()[0] == 0
    (axes,) = by_name["memory"].axes
    assert axes.get_yscale() == "linear" and axes.get_ylim()[0] == 0 and axes.get_xlim()[0] == 0
