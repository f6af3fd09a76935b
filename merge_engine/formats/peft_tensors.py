"""The tensors of a PEFT LoRA adapter: its factors by module, and what is saved beside them. None is read.

``delta = scaling * B @ A`` with ``A [r, N]``, ``B [M, r]`` for every kind of layer: Linear as stored, Embedding with
``A [r, num]``, ``B [dim, r]``, convolutions flattened to ``A [r, in * kernel]``, ``B [out, r]``. ``fan_in_fan_out``
says only how a delta is laid over the base weight, so it stays in the configuration.
"""

import math
from pathlib import Path
from typing import Any

import torch

from merge_engine.errors import AdapterError
from merge_engine.files.weights import StoredTensor, open_bin, open_safetensors, open_sharded
from merge_engine.formats.adapter import KEY_PREFIX, TOKENS, Module, is_base_copy, saves, short_name
from merge_engine.formats.peft_config import ADAPTER_CONFIG

WEIGHTS_FILE = "adapter_model.safetensors"
# Embeddings that PEFT saves whole when the vocabulary was resized, by their usual names.
EMBEDDINGS = frozenset(
    {"embed_tokens", "lm_head", "wte", "shared", "embed_in", "embed_out", "word_embeddings", "tok_embeddings"}
    | {"token_embedding", "tokens_embed", "word_embedding", "proj_out", "decoder", "embeddings"}
)
_TRAINING_STATE = (".lora_velora_embed",)  # used by the backward pass only
_SIDES = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_embedding_A": "A", ".lora_embedding_B": "B"}
_SIDES |= {".lora_B.bias": "bias", ".lora_magnitude_vector": "magnitude"}
FLOATS = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
)


def open_weights(path: Path, name: str) -> dict[str, StoredTensor]:
    """The tensors in the folder ``path`` of the adapter ``name``; AdapterError where there are none."""
    index = f"{WEIGHTS_FILE}.index.json"
    if (path / WEIGHTS_FILE).is_file():
        return open_safetensors(path / WEIGHTS_FILE, name)
    if (path / index).is_file():
        return open_sharded(path / index, name)
    if (path / "adapter_model.bin").is_file():
        return open_bin(path / "adapter_model.bin", name)
    raise AdapterError(f"{name}: {path} has no weights, wanted {WEIGHTS_FILE}, {index} or adapter_model.bin")


def sort_tensors(
    tensors: dict[str, StoredTensor], config: dict[str, Any], name: str
) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, StoredTensor]]:
    """(factors by their keys' stem and side "A" or "B", extras by key); AdapterError where a tensor is neither."""
    factors: dict[str, dict[str, StoredTensor]] = {}
    extras = {}
    for key, tensor in tensors.items():
        ending = next((ending for ending in _SIDES if key.endswith(ending)), None)
        if ending and key.startswith(KEY_PREFIX):
            side = _SIDES[ending]
            module = key[len(KEY_PREFIX) : -len(ending)]
            if not module:
                raise AdapterError(f"{name}: tensor {key} names no module, wanted {KEY_PREFIX}<module>{ending}")
            sides = factors.setdefault(module, {})
            if side in sides:
                raise AdapterError(f"{name}: {module} has two {side} factors, of a linear layer and of an embedding")
            sides[side] = tensor
        elif _is_extra(key, config):
            extras[key] = tensor
        elif not key.endswith(_TRAINING_STATE):
            raise AdapterError(
                f"{name}: tensor {key} is unknown, wanted {KEY_PREFIX}<module>.lora_A.weight and the like, "
                "or a layer named in modules_to_save"
            )
    if config.get("ensure_weight_tying") and not all(map(is_base_copy, extras)):
        raise AdapterError(f"{name}: ensure_weight_tying with saved layers ({min(extras)}) is not supported")
    return factors, extras


def _is_extra(key: str, config: dict[str, Any]) -> bool:
    if not key.startswith(KEY_PREFIX) or ".lora_" in key:
        return False
    if is_base_copy(key) or key.endswith(TOKENS):
        return True
    parts = key[len(KEY_PREFIX) :].split(".")
    if any(saves(str(target), key) for target in config.get("modules_to_save") or ()):
        return True
    return len(parts) > 1 and parts[-2] in EMBEDDINGS and parts[-1] in ("weight", "bias")


def describe(adapter: str, name: str, sides: dict[str, StoredTensor], rank: int, scaling: float) -> Module:
    """The module ``name`` of two factors, by side; AdapterError where they do not fit each other or the rank."""
    for side, other in (("A", "B"), ("B", "A")):
        if side not in sides:
            raise AdapterError(f"{adapter}: {sides[other].key} has no lora_{side} beside it")
    a, b = sides["A"], sides["B"]
    embedding = "lora_embedding" in a.key.rsplit(".", 1)[-1]
    if embedding != ("lora_embedding" in b.key.rsplit(".", 1)[-1]):
        raise AdapterError(f"{adapter}: {name} has factors of a linear layer and of an embedding")
    kind = "embedding" if embedding else "linear" if len(a.shape) == 2 else "conv"
    for side, tensor in (("A", a), ("B", b)):
        where = f"{adapter}: lora_{side} of {name} is {list(tensor.shape)}"
        if not 2 <= len(tensor.shape) <= 5 or len(tensor.shape) != len(a.shape) or 0 in tensor.shape:
            raise AdapterError(f"{where}, wanted a factor of a linear, embedding or convolution layer")
        if tensor.dtype not in FLOATS:
            raise AdapterError(f"{where} {short_name(tensor.dtype)}, wanted floating point")
    if a.dtype != b.dtype:
        raise AdapterError(
            f"{adapter}: {name} has A in {short_name(a.dtype)} and B in {short_name(b.dtype)}, wanted one dtype"
        )
    if a.shape[0] != rank:
        raise AdapterError(f"{adapter}: lora_A of {name} is {list(a.shape)}, wanted rank {rank} from {ADAPTER_CONFIG}")
    if kind == "conv" and b.shape[1] < rank and rank % b.shape[1] == 0:
        raise AdapterError(
            f"{adapter}: lora_B of {name} is {list(b.shape)} at rank {rank}: "
            f"a convolution in {rank // b.shape[1]} groups, which cannot be merged"
        )
    if b.shape[1] != rank or any(size != 1 for size in b.shape[2:]):
        raise AdapterError(f"{adapter}: lora_B of {name} is {list(b.shape)}, wanted rank {rank} from {ADAPTER_CONFIG}")
    return Module(name, kind, b.shape[0], math.prod(a.shape[1:]), rank, scaling, a.shape, b.shape, a.dtype)
