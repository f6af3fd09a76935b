"""merge-engine info."""

import json

import pytest
import torch
from command_line import run_cli
from lora_files import save_factors

from merge_engine.cli.main import main
from merge_engine.engine.choose_backend import VARIABLE
from merge_engine.formats.open import open_adapter


@pytest.mark.quick
def test_info_shows_what_an_adapter_is(three, capsys):
    code, out, err = run_cli(capsys, "info", three[0])
    assert (code, err) == (0, "")
    adapter = open_adapter(three[0])
    for name in adapter.modules:
        A, B = adapter.factors(name)
        line = next(line for line in out.splitlines() if name in line)
        assert line.split()[1:-1] == ["linear", "24", "x", "40", "4", "2"]
        assert float(line.split()[-1]) == pytest.approx(2 * (B.double() @ A.double()).norm().item(), rel=1e-3)
    assert "base model  base" in out and "modules     2, rank 4" in out
    assert adapter.size_bytes == 2048 and "size        2.04 KB" in out


def test_info_system_says_which_and_why(capsys, monkeypatch):
    monkeypatch.setenv(VARIABLE, "torch")
    assert main(["info", "--system"]) == 0
    out = capsys.readouterr().out
    assert f"torch         {torch.__version__}, {torch.get_num_threads()} thread" in out
    assert "backend       torch on cpu (MERGE_ENGINE_BACKEND=torch)" in out
    assert "triton " in out
    assert main(["info"]) == 2


@pytest.mark.quick
def test_info_as_json(three, capsys):
    code, out, err = run_cli(capsys, "info", three[0], three[1], "--system", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "") and found["system"]["torch"].startswith(torch.__version__)
    assert [each["name"] for each in found["adapters"]] == ["sql", "chat"]
    adapter = open_adapter(three[0])
    for module in found["adapters"][0]["modules"]:
        A, B = adapter.factors(module["module"])
        assert (module["rows"], module["columns"], module["rank"]) == (len(B), A.shape[1], len(A))
        assert module["norm"] == pytest.approx(2 * (B.double() @ A.double()).norm().item(), rel=1e-6)


def test_a_norm_is_positive_whatever_the_scaling(tmp_path, capsys):
    folder = save_factors(tmp_path / "a", {"q": (torch.ones(1, 4), torch.ones(9, 1))}, lora_alpha=-0.5)
    assert run_cli(capsys, "info", folder)[1].split()[-1] == "3"
    (module,) = json.loads(run_cli(capsys, "info", folder, "--json")[1])["adapters"][0]["modules"]
    assert (module["scaling"], module["norm"]) == (-0.5, 3.0)


def test_info_of_dora_and_experts(tmp_path, capsys):
    from expert_models import save_experts
    from peft_models import llama, saved

    dora = saved(tmp_path / "dora", llama, r=2, target_modules=["q_proj"], use_dora=True)
    experts = save_experts(tmp_path / "experts", 1)
    assert main(["info", str(dora), str(experts)]) in (None, 0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines if "q_proj" in line][:2] == ["DoRA", "DoRA"]
    (row,) = [line.split() for line in lines if "layers.1.mlp.experts.down_proj.2 " in line]
    assert row[1:6] == ["linear", "16", "x", "12", "4"] and float(row[-1]) > 0


def test_letters_of_a_file_that_a_terminal_would_obey_are_escaped(tmp_path, capsys):
    factors = {"layers.\x1b[2J\n.x": (torch.ones(1, 2), torch.ones(3, 1))}
    save_factors(tmp_path / "a", factors, base_model_name_or_path="\u202ebase\r")
    code, out, _ = run_cli(capsys, "info", tmp_path / "a")
    assert code == 0 and "layers.\\x1b[2J\\n.x" in out and "\\u202ebase\\r" in out
    assert out.replace("\n", "").isprintable()
    save_factors(tmp_path / "a", factors, {"\x1b[2J": torch.ones(2)})
    code, _, errors = run_cli(capsys, "info", tmp_path / "a")
    assert code == 2 and errors.startswith("merge-engine: error: a: tensor \\x1b[2J is unknown")
