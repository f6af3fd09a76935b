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
    file.write_text("merge_method: ties\nadapters: [a]")
    assert main([*run, str(tmp_path / "three")]) == 2
    assert capsys.readouterr().err.startswith(f"merge-engine: error: {file}: adapters is not supported; wanted one of ")
