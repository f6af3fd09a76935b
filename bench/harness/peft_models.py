"""PEFT models with random adapters, whose base weights take no memory."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness.inputs import RANK, SCALING, TINY_LLAMA, Pair

NAMES = ("sql", "chat", "ads")  # of the adapters of a model


def hollow(rows: int, columns: int, device: str = "cpu") -> nn.Linear:
    """A linear layer whose weight takes no memory: a merge of adapters looks at its shape only."""
    layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.zeros(1, device=device).expand(rows, columns), requires_grad=False)
    return layer


def adapted(base: nn.Module, targets: list[str], names: Sequence[str], rank: int = RANK) -> Any:
    """The base as a PEFT model, with adapters of random factors."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = {"r": rank, "lora_alpha": int(SCALING * rank), "target_modules": targets, "init_lora_weights": False}
    model = get_peft_model(base, LoraConfig(**config), names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**config))
    return model


def peft_layer(pairs: Sequence[Pair], names: Sequence[str]) -> Any:
    """A LoRA layer of PEFT with these factors, one pair for each name."""
    (A, B), device = pairs[0], str(pairs[0][0].device)
    base = nn.ModuleDict({"layer": hollow(len(B), A.shape[1], device)})
    layer = adapted(base, ["layer"], names, len(A)).base_model.model["layer"]
    for name, (A, B) in zip(names, pairs, strict=True):
        layer.lora_A[name].weight, layer.lora_B[name].weight = (
            nn.Parameter(each, requires_grad=False) for each in (A, B)
        )
    return layer


@lru_cache(maxsize=2)
def layers_of(shapes: tuple[tuple[int, int], ...], device: str = "cpu") -> Any:
    """A model of linear layers of these shapes, with three adapters; the same model at every call."""
    layers = {f"layer{i}": hollow(*shape, device) for i, shape in enumerate(shapes)}
    return adapted(nn.ModuleDict(layers), list(layers), NAMES)


@lru_cache(maxsize=2)
def tiny_llama(layers: int, device: str = "cpu") -> Any:
    """The blocks of a TinyLlama, modules nested as in Llama, with three adapters; the same model at every call."""

    def block() -> nn.Module:
        parts: dict[str, nn.Module] = {part: nn.ModuleDict() for part in ("self_attn", "mlp")}
        for name, shape in TINY_LLAMA.items():
            part, layer = name.split(".")
            parts[part].add_module(layer, hollow(*shape, device))
        norms = {"input_layernorm": nn.RMSNorm(2048), "post_attention_layernorm": nn.RMSNorm(2048)}
        return nn.ModuleDict({**parts, **norms})

    model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(block() for _ in range(layers))})})
    return adapted(model, [name.split(".")[1] for name in TINY_LLAMA], NAMES)


def lora_layers(model: Any) -> list[Any]:
    """The LoRA layers of a PEFT model, in order."""
    return [layer for _, layer in model.named_modules() if hasattr(layer, "get_delta_weight")]


def factors_of(model: Any, adapter: str) -> list[Tensor]:
    """A and B of every layer, not copied: [A_1, B_1, A_2, B_2, ...]."""
    return [slots[adapter].weight.data for layer in lora_layers(model) for slots in (layer.lora_A, layer.lora_B)]
