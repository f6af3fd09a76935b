"""PEFT LoRA adapters, opened without reading their weights.

``delta = scaling * B @ A`` with ``A [r, N]``, ``B [M, r]`` for every kind of layer: Linear as stored, Embedding with
``A [r, num]``, ``B [dim, r]``, convolutions flattened to ``A [r, in * kernel]``, ``B [out, r]``. ``fan_in_fan_out``
says only how a delta is laid over the base weight, so it stays in the configuration.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from merge_engine.errors import AdapterError
from merge_engine.lora_config import CONFIG_FILE, REFUSED, rank_and_scaling, read_config
from merge_engine.source import find
from merge_engine.tensors import StoredTensor, open_bin, open_safetensors, open_sharded

WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."

# What is fetched from the hub beside the weights: config.json, if there is one, tells a full model from an adapter
# without downloading it, and the tokenizer's files tell which tokens were added.
_FILES = (CONFIG_FILE, "config.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json")

# Embeddings that PEFT saves whole when the vocabulary was resized, by their usual names.
_EMBEDDINGS = frozenset(
    {"embed_tokens", "lm_head", "wte", "shared", "embed_in", "embed_out", "word_embeddings", "tok_embeddings"}
    | {"token_embedding", "tokens_embed", "word_embedding", "proj_out", "decoder", "embeddings"}
)
_TOKENS = ".token_adapter.trainable_tokens_delta"
_TRAINING_STATE = (".lora_velora_embed",)  # used by the backward pass only

_SIDES = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_embedding_A": "A", ".lora_embedding_B": "B"}
_FLOATS = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
)


@dataclass(frozen=True)
class Module:
    """One LoRA pair, described without being read."""

    name: str  # in the base model: "model.layers.0.self_attn.q_proj"
    kind: str  # "linear", "embedding" or "conv"
    rows: int  # M of the delta s * B[M, r] @ A[r, N]
    columns: int  # N; for a convolution, input channels * kernel volume
    rank: int
    scaling: float  # alpha / r, or alpha / sqrt(r) with rsLoRA, after the patterns
    a_shape: tuple[int, ...]  # as stored
    b_shape: tuple[int, ...]
    dtype: torch.dtype  # as stored


@dataclass(frozen=True, eq=False)
class Adapter:
    """One LoRA adapter on disk. Nothing but headers has been read; reading is safe from several threads."""

    name: str  # the last part of its folder or hub id
    source: str  # as it was asked for
    path: Path
    config: dict[str, Any]
    modules: dict[str, Module]  # sorted by name
    extras: dict[str, StoredTensor]  # by key: modules_to_save, trained tokens, saved embeddings
    _pairs: dict[str, tuple[StoredTensor, StoredTensor]] = field(repr=False)

    @property
    def base_model(self) -> str | None:
        return self.config.get("base_model_name_or_path")

    @property
    def size_bytes(self) -> int:
        """Bytes of all its tensors."""
        factors = sum(a.nbytes + b.nbytes for a, b in self._pairs.values())
        return factors + sum(extra.nbytes for extra in self.extras.values())

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """``A [r, N]`` and ``B [M, r]`` of one module, read now, contiguous, in the stored dtype.

        Raises:
            AdapterError: a file is gone or became shorter since it was opened.
        """
        a, b = self._pairs[name]
        return a.read().flatten(1), b.read().flatten(1)

    def check_finite(self) -> None:
        """Read every tensor once.

        Raises:
            AdapterError: one holds NaN or Inf, the message names adapter, tensor and file; or a delta, which is at most
                ``|scaling| r max|A| max|B|``, may leave float32.
        """
        for stored in self.extras.values():
            self._largest(stored)
        for name, (a, b) in self._pairs.items():
            module = self.modules[name]
            bound = abs(module.scaling) * module.rank * self._largest(a) * self._largest(b)
            if bound > torch.finfo(torch.float32).max:
                raise AdapterError(f"{self.name}: the delta of {name} reaches up to {bound:.1e}, wanted one of float32")

    def _largest(self, stored: StoredTensor) -> float:
        """max|x|; raises AdapterError where it is not finite."""
        values = stored.read()
        if values.dtype.itemsize == 1:
            values = values.float()  # torch has no aminmax of 8-bit floats
        if not values.numel() or not (values.is_floating_point() or values.is_complex()):
            return 0.0
        least, most = map(float, torch.aminmax(torch.view_as_real(values) if values.is_complex() else values))
        if not (math.isfinite(least) and math.isfinite(most)):
            what = "NaN" if torch.isnan(values).any() else "Inf"
            raise AdapterError(f"{self.name}: tensor {stored.key} in {stored.file} holds {what}")
        return max(-least, most)


def open_adapter(source: str | Path, *, revision: str | None = None) -> Adapter:
    """Open a PEFT LoRA adapter from a local folder or from the hub, reading headers only.

    Args:
        source: a folder, or a hub id ``user/repo``; a folder of that name wins.
        revision: branch, tag or commit on the hub.

    Raises:
        AdapterError: it is missing or damaged, is no LoRA, or is a variant whose effect is not ``s * B @ A``.
    """
    name, path = find(source, revision, CONFIG_FILE, _FILES, ("adapter_model*",), AdapterError)
    config = read_config(path, name)
    factors, extras = _sort_tensors(_open_weights(path, name), config, name)
    resolve = rank_and_scaling(config, name)
    modules = {module: _describe(name, module, factors[module], *resolve(module)) for module in sorted(factors)}
    pairs = {module: (factors[module]["A"], factors[module]["B"]) for module in modules}
    if not modules:
        raise AdapterError(f"{name}: {path} holds no LoRA tensors, wanted keys {KEY_PREFIX}<module>.lora_A.weight")
    return Adapter(name, str(source), path, config, modules, extras, pairs)


def open_adapters(sources: Iterable[str | Path | Adapter]) -> list[Adapter]:
    """Each source as `open_adapter` opens it, in their order; one that is open already as it is.

    Raises:
        AdapterError: as `open_adapter` does, for the first that cannot be opened.
    """
    if isinstance(sources, str | Path):
        raise AdapterError(f"adapters: wanted a list of folders or hub ids, got {str(sources)!r}")
    return [source if isinstance(source, Adapter) else open_adapter(source) for source in sources]


def shared_extras(adapters: Sequence[Adapter]) -> dict[str, StoredTensor]:
    """The tensors beside the factors, if all adapters have the same; they can be copied, but not merged.

    A frozen base weight that PEFT saves beside an adapter of an embedding (``base_layer``) may be missing from some
    adapters: it is the same as in the base model they share.

    Raises:
        AdapterError: two adapters differ in a tensor, or only some have it; the message names both and the tensor.
    """
    union = {key: (adapter, extra) for adapter in reversed(adapters) for key, extra in adapter.extras.items()}
    for key, (owner, extra) in sorted(union.items()):
        for other in adapters:
            twin = other.extras.get(key)
            if twin is None:
                if not _is_base_copy(key):
                    raise AdapterError(
                        f"{owner.name} has {key} but {other.name} has not; such tensors cannot be merged"
                    )
            elif (twin.shape, twin.dtype) != (extra.shape, extra.dtype):
                raise AdapterError(
                    f"{key} differs: {owner.name} has {list(extra.shape)} {_short(extra.dtype)}, "
                    f"{other.name} has {list(twin.shape)} {_short(twin.dtype)}; such tensors cannot be merged"
                )
            elif twin is not extra and not _same_bytes(twin.read(), extra.read()):
                raise AdapterError(
                    f"{key} differs between {owner.name} and {other.name}; such tensors cannot be merged"
                )
    if any(key.endswith(_TOKENS) for key in union):
        for other in adapters[1:]:
            if other.config.get("trainable_token_indices") != adapters[0].config.get("trainable_token_indices"):
                raise AdapterError(f"trainable_token_indices differ between {adapters[0].name} and {other.name}")
    return {key: extra for key, (_, extra) in sorted(union.items())}


def _open_weights(path: Path, name: str) -> dict[str, StoredTensor]:
    index = f"{WEIGHTS_FILE}.index.json"
    if (path / WEIGHTS_FILE).is_file():
        return open_safetensors(path / WEIGHTS_FILE, name)
    if (path / index).is_file():
        return open_sharded(path / index, name)
    if (path / "adapter_model.bin").is_file():
        return open_bin(path / "adapter_model.bin", name)
    raise AdapterError(f"{name}: {path} has no weights, wanted {WEIGHTS_FILE}, {index} or adapter_model.bin")


def _sort_tensors(
    tensors: dict[str, StoredTensor], config: dict[str, Any], name: str
) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, StoredTensor]]:
    """Split into factors, by module and side, and extras, by key."""
    factors: dict[str, dict[str, StoredTensor]] = {}
    extras = {}
    for key, tensor in tensors.items():
        if "lora_magnitude_vector" in key:
            raise AdapterError(f"{name}: tensor {key} is DoRA's; {REFUSED['use_dora']}")
        if key.endswith(".lora_B.bias"):
            raise AdapterError(f"{name}: tensor {key} is a lora_bias; {REFUSED['lora_bias']}")
        ending = next((ending for ending in _SIDES if key.endswith(ending)), None)
        if ending and key.startswith(KEY_PREFIX):
            side = _SIDES[ending]
            module = key[len(KEY_PREFIX) : -len(ending)]
            if "base_layer" in module.split("."):
                raise AdapterError(
                    f"{name}: tensor {key} belongs to a nested layer "
                    "(torch.nn.MultiheadAttention or target_parameters), which is not supported"
                )
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
    if config.get("ensure_weight_tying") and not all(map(_is_base_copy, extras)):
        raise AdapterError(f"{name}: ensure_weight_tying with saved layers ({min(extras)}) is not supported")
    return factors, extras


def _is_extra(key: str, config: dict[str, Any]) -> bool:
    if not key.startswith(KEY_PREFIX) or ".lora_" in key:
        return False
    if _is_base_copy(key) or key.endswith(_TOKENS):
        return True
    parts = key[len(KEY_PREFIX) :].split(".")
    if any(saves(str(target), key) for target in config.get("modules_to_save") or ()):
        return True
    return len(parts) > 1 and parts[-2] in _EMBEDDINGS and parts[-1] in ("weight", "bias")


def saves(target: str, key: str) -> bool:
    """Whether an entry of ``modules_to_save`` names the layer that ``key`` is in; PEFT compares the ends of names."""
    parts = key[len(KEY_PREFIX) :].split(".")
    return any(".".join(parts[:end]).endswith(target) for end in range(1, len(parts)))


def _is_base_copy(key: str) -> bool:
    return key.endswith((".base_layer.weight", ".base_layer.bias"))


def _describe(adapter: str, name: str, sides: dict[str, StoredTensor], rank: int, scaling: float) -> Module:
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
        if tensor.dtype not in _FLOATS:
            raise AdapterError(f"{where} {_short(tensor.dtype)}, wanted floating point")
    if a.dtype != b.dtype:
        raise AdapterError(f"{adapter}: {name} has A in {_short(a.dtype)} and B in {_short(b.dtype)}, wanted one dtype")
    if a.shape[0] != rank:
        raise AdapterError(f"{adapter}: lora_A of {name} is {list(a.shape)}, wanted rank {rank} from {CONFIG_FILE}")
    if kind == "conv" and b.shape[1] < rank and rank % b.shape[1] == 0:
        raise AdapterError(
            f"{adapter}: lora_B of {name} is {list(b.shape)} at rank {rank}: "
            f"a convolution in {rank // b.shape[1]} groups, which cannot be merged"
        )
    if b.shape[1] != rank or any(size != 1 for size in b.shape[2:]):
        raise AdapterError(f"{adapter}: lora_B of {name} is {list(b.shape)}, wanted rank {rank} from {CONFIG_FILE}")
    return Module(name, kind, b.shape[0], math.prod(a.shape[1:]), rank, scaling, a.shape, b.shape, a.dtype)


def _same_bytes(one: torch.Tensor, two: torch.Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
