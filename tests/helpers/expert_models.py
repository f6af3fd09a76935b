"""Tiny mixtures of experts, with LoRA on their fused parameters as PEFT makes and saves it, and what a merge holds."""

import warnings

import torch

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = 3
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def tiny(family, width=12, dtype=torch.float32):
    """A model with 3 experts of a width in each of 2 layers: "mixtral", "qwen3_moe" or "gpt_oss"."""
    import transformers as hf

    torch.manual_seed(0)
    moe = {"num_experts_per_tok": 2}
    if family == "mixtral":
        config = hf.MixtralConfig(**SIZES, **moe, intermediate_size=width, num_local_experts=EXPERTS)
        return hf.MixtralForCausalLM(config).to(dtype)
    moe |= {"head_dim": 4}
    if family == "qwen3_moe":
        own = {"intermediate_size": 24, "moe_intermediate_size": width, "num_experts": EXPERTS}
        return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**SIZES, **moe, **own)).to(dtype)
    config = hf.GptOssConfig(**SIZES, **moe, intermediate_size=width, num_local_experts=EXPERTS)
    return hf.GptOssForCausalLM(config).to(dtype)


def save_experts(folder, seed, family="gpt_oss", width=12, base="tiny", steps=0, **config):
    """An adapter of a tiny model with random factors, saved by PEFT; steps: how long it is trained before."""
    from peft import LoraConfig, get_peft_model

    given = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": FUSED, **config}
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        _forgive_peft()
        model = get_peft_model(tiny(family, width), LoraConfig(init_lora_weights=steps > 0, **given))
    if steps:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(steps):
            tokens = torch.randint(SIZES["vocab_size"], (2, 8))
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for active in model.peft_config.values():
        active.base_model_name_or_path = str(base)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def _forgive_peft():
    """PEFT tells how it converts experts, and says of patterns for parameters that they match no module."""
    warnings.simplefilter("ignore", UserWarning)
    warnings.simplefilter("ignore", RuntimeWarning)


def in_peft(folder, family="gpt_oss", width=12):
    """The model with an adapter loaded by PEFT."""
    from peft import PeftModel

    with warnings.catch_warnings():
        _forgive_peft()
        return PeftModel.from_pretrained(tiny(family, width), folder)


def expert_deltas(model):
    """{(layer, parameter): its delta [E, ., .], as the model stores the parameter}, and of plain layers [., .]."""
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            found[name, getattr(layer, "parameter_name", None)] = layer.get_delta_weight("default").detach()
    return found
