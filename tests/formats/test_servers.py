"""What servers ask of an adapter, re-derived from what their code checks."""

import json
import logging

import pytest
import torch
from lora_files import save_factors
from peft_adapters import save_adapter
from peft_models import classifier, edit, saved
from toy_models import save_adapter as save_toy_adapter
from toy_models import save_base

import merge_engine
from merge_engine.errors import RecipeError
from merge_engine.formats.open import open_adapter
from merge_engine.formats.servers import VLLM_RANKS, max_lora_rank, trouble_of_servers, vllm_option

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def vllm_refuses(folder, option):
    """vLLM's PEFTHelper and LoRAConfig, as data: what it says of a configuration that it does not load."""
    config = json.loads((folder / "adapter_config.json").read_text())
    checks = {
        "max_lora_rank": option not in (1, 8, 16, 32, 64, 128, 256, 320, 512),
        "r": not 0 < config["r"] <= option,
        "bias": config.get("bias", "none") != "none",
        "modules_to_save": bool(config.get("modules_to_save")),
        "use_dora": bool(config.get("use_dora")),
        "lora_bias": bool(config.get("lora_bias")),
    }
    return [name for name, refused in checks.items() if refused]


def sglang_refuses(folder):
    """SGLang's LoRAConfig: patterns that say anything else than r and lora_alpha, and DoRA."""
    config = json.loads((folder / "adapter_config.json").read_text())
    pairs = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
    found = [name for name, field in pairs.items() if set((config.get(name) or {}).values()) - {config[field]}]
    return found + (["use_dora"] if config.get("use_dora") else [])


def delta_as_servers_read_it(folder, name):
    """alpha / r of the configuration and no pattern, on the factors as they are in the file."""
    config = json.loads((folder / "adapter_config.json").read_text())
    a, b = open_adapter(folder).factors(name)
    assert len(a) == config["r"]  # vLLM's buffers have this rank
    return config["lora_alpha"] / config["r"] * (b.double() @ a.double())


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Ranks 4 (q, k) and 8 (q, up), one with a pattern and rsLoRA."""
    root = tmp_path_factory.mktemp("mixed")
    return [
        save_adapter(root / "a", 1, r=4, target_modules=["q_proj", "k_proj"], rank_pattern={"k_proj": 3}),
        save_adapter(root / "b", 2, r=8, target_modules=["q_proj", "up_proj"], use_rslora=True),
    ]


@pytest.mark.quick
def test_a_merge_of_mixed_ranks_is_what_servers_load(mixed, tmp_path):
    """The deltas that a server computes are those of the merge with its own ranks, as PEFT reads it."""
    result = merge_engine.merge(mixed, tmp_path / "one", method="linear")
    own = merge_engine.open_adapter(merge_engine.merge(mixed, tmp_path / "own", method="linear", ranks="own").path)
    assert result.rank == 12 and result.max_lora_rank == 16
    assert vllm_refuses(tmp_path / "one", result.max_lora_rank) == [] == sglang_refuses(tmp_path / "one")
    assert sglang_refuses(tmp_path / "own") == ["rank_pattern", "alpha_pattern"]
    assert vllm_refuses(tmp_path / "one", 8) == ["r"]
    for name, module in own.modules.items():
        a, b = own.factors(name)
        wanted = module.scaling * (b.double() @ a.double())
        # zeros add nothing, but float64 may add up the terms in another order
        assert (delta_as_servers_read_it(tmp_path / "one", name) - wanted).abs().max() <= 2**-45 * wanted.abs().max()


def test_what_is_normalized_is_what_servers_load(mixed, tmp_path):
    for number, folder in enumerate(mixed):
        before = open_adapter(folder)
        written = merge_engine.normalize(folder, tmp_path / str(number))
        assert vllm_refuses(written.path, written.max_lora_rank) == [] == sglang_refuses(written.path)
        for name, module in before.modules.items():
            a, b = before.factors(name)
            bound = 2**-24 * module.scaling * (b.double().abs() @ a.double().abs())
            wanted = module.scaling * (b.double() @ a.double())
            assert ((delta_as_servers_read_it(written.path, name) - wanted).abs() <= 1.01 * bound).all()
    assert sglang_refuses(mixed[0]) == ["rank_pattern"]


def test_ranks_of_vllm():
    for rank in range(1, 513):
        wanted = max_lora_rank(rank)
        assert wanted in VLLM_RANKS and rank <= wanted
        assert all(other < rank for other in VLLM_RANKS if other < wanted)
    assert max_lora_rank(513) is None
    assert vllm_option(320) == "vLLM loads it with --max-lora-rank 320"
    assert vllm_option(600) == "vLLM loads ranks up to 512, this adapter has 600"


def test_the_command_says_the_rank_and_the_api_warns(mixed, tmp_path, capsys, caplog):
    from merge_engine.cli.main import main

    assert main(["merge", *map(str, mixed), "-o", str(tmp_path / "out"), "--method", "linear"]) == 0
    assert capsys.readouterr().out.endswith("; vLLM loads it with --max-lora-rank 16\n")
    heads = [classifier(tmp_path / name) for name in ("one", "two")]
    with caplog.at_level(logging.WARNING):
        merge_engine.merge(heads, tmp_path / "heads", method="linear")
        merge_engine.merge(heads, method="linear")  # kept in memory: no server loads it
    (warning,) = [record.message for record in caplog.records]
    assert warning.startswith(f"{tmp_path / 'heads'}: has layers that are saved whole (score.weight), which servers")
    assert "--into BASE" in warning
    assert vllm_refuses(tmp_path / "heads", 16) == ["modules_to_save"]


def test_what_servers_leave_out(tmp_path):
    def trouble(folder):
        adapter = open_adapter(folder)
        return trouble_of_servers(adapter.modules.values(), list(adapter.extras))

    assert trouble(saved(tmp_path / "plain", r=4)) is None
    factors = {name: (torch.ones(2, 5), torch.ones(3, 2)) for name in ("model.embed_tokens", "lm_head", "layers.0.q")}
    names = "LoRA of embeddings and output heads (lm_head, model.embed_tokens)"
    assert trouble(save_factors(tmp_path / "ends", factors)) == names
    copy = {"base_model.model.model.embed_tokens.base_layer.weight": torch.ones(3, 5)}
    assert trouble(save_factors(tmp_path / "copy", factors, extras=copy)) == names
    heads = {f"base_model.model.{name}.weight": torch.ones(2) for name in ("a", "b", "c", "d")}
    edit(save_factors(tmp_path / "heads", factors, extras=heads), modules_to_save=["a", "b", "c", "d"])
    found = "layers that are saved whole (a.weight, b.weight, c.weight and 1 more)"
    assert trouble(tmp_path / "heads") == f"{found} and {names}"


def test_ranks_belong_to_adapters(tmp_path):
    base = save_base(tmp_path / "base")
    with pytest.raises(RecipeError, match=r"^ranks: a merge into a base model has no ranks; wanted none, got own$"):
        merge_engine.merge_into(base, [save_toy_adapter(tmp_path / "sql", 1)], tmp_path / "out", ranks="own")
    assert not (tmp_path / "out").exists()
