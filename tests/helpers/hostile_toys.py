"""Small inputs that hostile cases are made from, and what a merge of them must be, computed without the product."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from lora_files import STEM, save_factors
from safetensors.torch import load_file, save_file
from toy_vocabularies import numbered, write_tokenizer

MODULES = {"model.layers.0.q_proj": (6, 8), "model.layers.1.q_proj": (6, 8), "model.layers.1.up_proj": (10, 6)}
SLOW = ("(.*)*(.*)*(.*)*z", "(a|a|.)*" * 30 + "z", "(.{0,1000}){0,1000}z")  # for re; they match no toy's module
WORDS = ("<unk>", "to", "be", "or", "not")
INFO = ("info", "a")
MERGE = ("merge", "a", "b", "-o", "out", "--method", "linear")
INTO = ("merge", "--into", "base", "a", "b", "-o", "out", "--method", "linear", "--backend", "torch")
UNION = ("merge", "--into", "base", "model", "-o", "out", "--vocab", "union", "--backend", "torch")
MODELS = ("merge-models", "base", "model", "-o", "out", "--method", "linear", "--vocab", "union")
RECIPE = ("merge", "recipe.yaml", "-o", "out")


def save_toys(folder: Path) -> None:
    """Adapters a and b, a base, and a model tuned from it with one more token."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-8, 9, shape, generator=generator) / 8

    for name in ("a", "b"):
        save_factors(folder / name, {key: (draw(2, n), draw(m, 2)) for key, (m, n) in MODULES.items()})
    weights = {f"{key}.weight": draw(*shape) for key, shape in MODULES.items()}
    for name, rows in (("base", 5), ("model", 6)):
        tensors = {**weights, "model.embed_tokens.weight": draw(rows, 6), "lm_head.weight": draw(rows, 6)}
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        config = {"vocab_size": rows, "tie_word_embeddings": False, "torch_dtype": "float32"}
        write_json(folder / name / "config.json", config)
        write_tokenizer(folder / name, numbered(*WORDS[:rows], *(["<new>"] if rows > 5 else [])))
        write_json(folder / name / "tokenizer_config.json", {"chat_template": "x"})
        write_json(folder / name / "special_tokens_map.json", {})


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value))


def change_json(file: Path, **fields: Any) -> None:
    write_json(file, {**json.loads(file.read_text()), **fields})


def split_header(file: Path) -> tuple[bytes, bytes]:
    """(the header, the data) of a .safetensors file."""
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    return whole[8 : 8 + length], whole[8 + length :]


def join_header(file: Path, header: bytes, data: bytes) -> None:
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)


def save_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)


def as_bin(folder: Path, **more: Any) -> None:
    """An adapter with its weights in a .bin file, and more entries in it."""
    file = folder / "adapter_model.safetensors"
    tensors: dict[str, Any] = load_file(file)
    file.unlink()
    torch.save({**tensors, **{STEM + key: value for key, value in more.items()}}, folder / "adapter_model.bin")


def as_shards(folder: Path, stem: str) -> None:
    """The weights of a folder in two files with an index."""
    file = folder / f"{stem}.safetensors"
    tensors = load_file(file)
    file.unlink()
    halves = sorted(tensors)[::2], sorted(tensors)[1::2]
    names = [f"{stem}-{number}-of-2.safetensors" for number in (1, 2)]
    for name, keys in zip(names, halves, strict=True):
        save_file({key: tensors[key] for key in keys}, folder / name)
    places = {key: name for name, keys in zip(names, halves, strict=True) for key in keys}
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": places})


def deltas_of(folder: Path) -> dict[str, torch.Tensor]:
    """{module: s B A} of an adapter in float64, by safetensors' own reader and PEFT's rules for scalings."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8-sig"))
    if (folder / "adapter_model.bin").exists():
        tensors = torch.load(folder / "adapter_model.bin", weights_only=True)
    else:
        tensors = {}
        for file in folder.glob("*.safetensors"):
            tensors |= load_file(file)
    found = {}
    for key, A in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix(STEM).removesuffix(".lora_A.weight")
            rank = _by_pattern(config.get("rank_pattern"), name, config.get("r", 8))
            alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
            scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
            B = tensors[key.replace(".lora_A.", ".lora_B.")]
            found[name] = scaling * (B.double().flatten(1) @ A.double().flatten(1))
    return found


def _by_pattern(patterns: dict[str, float] | None, name: str, default: float) -> float:
    for pattern, value in (patterns or {}).items():
        if pattern not in SLOW and re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def check_sum(folder: Path) -> None:
    """AssertionError unless out is a + b."""
    (want_a, want_b), got = (deltas_of(folder / name) for name in "ab"), deltas_of(folder / "out")
    assert got.keys() == want_a.keys() | want_b.keys(), f"modules {sorted(got)}"
    for name, delta in got.items():
        parts = [want[name] for want in (want_a, want_b) if name in want]
        bound = sum(part.norm() for part in parts) * 1e-2 + 1e-30  # bfloat16 and float8 are legal dtypes
        error = (delta - sum(parts)).norm()
        assert error <= bound, f"{name} differs by {error:.3g} of {bound:.3g}"


def copy_toys(toys: Path, folder: Path) -> None:
    shutil.copytree(toys, folder, copy_function=shutil.copyfile)
