"""Adapters as files in PEFT's format, written without PEFT."""

import json

import torch
from safetensors.torch import save_file

STEM = "base_model.model."


def save_factors(folder, factors, extras=None, **config):
    """The folder with an adapter of {module: (A [r, N], B [M, r])}; those named embed_tokens are embeddings.

    extras: {key: tensor} of what is saved beside the factors. config: fields of adapter_config.json.
    """
    tensors = dict(extras or {})
    for name, pair in factors.items():
        for side, tensor in zip("AB", pair, strict=True):
            ending = f"lora_embedding_{side}" if name.endswith("embed_tokens") else f"lora_{side}.weight"
            tensors[f"{STEM}{name}.{ending}"] = tensor.clone(memory_format=torch.contiguous_format)
    rank = len(next(iter(factors.values()))[0])
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": "base", **config}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder
