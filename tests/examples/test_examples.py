"""The examples run, and what they say is true."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

import merge_engine
from merge_engine.demo import BASE, adapter_paths

ROOT = Path(__file__).parents[2]
THREE = list(adapter_paths().values())[:3]


@pytest.fixture
def run(monkeypatch, capsys):
    """run(script, arguments) -> what it prints."""

    def run_it(script, *arguments):
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    return run_it


def same_adapter(folder, wanted):
    written = merge_engine.open_adapter(folder)
    for name in written.modules:
        assert all(map(torch.equal, written.factors(name), wanted.factors(name)))


def test_merge_three(run, tmp_path):
    text = run(ROOT / "examples" / "merge_three.py", tmp_path / "out")
    merge_engine.merge(THREE, tmp_path / "wanted", method="tsv", scale="auto")
    same_adapter(tmp_path / "out", merge_engine.open_adapter(tmp_path / "wanted"))
    assert "14 modules of rank 24, kept energy 1.0000" in text


def test_compare_first(run):
    text = run(ROOT / "examples" / "compare_first.py")
    assert merge_engine.interference(list(adapter_paths().values())).table() in text


def test_search_scale_finds_the_sum(run, tmp_path):
    """The score is the cosine to the plain sum, which linear is."""
    text = run(ROOT / "examples" / "search_scale.py", tmp_path / "out")
    assert text.splitlines()[-1] == f"best: {tmp_path / 'out' / 'linear'}"


def test_into_a_model(run, tmp_path):
    text = run(ROOT / "examples" / "into_a_model.py", tmp_path / "out")
    base, merged = (merge_engine.open_checkpoint(folder) for folder in (BASE, tmp_path / "out"))
    changed = [key for key in base.tensors if not torch.equal(base.tensors[key].read(), merged.tensors[key].read())]
    assert len(changed) == 14 and "14 tensors merged" in text


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebook(run, path, tmp_path):
    """Its cells, one after the other, in one process."""
    pytest.importorskip("matplotlib").use("agg")
    notebook = json.loads(path.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in cells)
    script = tmp_path / "cells.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells) + "\nprint('best is', best.trial.name)\n")
    assert run(script).splitlines()[-1] == "best is linear"
