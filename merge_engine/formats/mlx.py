"""LoRA adapters of MLX: ``adapters.safetensors`` and ``adapter_config.json``, as mlx-lm writes and loads them.

A linear layer has ``lora_a [N, r]`` and ``lora_b [r, M]``: ``delta [M, N] = scale * lora_b^T @ lora_a^T``. An embedding
has ``lora_a [num, r]`` and ``lora_b [r, dim]``; its delta [num, dim] is merged as its transpose, as PEFT has it.
Experts (SwitchLinear) have ``lora_a [E, r, N]`` and ``lora_b [E, M, r]``, ``delta_e = scale * lora_b[e] @ lora_a[e]``:
one module for each. The configuration has one scale and one rank for all.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_engine.errors import AdapterError, shown
from merge_engine.files.text import read_object
from merge_engine.files.weights import DerivedTensor, StoredTensor, open_safetensors
from merge_engine.formats.adapter import Adapter, Expert, Factor, Module, short_name
from merge_engine.formats.families import MLX
from merge_engine.formats.peft_config import ADAPTER_CONFIG
from merge_engine.formats.peft_tensors import FLOATS

ADAPTERS_FILE = "adapters.safetensors"
_SIDES = ("lora_a", "lora_b")
_FUSE = "mlx_lm.fuse merges it into its model"
Sides = dict[str, StoredTensor]  # by "lora_a" and "lora_b"


class Turned(DerivedTensor):
    """The transpose of a stored matrix."""

    def read(self) -> Tensor:
        """A new contiguous tensor of the stored dtype. Raises as `StoredTensor.read` does."""
        return self.stored.read().T.contiguous()


def is_mlx(folder: Path) -> bool:
    """Whether a folder is an adapter of MLX."""
    return (folder / ADAPTERS_FILE).is_file()


def open_mlx(path: Path, source: str, name: str) -> Adapter:
    """Open an adapter of MLX from its folder, reading headers only.

    Raises:
        AdapterError: it is missing or damaged, or is no LoRA.
    """
    config = _read_config(path, name)
    rank, scale = _rank_and_scale(config, name)
    modules: dict[str, Module] = {}
    pairs: dict[str, tuple[Factor, Factor]] = {}
    for stem, sides in sorted(_sorted(open_safetensors(path / ADAPTERS_FILE, name), name).items()):
        found = _describe(name, stem, sides, rank, scale)
        modules |= found
        for module, described in found.items():
            pairs[module] = _pair(sides, described)
    if not modules:
        raise AdapterError(f"{name}: {ADAPTERS_FILE} holds no LoRA tensors, wanted <module>.lora_a and <module>.lora_b")
    modules = {module: modules[module] for module in sorted(modules)}
    if not isinstance(config.get("model"), str | None):
        raise AdapterError(f"{name}: model is {shown(config['model'])} in {ADAPTER_CONFIG}, wanted a str")
    config = {**config, "base_model_name_or_path": config.get("model")}
    return Adapter(name, source, path, config, modules, {}, pairs, family=MLX)


def _read_config(path: Path, name: str) -> dict[str, Any]:
    config = read_object(path / ADAPTER_CONFIG, name, AdapterError)
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        kind = shown(kind, quoted=False)
        reason = {"dora": "DoRA rescales the base weight", "full": "it holds whole weights"}.get(kind, "it is unknown")
        raise AdapterError(f"{name}: fine_tune_type is {kind!r}, wanted lora: {reason}; {_FUSE}")
    return config


def _rank_and_scale(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise AdapterError(f"{name}: {ADAPTER_CONFIG} has no lora_parameters, wanted a table with rank and scale")
    rank, scale, keys = parameters.get("rank"), parameters.get("scale"), parameters.get("keys")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise AdapterError(f"{name}: rank of lora_parameters is {shown(rank)}, wanted a positive integer")
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not abs(scale) < 2.0**63:
        raise AdapterError(f"{name}: scale of lora_parameters is {shown(scale)}, wanted a number")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        raise AdapterError(f"{name}: keys of lora_parameters is {shown(keys)}, wanted a list of names")
    layers = config.get("num_layers", -1)
    if not isinstance(layers, int) or isinstance(layers, bool):
        raise AdapterError(f"{name}: num_layers is {shown(layers)}, wanted a whole number")
    return rank, float(scale)


def _sorted(tensors: Mapping[str, StoredTensor], name: str) -> dict[str, Sides]:
    """The factors by the stem of their keys; AdapterError for other tensors."""
    found: dict[str, Sides] = {}
    for key, tensor in tensors.items():
        stem, _, side = key.rpartition(".")
        if stem and side == "m":
            raise AdapterError(f"{name}: tensor {key} is DoRA's, which rescales the base weight; {_FUSE}")
        if not stem or side not in _SIDES:
            raise AdapterError(f"{name}: tensor {key} is unknown, wanted <module>.lora_a and <module>.lora_b")
        if tensor.dtype not in FLOATS:
            raise AdapterError(f"{name}: {key} is {short_name(tensor.dtype)}, wanted floating point")
        found.setdefault(stem, {})[side] = tensor
    for sides in found.values():
        for side, other in (_SIDES, _SIDES[::-1]):
            if side not in sides:
                raise AdapterError(f"{name}: {sides[other].key} has no {side} beside it")
    return found


def _describe(adapter: str, stem: str, sides: Sides, rank: int, scale: float) -> dict[str, Module]:
    """The modules of one pair: one, or one for each expert; AdapterError where the factors do not fit."""
    a, b = sides["lora_a"], sides["lora_b"]
    dtype = a.dtype if a.dtype == b.dtype else torch.float32
    shapes = (a.shape, b.shape)
    if 0 not in (*a.shape, *b.shape):
        if [len(shape) for shape in shapes] == [2, 2] and a.shape[1] == b.shape[0] == rank:
            rows, columns = b.shape[1], a.shape[0]
            return {stem: Module(stem, "linear", rows, columns, rank, scale, (rank, columns), (rows, rank), dtype)}
        if [len(shape) for shape in shapes] == [3, 3] and a.shape[:2] == (b.shape[0], rank) and b.shape[2] == rank:
            experts = [Expert(stem, "weight", number, a.shape[0]) for number in range(a.shape[0])]
            sizes = (b.shape[1], a.shape[2], rank, scale, a.shape[1:], b.shape[1:], dtype)
            names = [f"{stem}.{expert.number}" for expert in experts]
            return {name: Module(name, "linear", *sizes, one) for name, one in zip(names, experts, strict=True)}
    raise AdapterError(
        f"{adapter}: {stem} has lora_a {list(a.shape)} and lora_b {list(b.shape)}, wanted [N, {rank}] and [{rank}, M], "
        f"or [E, {rank}, N] and [E, M, {rank}] of experts, with rank {rank} from {ADAPTER_CONFIG}"
    )


def _pair(sides: Sides, module: Module) -> tuple[Factor, Factor]:
    if module.expert is None:
        return Turned(sides["lora_a"]), Turned(sides["lora_b"])
    a, b = (replace(one, shape=one.shape[1:]) for one in (sides[side].rows(module.expert.number, 1) for side in _SIDES))
    return a, b
