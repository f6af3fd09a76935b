"""merge-engine compare."""

import json

import pytest

import merge_engine
from merge_engine.cli import compare as cli_compare
from merge_engine.cli.main import main
from merge_engine.compare import page as compare_page


def test_the_command_equals_the_api(three, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(compare_page, "render", lambda result: f"{result.adapters} at {result.density}")
    files = {"--json": tmp_path / "new" / "figures.json", "--html": tmp_path / "report.html"}
    options = [str(word) for pair in files.items() for word in pair]
    assert main(["compare", *map(str, three), "--density", "0.1", *options]) == 0
    result = merge_engine.interference(three, density=0.1)
    assert capsys.readouterr().out == result.table() + "\n"
    assert json.loads(files["--json"].read_text()) == json.loads(json.dumps(result.as_dict()))
    assert files["--html"].read_text() == "('sql', 'chat', 'ads') at 0.1"
    assert main(["compare", *map(str, three), *options]) == 2
    error = capsys.readouterr().err
    assert error == f"merge-engine: error: {files['--json']} already exists; pass --overwrite to replace it\n"
    assert main(["compare", *map(str, three), *options, "--overwrite"]) == 0
    assert json.loads(files["--json"].read_text())["density"] == 0.2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ads", "chat", "new", "report.html", "sql"]


def test_mistakes_are_told(three, tmp_path, capsys, monkeypatch):
    assert main(["compare", str(three[0])]) == 2
    assert "wanted at least two to compare, got 1" in capsys.readouterr().err
    monkeypatch.setattr(cli_compare, "find_spec", lambda name: None)
    assert main(["compare", *map(str, three), "--html", str(tmp_path / "report.html")]) == 2
    assert "html: needs matplotlib" in capsys.readouterr().err and not (tmp_path / "report.html").exists()
