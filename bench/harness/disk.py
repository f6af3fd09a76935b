"""Adapters and base models on disk, made once and removed when the process ends."""

import json
import os
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.harness.inputs import MODELS, RANK, SCALING, Shapes, factors
from merge_engine.files.safetensors_writer import SafetensorsWriter

VOCABULARY, HEAD = 32000, 64  # tokens; columns of one attention head


@lru_cache
def _folder(parent: str | None) -> tempfile.TemporaryDirectory[str]:
    """Removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="merge_engine_bench_", dir=parent)


def scratch_folder(in_memory: bool = False) -> Path:
    """A temporary folder of this process.

    in_memory: in /dev/shm, if this machine has it, so that the disk does not limit how fast several processes write.
    """
    return Path(_folder("/dev/shm" if in_memory and os.access("/dev/shm", os.W_OK) else None).name)


def adapters_on_disk(count: int, layers: int, model: str) -> list[Path]:
    """The folders of so many adapters of a model with so many layers."""
    folders = [scratch_folder() / f"{model}-{layers}-{number}" for number in range(count)]
    for seed, folder in enumerate(folders):
        if not folder.exists():
            make_adapter(folder, seed, layers, MODELS[model])
    return folders


def image_loras_on_disk(count: int, layers: int, model: str, rank: int) -> list[Path]:
    """So many LoRAs of an image model, as kohya's scripts write them: bfloat16, alpha = rank / 2."""
    files = [scratch_folder() / f"{model}-{layers}-{rank}-{number}.safetensors" for number in range(count)]
    for seed, file in enumerate(files):
        if not file.exists():
            make_image_lora(file, seed, image_modules(layers, MODELS[model]), rank)
    return files


def image_modules(layers: int, shapes: Shapes) -> dict[str, tuple[int, int]]:
    """The modules of an image model with so many layers, by kohya's names."""
    made = {}
    for layer in range(layers):
        numbers = (layer, 2 * layer, 2 * layer + 1)
        made |= {f"lora_unet_{name.format(*numbers)}": shape for name, shape in shapes.items()}
    return made


def make_image_lora(file: Path, seed: int, modules: Shapes, rank: int) -> None:
    """One file, written module by module."""
    generator = torch.Generator().manual_seed(seed)
    ends = (".lora_down.weight", ".lora_up.weight", ".alpha")
    header = {"ss_base_model_version": "flux1", "ss_network_dim": str(rank), "ss_network_alpha": str(rank / 2)}
    with SafetensorsWriter(file, [name + end for name in modules for end in ends], header) as writer:
        for name, (rows, columns) in modules.items():
            A, B = factors(rows, columns, rank, generator)
            tensors = (A.bfloat16(), B.bfloat16(), torch.tensor(rank / 2))
            for end, tensor in zip(ends, tensors, strict=True):
                writer.add(name + end, tensor)


@lru_cache
def base_and_adapters(layers: int, model: str, in_memory: bool = False) -> tuple[Path, list[Path]]:
    """(base model, three adapters) in a folder of their own; outputs go beside them."""
    folder, shapes = scratch_folder(in_memory) / f"into-{model}-{layers}", MODELS[model]
    base, adapters = folder / "base", [folder / name for name in "abc"]
    make_base(base, layers, shapes)
    for seed, adapter in enumerate(adapters, 1):
        make_adapter(adapter, seed, layers, shapes, base)
    return base, adapters


def make_adapter(folder: Path, seed: int, layers: int, shapes: Shapes, base: Path | None = None) -> None:
    """An adapter folder as PEFT writes it: rank 16, float32, every linear layer of a Llama with so many layers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in shapes.items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            A, B = factors(rows, columns, RANK, generator)
            tensors |= {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": int(SCALING * RANK)}
    config |= {"target_modules": sorted({name.split(".")[1] for name in shapes})}
    config |= {"base_model_name_or_path": None if base is None else str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def make_base(folder: Path, layers: int, shapes: Shapes, seed: int = 0) -> None:
    """A Llama folder without a tokenizer: bfloat16, untied embeddings, one safetensors file."""
    generator = torch.Generator().manual_seed(seed)
    keys, hidden = shapes["self_attn.k_proj"]

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    tensors = {"model.embed_tokens.weight": normal(VOCABULARY, hidden), "lm_head.weight": normal(VOCABULARY, hidden)}
    for layer in range(layers):
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = normal(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    config |= {"hidden_size": hidden, "intermediate_size": shapes["mlp.gate_proj"][0], "num_hidden_layers": layers}
    config |= {"num_attention_heads": hidden // HEAD, "num_key_value_heads": keys // HEAD, "vocab_size": VOCABULARY}
    config |= {"tie_word_embeddings": False, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
