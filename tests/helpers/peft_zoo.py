"""Small PEFT models of every layer kind, and stock PEFT beside the drop-in on one model."""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from merge_engine.peft_backend.drop_in import add_weighted_adapter

STOCK = LoraModel.add_weighted_adapter
LAYERS = ("one", "two", "three")
KINDS: dict[str, Any] = {
    "linear": lambda: nn.Linear(7, 5),
    "wide": lambda: nn.Linear(19, 6, bias=False),
    "conv1d_transposed": lambda: Conv1D(6, 9),
    "embedding": lambda: nn.Embedding(11, 6),
    "conv1d": lambda: nn.Conv1d(5, 6, 3),
    "conv2d": lambda: nn.Conv2d(5, 6, (3, 2)),
    "conv2d_1x1": lambda: nn.Conv2d(5, 6, 1),
    "conv3d": lambda: nn.Conv3d(3, 5, (2, 1, 2)),
    "attention": lambda: nn.MultiheadAttention(8, 2),
}
HAS_STOCK_SVD = [kind for kind in KINDS if kind not in ("conv1d", "conv3d")]


@dataclass
class Spec:
    """What a test draws: adapters of one model, and a call."""

    kind: str = "linear"
    configs: tuple[dict[str, Any], ...] = ({}, {}, {})
    weights: tuple[float, ...] = (0.9, -0.4, 1.3)
    dtype: torch.dtype = torch.float32
    scales: tuple[float, ...] = ()  # live factors on each adapter's scaling
    call: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [f"adapter{i}" for i in range(len(self.configs))]


class Zoo(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        for name in LAYERS:
            setattr(self, name, KINDS[kind]())


def build(spec: Spec, seed: int = 0) -> Any:
    """The model, its adapters filled with values that are all of different magnitude within a tensor."""
    torch.manual_seed(seed)
    model: Any = None
    for name, config in zip(spec.names, spec.configs, strict=True):
        fan = {"fan_in_fan_out": spec.kind == "conv1d_transposed"}
        lora = LoraConfig(**{"r": 3, "lora_alpha": 4, "target_modules": list(LAYERS), **fan, **config})
        if model is None:
            model = get_peft_model(Zoo(spec.kind), lora, adapter_name=name)
        else:
            model.add_adapter(name, lora)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.data = distinct(parameter.shape, spec.dtype)
    for number, factor in enumerate(spec.scales):
        for layer in layers(model).values():
            if spec.names[number] in layer.scaling:
                layer.scaling[spec.names[number]] *= factor
    return model


def distinct(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Values of different magnitudes around 1, of random sign and order."""
    if dtype == torch.float32:
        return torch.randn(shape)
    start = torch.tensor(0.125, dtype=dtype).view(torch.int16)
    bits = start + torch.randperm(shape.numel()).to(torch.int16)
    sign = torch.randint(2, (shape.numel(),)) * 2 - 1
    return (bits.view(dtype) * sign).view(shape)


def layers(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def factors(model: Any, adapter: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found = {}
    for name, layer in layers(model).items():
        if adapter in layer.lora_A:
            found[name] = (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)
        elif adapter in layer.lora_embedding_A:
            found[name] = (layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter])
    return found


def product(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """B @ A in float64, convolutions flattened."""
    return B.double().flatten(1) @ A.double().flatten(1)


def both(spec: Spec, model: Any = None, *, seed: int = 3, **ours: Any) -> Any:
    """The model with stock's "theirs" and the drop-in's "ours"; DARE from the same torch stream."""
    model = build(spec) if model is None else model
    arguments = (spec.names, list(spec.weights))
    torch.manual_seed(seed)
    STOCK(model.base_model, *arguments, "theirs", **spec.call)
    # Stock PEFT takes the first adapter's rsLoRA along (fixed after 0.21.2): its factors are right, its scaling is not.
    for layer in layers(model).values():
        if "theirs" in layer.scaling:
            layer.scaling["theirs"] = 1.0
    extra = {"rng": "torch", "seed": seed, **ours}
    add_weighted_adapter(model, *arguments, "ours", **spec.call, **extra)
    return model


def assert_same_factors(model: Any) -> None:
    """Bit for bit, but for the zeros that fill smaller ranks up here, and for the dtype that PEFT stores cat in."""
    theirs, ours = factors(model, "theirs"), factors(model, "ours")
    assert theirs.keys() == ours.keys()
    for name in theirs:
        for dim, (their, our) in enumerate(zip(theirs[name], ours[name], strict=True)):
            rank = their.shape[dim]
            assert torch.equal(our.narrow(dim, 0, rank), their.to(our.dtype)), f"{name}: {'AB'[dim]}"
            assert not bool(our.narrow(dim, rank, our.shape[dim] - rank).any()), f"{name}: {'AB'[dim]} is not filled up"


def has_doubled_svd_scaling() -> bool:
    """PEFT before 0.21 multiplies the scaling into svd types twice."""
    source = inspect.getsource(LoraModel._svd_generalized_task_arithmetic_weighted_adapter)
    return "weight * target.scaling" in source
