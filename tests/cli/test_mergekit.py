"""merge-engine merge with a recipe of mergekit's."""

import yaml
from mergekit_oracle import RECIPES, save_home

from merge_engine.cli.main import main
from merge_engine.mergekit.recipe import merge_recipe


def test_the_command_equals_the_api(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(save_home(tmp_path))
    file = tmp_path / "dare.yml"
    file.write_text(yaml.safe_dump(RECIPES["dare_ties"]))
    run = ["merge", str(file), "-o"]
    assert main([*run, str(tmp_path / "one"), "--seed", "7", "--shard-size", "4KB"]) == 0
    assert f"{tmp_path / 'one'}: 3 inputs, 48 tensors merged, 0 copied" in capsys.readouterr().out
    merge_recipe(str(file), tmp_path / "two", seed=7, shard_size="4KB")
    files = sorted(path.name for path in (tmp_path / "one").glob("*.safetensors"))
    assert len(files) > 1
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    assert main([*run, str(tmp_path / "three"), "--dry-run"]) == 0
    assert "would be 3 inputs" in capsys.readouterr().out and not (tmp_path / "three").exists()
    for option in (["--method", "ties"], ["--into", "base"], ["--dtype", "float16"], ["--density", "0.5"]):
        assert main([*run, str(tmp_path / "three"), *option]) == 2
        message = (
            f"merge-engine: error: {option[0]}: wanted it in {file}, a recipe of mergekit's; got it as an option\n"
        )
        assert capsys.readouterr().err == message
    file.write_text("merge_method: ties\nbase_modle: a")
    assert main([*run, str(tmp_path / "three")]) == 2
    message = f"merge-engine: error: {file}: base_modle is no key of mergekit's; did you mean base_model?\n"
    assert capsys.readouterr().err == message


def test_a_file_of_several_recipes(tmp_path, monkeypatch, capsys):
    """Named results are inputs of others, whatever the order, and are not made again."""
    monkeypatch.chdir(save_home(tmp_path))
    last = {"merge_method": "slerp", "base_model": "mean", "models": [{"model": "ft3"}], "parameters": {"t": 0.5}}
    mean = {"merge_method": "linear", "models": [{"model": "ft1"}, {"model": "ft2"}], "parameters": {"weight": 1}}
    (tmp_path / "two.yml").write_text(yaml.safe_dump_all([last, {**mean, "name": "mean"}]))
    assert main(["merge", "two.yml", "-o", "out"]) == 0
    merge_recipe(mean, "by-hand")
    merge_recipe({**last, "base_model": "by-hand"}, "want")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "want/model.safetensors").read_bytes()
    before = (tmp_path / "out.steps/mean/model.safetensors").stat().st_mtime_ns
    assert main(["merge", "two.yml", "-o", "out", "--overwrite"]) == 0
    assert (tmp_path / "out.steps/mean/model.safetensors").stat().st_mtime_ns == before
    (tmp_path / "two.yml").write_text(yaml.safe_dump_all([last, {**mean, "name": "mean", "dtype": "float16"}]))
    assert main(["merge", "two.yml", "-o", "out", "--overwrite"]) == 2
    assert "out.steps/mean holds the result of another recipe; remove it" in capsys.readouterr().err
    circle = [{**last, "name": "a", "base_model": "b"}, {**last, "name": "b", "base_model": "a"}]
    (tmp_path / "two.yml").write_text(yaml.safe_dump_all(circle))
    assert main(["merge", "two.yml", "-o", "other"]) == 2
    assert "a, b need each other's results" in capsys.readouterr().err
