"""Full models of whole eighths, as files: a base, and models tuned from it."""

import json

import torch
from safetensors.torch import load_file, save_file

SHAPES = {
    "model.embed_tokens.weight": (17, 12),
    "model.layers.0.q_proj.weight": (12, 12),
    "model.layers.0.q_proj.bias": (12,),
    "model.layers.1.conv.weight": (6, 4, 3),
    "model.norm.weight": (12,),
    "model.scale": (),
    "lm_head.weight": (17, 12),
}
CONFIG = {"model_type": "toy", "vocab_size": 17, "tie_word_embeddings": False}


def save_model(folder, seed, dtype=torch.bfloat16, like=None, spread=1.0, tensors=None, save=save_file, **config):
    """A model of whole eighths, so that differences, and their sums, are exact."""
    generator = torch.Generator().manual_seed(seed)
    if tensors is None:
        drawn = {k: torch.randint(-40, 41, shape, generator=generator) / 8 for k, shape in SHAPES.items()}
        tensors = {key: ((like[key].float() if like else 0) + spread * t).to(dtype) for key, t in drawn.items()}
        tensors["model.positions"] = torch.arange(6)
    folder.mkdir(parents=True)
    save(tensors, folder / ("model.safetensors" if save is save_file else "pytorch_model.bin"))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def save_three(base):
    """chat, code and math beside the base, tuned from it."""
    like = load_file(base / "model.safetensors")
    return [save_model(base.parent / name, seed, like=like) for seed, name in enumerate(["chat", "code", "math"], 1)]


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def change(folder, **changes):
    tensors = weights_of(folder)
    for key, value in changes.items():
        key = key.replace("__", ".")
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    save_file(tensors, folder / "model.safetensors")
    return folder
