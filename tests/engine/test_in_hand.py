"""A merge that was kept in memory, written, given to PEFT, and shown."""

import json

import pytest
import torch
from peft_adapters import WEIGHTS, in_peft, peft_deltas, save_adapter, tiny_llama
from safetensors.torch import load_file

import merge_engine
from merge_engine.errors import MergeError, OutputError, RecipeError

RECIPE = {"method": "ties", "density": 0.5, "weights": WEIGHTS}


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("more", [{}, {"ranks": "own"}, {"dtype": "bfloat16", "scale": "auto"}])
def test_saved_is_what_a_merge_into_the_folder_writes(uneven, tmp_path, more):
    kept = merge_engine.merge(uneven, **RECIPE, **more)
    want = merge_engine.merge(uneven, tmp_path / "want", **RECIPE, **more)
    written = kept.save(tmp_path / "deep" / "got")
    assert files(tmp_path / "deep" / "got") == files(tmp_path / "want")
    assert written.path == tmp_path / "deep" / "got" and not written.modules and written.ranks == want.ranks
    assert kept.modules and kept.path is None
    want.save(tmp_path / "copy")
    assert files(tmp_path / "copy") == files(tmp_path / "want")
    for merged in (kept, want):
        with pytest.raises(OutputError, match="already exists"):
            merged.save(tmp_path / "copy")
        merged.save(tmp_path / "copy", overwrite=True)
        with pytest.raises(MergeError, match=r"input|holds"):
            merged.save(uneven[0], overwrite=True)
    with pytest.raises(OutputError):
        want.save(tmp_path / "want", overwrite=True)
    assert files(tmp_path / "copy") == files(tmp_path / "want")


def test_tensors_are_those_of_the_file(uneven, tmp_path):
    kept = merge_engine.merge(uneven, **RECIPE)
    want = merge_engine.merge(uneven, tmp_path / "want", **RECIPE)
    stored = load_file(tmp_path / "want" / "adapter_model.safetensors")
    for merged in (kept, want):
        config, tensors = merged.as_tensors()
        assert config == json.loads((tmp_path / "want" / "adapter_config.json").read_text())
        for found in (tensors, merged.state_dict()):
            assert found.keys() == stored.keys()
            assert all(torch.equal(found[key], stored[key]) for key in stored)


def test_peft_takes_it_without_a_file(uneven, tmp_path):
    """The deltas that PEFT has are those that it loads from the folder, for every form of ranks."""
    model = in_peft(uneven)
    for ranks in ("one", "own"):
        merged = merge_engine.merge(uneven, **RECIPE, ranks=ranks)
        merged.apply_to(model, f"merged_{ranks}")
        assert model.active_adapter == f"merged_{ranks}"
        merged.save(tmp_path / ranks)
        want = peft_deltas(in_peft([tmp_path / ranks]), "0")
        got = peft_deltas(model, f"merged_{ranks}")
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    with pytest.raises(RecipeError, match=r"wanted a new name for the adapter, the model has 'merged_one'"):
        merged.apply_to(model, "merged_one")
    with pytest.raises(RecipeError, match="wanted a PeftModel, got LlamaForCausalLM"):
        merged.apply_to(tiny_llama())


def test_a_model_that_does_not_fit_stays_as_it_was(uneven, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 37, "hidden_size": 32, "intermediate_size": 56, "num_attention_heads": 4}
    short = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=1, num_key_value_heads=2))
    wide = LlamaForCausalLM(LlamaConfig(**shape | {"hidden_size": 64}, num_hidden_layers=2, num_key_value_heads=2))
    merged = merge_engine.merge(uneven, **RECIPE)
    for base in (short, wide):
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(RecipeError, match=r"^apply_to: "):
            merged.apply_to(model, "merged")
        assert list(model.peft_config) == ["default"] and model.active_adapter == "default"
        assert not any(".merged." in name for name, _ in model.named_parameters())


def test_what_a_notebook_shows(tmp_path):
    folders = [save_adapter(tmp_path / name, seed) for seed, name in enumerate(["<b>sql", "chat"])]
    merged = merge_engine.merge(folders, method="linear", rank=2, weights=[2, 0.5])
    page = merged._repr_html_()
    for text in ("&lt;b&gt;sql * 2, chat * 0.5", "linear", "up to 2", f"{merged.total_energy:.4f}", "in memory"):
        assert text in page
    assert "<b>" not in page and page.count("kept in ") == 5
    assert str(tmp_path / "out") in merged.save(tmp_path / "out")._repr_html_()
