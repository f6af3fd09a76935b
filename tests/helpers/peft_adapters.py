"""Adapters of a tiny Llama, made and saved by PEFT, and what a merge of them holds."""

import json

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = [0.9, -0.4, 1.3]
TARGETS = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 37, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2))


def save_adapter(folder, seed, **config):
    """An adapter of the tiny Llama with random factors, made and saved by PEFT."""
    from peft import LoraConfig, get_peft_model

    config = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False, **config}
    model = get_peft_model(tiny_llama(), LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    for active in model.peft_config.values():
        active.base_model_name_or_path = "tiny"
    model.save_pretrained(folder, save_embedding_layers=False)  # "auto" looks for the base model on the hub
    return folder


def in_peft(folders):
    """A PEFT model with all of them loaded, by number."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(tiny_llama(), folders[0], adapter_name="0")
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=str(number))
    return model


def lora_layers(model):
    prefix = "base_model.model."
    return {n.removeprefix(prefix): m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}


def peft_deltas(model, adapter):
    return {
        name: layer.get_delta_weight(adapter).detach()
        for name, layer in lora_layers(model).items()
        if adapter in layer.scaling
    }


def deltas_of(merged):
    return {name: result.B @ result.A for name, result in merged.modules.items()}


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def rewrite(folder, target, change, **config):
    """A copy of an adapter with every (A, B) changed."""
    target.mkdir()
    tensors = load_file(folder / "adapter_model.safetensors")
    for key in [key for key in tensors if "lora_A" in key]:
        pair = change(tensors[key], tensors[key.replace("lora_A", "lora_B")])
        tensors[key], tensors[key.replace("lora_A", "lora_B")] = (t.contiguous() for t in pair)
    save_file(tensors, target / "adapter_model.safetensors")
    values = json.loads((folder / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**values, **config}))
    return target
