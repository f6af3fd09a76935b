"""Adapters of random factors with a module or two, as files."""

import torch
from lora_files import save_factors
from safetensors.torch import load_file


def save_plain(folder, seed, rank=4, rows=24, columns=40, modules=("layers.0.q_proj", "layers.1.q_proj"), **config):
    generator = torch.Generator().manual_seed(seed)
    shapes = (rank, columns), (rows, rank)
    factors = {name: [torch.randn(shape, generator=generator) for shape in shapes] for name in modules}
    return save_factors(folder, factors, **config)


def save_three(folder):
    return [save_plain(folder / name, seed) for seed, name in enumerate(["sql", "chat", "ads"])]


def factors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_same(one, other):
    one, other = factors_of(one), factors_of(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
