"""merge-engine merge-models."""

import pytest
from tuned_models import save_model, save_three, weights_of

import merge_engine
from merge_engine.cli.main import main


def test_the_command_equals_the_api(tmp_path, capsys):
    base = save_model(tmp_path / "base", 0)
    three = save_three(base)
    options = [*three, "-o", tmp_path / "one", "--base", base, "--convention", "paper"]
    assert main(["merge-models", *map(str, options)]) == 0
    assert "3 inputs, 7 tensors merged, 1 copied" in capsys.readouterr().out
    merge_engine.merge_models(base, three, tmp_path / "two", convention="paper")
    assert weights_of(tmp_path / "one").keys() == weights_of(base).keys()
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    with pytest.raises(SystemExit):
        main(["merge-models", *map(str, three), "-o", str(tmp_path / "three")])
    assert "--base" in capsys.readouterr().err
