"""PEFT's own random numbers for DARE: torch's global stream, drawn in PEFT's order.

PEFT creates the new adapter's layers first, whose initialisation also draws. Then it draws masks layer by layer: for
factors, those of all A in the order of the adapters, then those of all B; for deltas, one for each adapter, in the
dtype and memory order of the delta.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from merge_engine.cpu.source import Product, Source
from merge_engine.cpu.tile_grid import Tile
from merge_engine.engine.cpu_backend import TorchBackend
from merge_engine.engine.plan import Factors, ModulePlan, Plan
from merge_engine.formats.peft_config import CHANGES_BASE
from merge_engine.peft_backend.factors import SIDES, Mask
from merge_engine.peft_backend.layers import Layer, remove


@contextmanager
def torch_stream(seed: int | None) -> Iterator[None]:
    """torch's global stream, as it is; with a seed as after torch.manual_seed(seed), and restored afterwards."""
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def draw_injection(tuner: Any, name: str, adapter: str, rank: int, layers: Sequence[Layer]) -> None:
    """Draw what PEFT draws when it adds an adapter like `adapter` to these layers, which are left as they were.

    Initialisations that change base weights (pissa_niter_16 and the like) are not drawn.
    """
    start = tuner.peft_config[adapter].init_lora_weights
    changes = isinstance(start, str) and start.lower().startswith(CHANGES_BASE)
    config = replace(tuner.peft_config[adapter], r=rank, lora_alpha=rank, init_lora_weights=False if changes else start)
    trainable = [(p, p.requires_grad) for layer in layers for p in layer.module.parameters()]
    try:
        for layer in layers:
            if "base_layer" not in layer.name.split("."):  # a nested layer comes with the layer around it
                layer.module.update_layer(name, rank, lora_alpha=rank, config=config, target_name=layer.name)
    finally:
        for layer in layers:
            remove(layer, name)
        for parameter, was in trainable:
            parameter.requires_grad_(was)


def draw_factor_masks(layers: Sequence[Layer], density: float) -> Mask:
    """All masks of all factors; they take a byte for each element of every adapter."""
    drawn = {}
    for layer in layers:
        for side in SIDES:
            for place, part in enumerate(layer.parts):
                drawn[layer.name, place, side] = _bernoulli(part.A if side == "A" else part.B, density)
    return lambda layer, place, side: drawn[layer.name, place, side]


class TorchStreamBackend(TorchBackend):
    """Merges dropped deltas, with masks from torch's stream, one layer at a time, in the order of the plan's modules.

    Memory beside that of `TorchBackend`: a byte for each element and adapter of the layers that are being merged, and,
    while a mask is drawn, the adapter's whole delta twice.
    """

    def __init__(self, layers: Sequence[Layer], density: float) -> None:
        self.layers, self.density = {layer.name: layer for layer in layers}, density

    def prepared(self, plan: Plan) -> Plan:
        """The plan with its modules in the model's order and densities of 1, since `pack` drops the elements."""
        modules = {module.name: replace(module, densities=(1.0,) * len(module.densities)) for module in plan.modules}
        return replace(plan, modules=tuple(modules[name] for name in self.layers))

    def pack(self, plan: Plan, group: Sequence[ModulePlan], factors: Sequence[Factors], side: str) -> list[Source]:
        ((module,), (pairs,)) = group, factors
        layer = self.layers[module.name]
        return [
            _Dropped(Product(A, B, part.scaling), _delta_mask(layer, part.adapter, self.density), self.density)
            for (A, B), part in zip(pairs, layer.parts, strict=True)
        ]


class _Dropped:
    """product * mask / density, tile by tile: a `cpu.source.Source`."""

    def __init__(self, product: Product, mask: Tensor, density: float) -> None:
        self.product, self.mask, self.density = product, mask, density
        self.rows, self.columns = product.rows, product.columns

    def fill(self, tile: Tile, out: Tensor) -> None:
        self.product.fill(tile, out)
        out.mul_(self.mask[tile.top : tile.bottom, tile.left : tile.right]).div_(self.density)


def _delta_mask(layer: Layer, adapter: str, density: float) -> Tensor:
    """The mask [M, N] in the layout of `B @ A`, whichever layout PEFT's delta of the layer has."""
    module = layer.module
    if not hasattr(module, "get_delta_weight"):  # a quantised layer: PEFT makes no delta, so any order will do
        rows, columns = module.lora_B[adapter].weight.shape[0], module.lora_A[adapter].weight.shape[1]
        return torch.bernoulli(torch.full((rows, columns), density)).bool()
    mask = _bernoulli(module.get_delta_weight(adapter), density).flatten(1).cpu()
    return mask.T if layer.embedding or getattr(module, "fan_in_fan_out", False) else mask


def _bernoulli(like: Tensor, density: float) -> Tensor:
    """The mask that PEFT draws for a tensor."""
    if like.dtype == torch.float32 and like.device.type == "cpu":
        return torch.rand(like.shape) < density  # the same numbers as below, in half the time
    return torch.bernoulli(torch.full_like(like, density)).bool()
