"""Adapters of MLX as files, written and read without the package and without MLX."""

import json

import torch
from safetensors.torch import load_file, save_file

Q, DOWN, EMBEDDING = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.embed_tokens"
SWITCH = "model.layers.1.mlp.switch_mlp.gate_proj"
LAYERS = {Q: (12, 16), DOWN: (9, 20), EMBEDDING: (8, 30), SWITCH: (3, 6, 10)}  # (M, N), or (E, M, N) of experts


def save_mlx(folder, rank, scale, *, seed=0, layers=None, dtype=torch.float32, keys=("self_attn.q_proj",), **config):
    """A folder of random factors; {module: delta [M, N], float64}, of experts one each."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (*experts, rows, columns) in (layers or LAYERS).items():
        a, b = ((*experts, rank, columns), (*experts, rows, rank)) if experts else ((columns, rank), (rank, rows))
        tensors[f"{name}.lora_a"] = torch.randn(*a, generator=generator).to(dtype)
        tensors[f"{name}.lora_b"] = torch.randn(*b, generator=generator).to(dtype)
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0} | ({} if keys is None else {"keys": list(keys)})
    config = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": parameters, "model": "org/base", **config}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return read_mlx(folder)


def read_mlx(folder):
    """{module: delta, float64} of a folder, as mlx-lm's layers multiply it out."""
    scale = json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    tensors = {key: tensor.double() for key, tensor in load_file(folder / "adapters.safetensors").items()}
    deltas = {}
    for key, a in tensors.items():
        if not key.endswith(".lora_a"):
            continue
        name, b = key.removesuffix(".lora_a"), tensors[key[:-1] + "b"]
        if a.ndim == 3:
            deltas |= {f"{name}.{number}": scale * b[number] @ a[number] for number in range(len(a))}
        else:
            deltas[name] = scale * b.T @ a.T
    return deltas
