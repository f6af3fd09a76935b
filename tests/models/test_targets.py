"""Which tensor a module is merged into, and how it lies there: against PEFT's merge_and_unload."""

from contextlib import nullcontext

import pytest
import torch
from lora_files import save_factors
from safetensors.torch import save_file
from toy_models import save_adapter, weights_of

import merge_engine
from merge_engine.errors import ModelError


def peft_model(model, folder, **config):
    from peft import LoraConfig, get_peft_model

    made = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **config))
    made.save_pretrained(folder, save_embedding_layers=False)
    return made


def tiny_llama(tie=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 37, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tie))


def tiny_classifier():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    shape = {"vocab_size": 37, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
    return BertForSequenceClassification(BertConfig(**shape, num_attention_heads=4))


def tiny_gpt2(tie=True):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"vocab_size": 37, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**shape, tie_word_embeddings=tie))


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (tiny_llama, {"target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"]}),
        (tiny_gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
        (tiny_gpt2, {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}),
        (tiny_classifier, {"target_modules": ["word_embeddings", "query"]}),
        (lambda: tiny_gpt2(tie=False), {"target_modules": ["attn.c_proj", "lm_head"]}),
        (lambda: tiny_gpt2(tie=False), {"target_modules": ["c_attn", "c_proj", "lm_head"]}),
        (tiny_llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "use_rslora": True}),
        (lambda: tiny_llama(tie=True), {"target_modules": ["q_proj", "up_proj"]}),
    ],
    ids=["llama", "gpt2", "gpt2 squares", "classifier", "gpt2 squares and head", "gpt2 and head", "saved head", "tied"],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
def test_one_adapter_is_pefts_merge_and_unload(tmp_path, make, config):
    """And transformers loads the result, whose logits are those of the adapted model."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make().save_pretrained(base)
    adapted = peft_model(make(), adapter, **config)
    if "modules_to_save" in config:
        with torch.no_grad():
            adapted.base_model.model.lm_head.modules_to_save["default"].weight.add_(1)
        adapted.save_pretrained(adapter, save_embedding_layers=False)
    merge_engine.merge_into(base, [adapter], tmp_path / "out", method="linear")
    ids = torch.arange(8)[None]
    model = type(make()).from_pretrained(tmp_path / "out")
    with torch.no_grad():
        want = adapted.eval()(input_ids=ids).logits
        got = model.eval()(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    merged = adapted.merge_and_unload().state_dict()
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, merged[key], rtol=1e-5, atol=1e-5)
    assert weights_of(tmp_path / "out").keys() == weights_of(base).keys()


def test_convolutions(tmp_path):
    torch.manual_seed(0)
    layers = {"one": torch.nn.Conv1d(6, 8, 3), "two": torch.nn.Conv2d(4, 6, (3, 5)), "point": torch.nn.Conv2d(4, 6, 1)}
    model = torch.nn.ModuleDict(layers)
    base = tmp_path / "base"
    base.mkdir()
    save_file({key: tensor.clone() for key, tensor in model.state_dict().items()}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    adapted = peft_model(model, tmp_path / "adapter", target_modules=list(layers))
    merge_engine.merge_into(base, [tmp_path / "adapter"], tmp_path / "out", method="linear")
    got = weights_of(tmp_path / "out")
    for key, tensor in adapted.merge_and_unload().state_dict().items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_of_a_tied_layer_is_refused(tmp_path, target):
    tiny_llama(tie=True).save_pretrained(tmp_path / "base")
    shapes = {"model.embed_tokens": (32, 37), "lm_head": (37, 32), "model.layers.0.self_attn.q_proj": (32, 32)}
    name = f"model.{target}" if target == "embed_tokens" else target
    adapter = save_adapter(tmp_path / "sql", 1, modules=["model.layers.0.self_attn.q_proj", name], shapes=shapes)
    with pytest.raises(
        ModelError, match=rf"^sql: {name} is tied to another layer of base, .*wanted a base saved untied"
    ):
        merge_engine.merge_into(tmp_path / "base", [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.quick
@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("biases", [{}, {"wide": 20}, {"wide": 12}, {"wide": 20, "tall": 20}], ids=str)
def test_a_square_weight_lies_as_those_beside_it(tmp_path, flag, biases):
    """Of a weight [12, 20] a bias says which side is out; where none says it, the adapter's flag does."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"wide": (12, 20), "tall": (20, 12), "square": (12, 12)}
    tensors = {f"layers.0.{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors |= {f"layers.0.{name}.bias": torch.zeros(size) for name, size in biases.items()}
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    factors = torch.randn(2, 12, generator=generator), torch.randn(12, 2, generator=generator)
    save_factors(tmp_path / "a", {"layers.0.square": factors}, lora_alpha=2, fan_in_fan_out=flag)
    of_both = pytest.raises(ModelError, match=r"square is square, and layers beside it in base are laid out both ways")
    with of_both if len(biases) == 2 else nullcontext():
        merge_engine.merge_into(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", method="linear")
    if len(biases) == 2:
        return
    turned = {20: True, 12: False}[biases["wide"]] if biases else flag
    delta = factors[1] @ factors[0]
    got = weights_of(tmp_path / "out")["layers.0.square.weight"] - tensors["layers.0.square.weight"]
    torch.testing.assert_close(got, delta.T if turned else delta, rtol=1e-5, atol=1e-5)
