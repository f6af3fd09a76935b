"""lora_bias: the bias of PEFT's ``lora_B``, which a layer adds times its scaling: ``y += s (B A x + b)``.

The bias ``s b [M]`` is a task tensor of its own, a matrix ``[1, M]`` of one row, and so are vectors of full models. In
the sum of the deltas it is exact: ``sum_i w_i s_i b_i``. A method that trims or elects does so among its M elements.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from merge_engine.errors import AdapterError
from merge_engine.files.weights import DerivedTensor, StoredTensor
from merge_engine.formats.adapter import Adapter, Factor, Module

BIAS = "bias"  # the kind of such modules


class BiasRow(DerivedTensor):
    """A [1, M]: a vector as a matrix of one row."""

    def read(self) -> Tensor:
        """A new tensor of the stored dtype. Raises as `StoredTensor.read` does."""
        return self.stored.read()[None]


class One(BiasRow):
    """B [1, 1] = 1, of the bias's dtype."""

    @property
    def nbytes(self) -> int:
        return 0

    def read(self) -> Tensor:
        return torch.ones(1, 1, dtype=self.stored.dtype)


def describe_bias(adapter: str, layer: Module, stored: StoredTensor) -> tuple[Module, tuple[Factor, Factor]]:
    """The bias of a layer as a module of rank 1, named as the layer's own bias is, and its factors.

    Raises AdapterError where it does not fit the layer, or PEFT adds none to such a layer.
    """
    if layer.kind not in ("linear", "conv") or layer.expert is not None:
        raise AdapterError(f"{adapter}: {stored.key}: PEFT adds no lora_bias to {layer.kind} layers")
    if stored.shape != (layer.rows,) or not stored.dtype.is_floating_point:
        raise AdapterError(f"{adapter}: {stored.key} is {list(stored.shape)}, wanted [{layer.rows}]")
    shapes = (1, layer.rows), (1, 1)
    module = Module(f"{layer.name}.{BIAS}", BIAS, 1, layer.rows, 1, layer.scaling, *shapes, stored.dtype)
    return module, (BiasRow(stored), One(stored))


def layer_of(bias: str) -> str:
    """The layer whose bias a module is."""
    return bias.removesuffix(f".{BIAS}")


def check_biases(adapters: Sequence[Adapter]) -> None:
    """Raise AdapterError where one adapter has lora_bias, and one adapts what PEFT gives none: it loads no mixture."""
    having = next((each for each in adapters for module in each.modules.values() if module.kind == BIAS), None)
    if having is None:
        return
    for adapter in adapters:
        for module in adapter.modules.values():
            if module.kind == "embedding" or module.expert is not None:
                raise AdapterError(
                    f"{having.name} has lora_bias, and {adapter.name} adapts {module.target}; PEFT loads no adapter "
                    "with lora_bias and embeddings or parameters of experts"
                )


def without_bias(modules: Iterable[Module]) -> list[Module]:
    """The layers that have no bias, where others have one: PEFT has a bias in all layers of an adapter, or in none."""
    own = {module.name: module for module in modules}
    biased = {layer_of(name) for name, module in own.items() if module.kind == BIAS}
    return [module for name, module in own.items() if biased and module.kind != BIAS and name not in biased]
