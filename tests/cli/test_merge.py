"""merge-engine merge."""

import pytest
from toy_models import bytes_of, save_adapter, save_base

import merge_engine
from merge_engine.cli.main import main
from merge_engine.errors import OutputError


def test_a_merge_into_a_base_equals_the_api_and_a_dry_run_writes_nothing(tmp_path, capsys):
    base = save_base(tmp_path / "base")
    adapters = [save_adapter(tmp_path / name, seed) for seed, name in enumerate(["sql", "chat", "ads"], 1)]
    options = ["--into", base, *adapters, "-o", tmp_path / "one", "--density", "0.3", "--shard-size", "1KB"]
    options = [str(option) for option in options]
    assert main(["merge", *options, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "3 inputs, 3 tensors merged, 4 copied" in out and "model-00001-of-0000" in out
    assert not list(tmp_path.glob("*one*"))
    assert main(["merge", *options]) == 0
    assert "3 tensors merged, 4 copied" in capsys.readouterr().out
    merge_engine.merge_into(base, adapters, tmp_path / "two", density=0.3, shard_size=1000)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    with pytest.raises(OutputError, match="already exists"):
        merge_engine.merge_into(base, adapters, tmp_path / "two")


def test_adapters_alone_are_merged_by_one_process(three, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["merge", *map(str, three), "-o", str(tmp_path / "out")]) == 2
    assert "ranks: adapters are merged into one by a single process" in capsys.readouterr().err
