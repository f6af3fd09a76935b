"""PEFT's add_weighted_adapter and the drop-in, on two layers or on the linear layers of a TinyLlama.

Three adapters of rank 16, float32; the time to add the new adapter counts. To measure them:

    python -m bench.report --only factors,recompress --markdown
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.agreement import Disagreement
from bench.inputs import LAYERS, SCALING, TINY_LLAMA, adapted, hollow
from merge_engine.cpu.merge import merge_deltas
from merge_engine.cpu.select import trims
from merge_engine.cpu.source import Product
from merge_engine.peft_backend.drop_in import add_weighted_adapter
from merge_engine.rules.rule import make_rule

NAMES, WEIGHTS, DENSITY = ["sql", "chat", "ads"], [2.0, 1.0, 1.0], 0.2


def layers_of(shapes: Sequence[tuple[int, int]], device: str = "cpu") -> Any:
    """A model of linear layers of these shapes, with three adapters."""
    layers = {f"layer{i}": hollow(*shape, device) for i, shape in enumerate(shapes)}
    return adapted(nn.ModuleDict(layers), list(layers), NAMES)


def tiny_llama(layers: int = LAYERS, device: str = "cpu") -> Any:
    """The blocks of a TinyLlama, linear layers inside modules as Llama has them, with three adapters."""

    def block() -> nn.Module:
        parts: dict[str, nn.Module] = {part: nn.ModuleDict() for part in ("self_attn", "mlp")}
        for name, shape in TINY_LLAMA.items():
            part, layer = name.split(".")
            parts[part].add_module(layer, hollow(*shape, device))
        norms = {"input_layernorm": nn.RMSNorm(2048), "post_attention_layernorm": nn.RMSNorm(2048)}
        return nn.ModuleDict({**parts, **norms})

    model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(block() for _ in range(layers))})})
    return adapted(model, [name.split(".")[1] for name in TINY_LLAMA], NAMES)


def stock(model: Any, **call: Any) -> None:
    torch.manual_seed(1)
    model.base_model.add_weighted_adapter(NAMES, WEIGHTS, "PEFT", density=DENSITY, **call)


def drop_in(model: Any, **call: Any) -> None:
    add_weighted_adapter(model, NAMES, WEIGHTS, "drop-in", density=DENSITY, **call)


RIVALS: dict[str, Callable[..., None]] = {"PEFT": stock, "drop-in": drop_in}  # each adds an adapter of its own name


def weights_of(model: Any, adapter: str) -> list[Tensor]:
    """A and B of every layer, as they are."""
    layers = [layer for _, layer in model.named_modules() if hasattr(layer, "get_delta_weight")]
    return [slots[adapter].weight.data for layer in layers for slots in (layer.lora_A, layer.lora_B)]


def forget(model: Any, adapter: str) -> None:
    if adapter in model.peft_config:
        model.delete_adapter(adapter)


def compare(model: Any, combination: str, results: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
    """Raise Disagreement unless factors have equal bits, but for a few ties, and svd types are as good a cut.

    Returns, for svd types without chance, by how much each |D - B A| of all layers exceeds PEFT's, whose dense SVD is
    the best cut of the merged delta D.
    """
    ours, theirs = results["drop-in"], results["PEFT"]
    if not combination.endswith("svd"):
        for mine, other in zip(ours, theirs, strict=True):
            if int((mine != other).sum()) > 8:
                raise Disagreement(f"{combination}: a factor {list(mine.shape)} differs in more than a few ties")
        return {}
    products = {
        name: [B.double() @ A.double() for A, B in zip(t[::2], t[1::2], strict=True)] for name, t in results.items()
    }
    for mine, other in zip(products["drop-in"], products["PEFT"], strict=True):
        # Cuts of one rank of one matrix, both near the best: they differ by little, and keep as much of it.
        if not ((mine - other).norm() <= 0.02 * other.norm() and mine.norm() >= other.norm() * (1 - 1e-4)):
            raise Disagreement(f"{combination}: a product {list(mine.shape)} differs, or keeps less")
    if combination.startswith("dare"):
        return {}
    deltas = merged_deltas(model, combination)
    errors = {
        name: math.fsum(float((delta - mine).square().sum()) for delta, mine in zip(deltas, of, strict=True)) ** 0.5
        for name, of in products.items()
    }
    return {name: error / errors["PEFT"] - 1 for name, error in errors.items()}


def merged_deltas(model: Any, combination: str) -> list[Tensor]:
    """What a svd type without chance cuts: the merged delta [M, N] of every layer."""
    method = {"svd": "linear"}.get(combination, combination.removesuffix("_svd"))
    rule, merged = make_rule(method), []
    for layer in (layer for _, layer in model.named_modules() if hasattr(layer, "get_delta_weight")):
        pairs = [(layer.lora_A[name].weight.data.cpu(), layer.lora_B[name].weight.data.cpu()) for name in NAMES]
        sources = [Product(A, B, SCALING) for A, B in pairs]
        kept = rule.kept(DENSITY, sources[0].rows * sources[0].columns)
        trimmed = rule.keep == "magnitude"
        keeps = [trims([source], kept, rule.trim_ties)[0] if trimmed else None for source in sources]
        merged.append(merge_deltas(sources, WEIGHTS, keeps, rule).to(layer.lora_A[NAMES[0]].weight.device))
    return merged
