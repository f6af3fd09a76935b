"""merge-engine merge."""

import json

import pytest
from command_line import run_cli
from plain_adapters import assert_same, factors_of
from safetensors.torch import save_file
from toy_models import bytes_of, save_adapter, save_base

import merge_engine
from merge_engine.cli.main import main
from merge_engine.cli.result import result_of
from merge_engine.errors import OutputError


@pytest.mark.quick
def test_merge_command_equals_the_api(three, tmp_path, capsys):
    options = ["--method", "ties", "--density", "0.3", "--weights", "2", "1", "-0.5", "--rank", "3", "--scale", "0.5"]
    code, out, err = run_cli(capsys, "merge", *three, "-o", tmp_path / "one", *options)
    assert (code, err) == (0, "")
    assert out.startswith(f"{tmp_path / 'one'}: 3 adapters, 2 modules, rank up to 3, kept energy 0.")
    recipe = {"method": "ties", "density": 0.3, "weights": [2, 1, -0.5], "rank": 3, "scale": 0.5}
    merge_engine.merge(three, tmp_path / "two", **recipe)
    assert_same(tmp_path / "one", tmp_path / "two")


def test_every_option_reaches_the_recipe(three, tmp_path, capsys):
    options = {
        "method": "dare_ties",
        "space": "delta",
        "election": "frequency",
        "scope": "model",
        "trim_ties": "keep",
        "convention": "mergekit",
        "dtype": "bfloat16",
        "seed": "7",
        "energy": "0.9",
        "scale": "2",
        "density": "0.5",
    }
    flags = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value)]
    code, _, err = run_cli(capsys, "merge", *three, "-o", tmp_path / "out", *flags)
    assert (code, err) == (0, "")
    recipe = json.loads((tmp_path / "out" / "merge_report.json").read_text())["recipe"]
    assert {key: str(recipe[key]) for key in options} == {**options, "scale": "2.0"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(three, tmp_path, capsys, value):
    tensors = factors_of(three[1])
    key = "base_model.model.layers.1.q_proj.lora_B.weight"
    tensors[key][3, 2] = value
    save_file(tensors, three[1] / "adapter_model.safetensors")
    code, out, err = run_cli(capsys, "merge", *three, "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    kind = "NaN" if value != value else "Inf"
    file = three[1] / "adapter_model.safetensors"
    assert err == f"merge-engine: error: chat: tensor {key} in {file} holds {kind}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ads", "chat", "sql"]


def test_an_existing_output_is_kept_unless_overwritten(three, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_cli(capsys, "merge", *three, "-o", out, "--method", "linear")[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code, _, err = run_cli(capsys, "merge", *three, "-o", out)
    assert code == 2
    assert err == f"merge-engine: error: {out} already exists; pass --overwrite to replace it\n"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run_cli(capsys, "merge", *three, "-o", out, "--overwrite")[0] == 0
    assert json.loads((out / "merge_report.json").read_text())["recipe"]["method"] == "ties"


def test_the_rank_that_is_told_is_that_of_the_result(three, tmp_path, capsys):
    code, out, _ = run_cli(capsys, "merge", *three, "-o", tmp_path / "out", "--energy", "0.3")
    rank = json.loads((tmp_path / "out" / "merge_report.json").read_text())["modules"]
    highest = max(module["rank"] for module in rank.values())
    assert code == 0 and highest < 12 and f"rank up to {highest}, " in out
    with pytest.raises(SystemExit):
        main(["merge", *map(str, three), "-o", "o", "--rank", "2.5"])
    assert "wanted auto or a whole number, got '2.5'" in capsys.readouterr().err


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
    assert "ranks: a single process merges adapters into one; wanted --into BASE" in capsys.readouterr().err


def test_json_is_one_object_with_what_the_line_says(three, tmp_path, capsys):
    options = ["--method", "dare_ties", "--rank", "1", "--json"]
    code, out, err = run_cli(capsys, "merge", *three, "-o", tmp_path / "out", *options)
    found = json.loads(out)
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert (code, found["output"], found["adapters"]) == (0, str(tmp_path / "out"), 3)
    assert (found["modules"], found["rank"]) == (len(report["modules"]), 1)
    assert found["kept_energy"] == report["energy"] and found["seconds"] > 0
    (warning,) = found["warnings"]
    assert "rank up to 1 keeps" in warning and err == warning + "\n"
    code, out, err = run_cli(capsys, "merge", *three, "-o", tmp_path / "out", *options)
    assert (code, out) == (2, "") and "already exists" in err


def test_json_of_a_model_and_of_a_sweep(tmp_path, capsys):
    base = save_base(tmp_path / "base")
    adapters = [save_adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]
    for more in (["--dry-run"], []):
        code, out, _ = run_cli(capsys, "merge", "--into", base, *adapters, "-o", tmp_path / "full", "--json", *more)
        found = json.loads(out)
        assert (code, found["written"], found["inputs"], found["warnings"]) == (0, not more, 2, [])
        assert found["merged"] > 0 and sum(found["shards"].values()) == found["bytes"]
    sweep = ["--sweep", "scale=0.5,1", "--json"]
    code, out, _ = run_cli(capsys, "merge", *adapters, "-o", tmp_path / "swept", *sweep)
    merges = json.loads(out)["merges"]
    assert code == 0 and len(merges) == 2
    assert all((tmp_path / "swept" / each["name"]).samefile(each["output"]) for each in merges)


@pytest.mark.quick
def test_seconds_are_those_of_the_merge_where_it_tells_them(capsys):
    with result_of({"json": True}) as result:
        result.say("merged", seconds=12.5)
    assert json.loads(capsys.readouterr().out) == {"seconds": 12.5, "warnings": []}
