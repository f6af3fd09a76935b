"""Opens adapters of every supported file format."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from merge_engine.errors import AdapterError
from merge_engine.files.locate import find, find_file, only_file
from merge_engine.files.weights import StoredTensor
from merge_engine.formats.adapter import KEY_PREFIX, Adapter, Factor, Module
from merge_engine.formats.biases import describe_bias
from merge_engine.formats.dora import magnitudes_of
from merge_engine.formats.experts import LastTensor, describe_experts, pair_of, split_experts
from merge_engine.formats.licence import CARD
from merge_engine.formats.mlx import ADAPTERS_FILE, is_mlx, open_mlx
from merge_engine.formats.peft_config import ADAPTER_CONFIG, rank_and_scaling, read_config
from merge_engine.formats.peft_tensors import WEIGHTS_FILE, describe, open_weights, sort_tensors
from merge_engine.formats.single_file import open_file
from merge_engine.rules.guesses import listed

# Fetched from the hub beside the weights: a config.json shows that it is a full model, before that is downloaded, the
# tokenizer's files say which tokens were added, and the card says the licence.
_FILES = (ADAPTER_CONFIG, "config.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json", CARD)

_DESCRIBED = (WEIGHTS_FILE, ADAPTERS_FILE)  # weights that mean nothing without the configuration beside them


def open_adapter(source: str | Path, *, revision: str | None = None) -> Adapter:
    """Open a LoRA adapter from a local folder or file, or from the hub, reading headers only.

    Args:
        source: a folder as PEFT or MLX writes it, or a hub id ``user/repo``; a folder of that name wins. Or one
            .safetensors file of an image or video model: its path, its folder, or ``user/repo:file.safetensors``.
        revision: branch, tag or commit on the hub.

    Raises:
        AdapterError: it is missing or damaged, is no LoRA, or is a variant whose effect is not ``s * B @ A``.
    """
    file = _single_file(source, revision)
    if file is not None:
        return open_file(file, str(source), file.stem if file.suffix == Path(source).suffix else Path(source).name)
    name, path = find(source, revision, ADAPTER_CONFIG, _FILES, ("adapter_model*", ADAPTERS_FILE), AdapterError)
    if is_mlx(path):
        return open_mlx(path, str(source), name)
    if not os.path.isdir(os.path.expanduser(source)) and not any((path / file).exists() for file in _FILES[:2]):
        raise AdapterError(
            f"{source} has no {ADAPTER_CONFIG}; a LoRA in one file is given as {source}:file.safetensors"
        )
    config = read_config(path, name)
    found, extras = sort_tensors(open_weights(path, name), config, name)
    modules, pairs = _modules(name, found, config)
    magnitudes = magnitudes_of(name, found, modules, config)
    if not modules:
        raise AdapterError(f"{name}: {path} holds no LoRA tensors, wanted keys {KEY_PREFIX}<module>.lora_A.weight")
    return Adapter(name, str(source), path, config, modules, extras, pairs, magnitudes=magnitudes)


def _modules(
    name: str, found: dict[str, dict[str, StoredTensor]], config: dict[str, Any]
) -> tuple[dict[str, Module], dict[str, tuple[Factor, Factor]]]:
    """The modules of the adapter `name` by their names, and A and B of each; found: see `sort_tensors`."""
    resolve = rank_and_scaling(config, name)
    factors, parameters = split_experts(name, found, config, lambda module: resolve(module)[0])
    modules = {module: describe(name, module, factors[module], *resolve(module)) for module in factors}
    pairs: dict[str, tuple[Factor, Factor]] = {
        module: (factors[module]["A"], factors[module]["B"]) for module in modules
    }
    for layer, sides in factors.items():
        if "bias" in sides:
            bias, pair = describe_bias(name, modules[layer], sides["bias"])
            modules[bias.name], pairs[bias.name] = bias, pair
    last = LastTensor()
    for (layer, parameter), sides in parameters.items():
        experts = describe_experts(name, layer, parameter, sides, *resolve(f"{layer}.{parameter}"))
        modules |= experts
        pairs |= {expert: pair_of(module, sides, last) for expert, module in experts.items()}
    return {module: modules[module] for module in sorted(modules)}, pairs


def _single_file(source: str | Path, revision: str | None) -> Path | None:
    """The file that is the whole adapter; None where a folder with a configuration is asked for."""
    file = find_file(source, revision, AdapterError)
    if file is not None or not isinstance(source, str | Path):
        return file if file is None or file.name not in _DESCRIBED else None
    folder = Path(os.path.expanduser(source))
    described = any(os.path.exists(folder / name) for name in (ADAPTER_CONFIG, "config.json", *_DESCRIBED))
    return None if described or not os.path.isdir(folder) else only_file(folder, AdapterError)


def open_adapters(sources: Iterable[str | Path | Adapter]) -> list[Adapter]:
    """Open every source as `open_adapter` does, in order; adapters that are open already stay as they are.

    Raises:
        AdapterError: as `open_adapter` does, for the first source that cannot be opened.
    """
    order, weights = listed(sources)
    if weights is not None:
        raise AdapterError("adapters: wanted a list of folders or hub ids, got a mapping; weights have no meaning here")
    return [source if isinstance(source, Adapter) else open_adapter(source) for source in order]
