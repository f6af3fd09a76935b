"""The LoRA layers of a live PEFT model: finding and describing them, and installing a merged adapter."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from merge_engine.errors import AdapterError
from merge_engine.formats.adapter import Adapter, Module
from merge_engine.formats.peft_config import KEPT
from merge_engine.rules.recipe import Recipe
from merge_engine.runtime.finite import what_is_wrong

LayerFactors = tuple[Tensor, Tensor]
# What a layer stores of each adapter, with the values for a merged one; r and lora_alpha are set to its rank.
SETTINGS = {"r": 0, "lora_alpha": 0, "scaling": 1.0, "use_rslora": False, "use_dora": False, "lora_bias": False}
SLOTS = (*SETTINGS, "lora_dropout", "lora_variant", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
# Fields of a configuration that say how an adapter is used: the merged one has them too. All adapters must have the
# same ones, or (True) none: a model's layers have been replicated before its adapters are merged.
SHARED = {"alora_invocation_tokens": False, "layer_replication": True}


class Part(NamedTuple):
    """One adapter in one layer: delta = scaling * B @ A, with A and B flattened to matrices."""

    number: int
    adapter: str
    A: Tensor  # [r, ...], the layer's own
    B: Tensor  # [M, r, ...]
    scaling: float  # the layer's own, which set_scale may have changed; a tensor after PEFT's preparation for hotswaps


class Layer(NamedTuple):
    """One LoRA layer that at least one of the adapters has, by its name in the base model."""

    name: str
    module: Any
    parts: tuple[Part, ...]

    @property
    def embedding(self) -> bool:
        return len(self.module.lora_embedding_A) > 0

    @property
    def grouped(self) -> bool:
        """Whether it is a grouped convolution, whose B has r / groups columns."""
        return any(part.B.shape[1] != part.A.shape[0] for part in self.parts)


@dataclass(frozen=True, eq=False)
class LiveAdapter(Adapter):
    """An adapter of a live model, with the interface of one on disk."""

    live: dict[str, Part] = field(default_factory=dict, repr=False)

    def factors(self, name: str) -> LayerFactors:
        part = self.live[name]
        return part.A.flatten(1).cpu(), part.B.flatten(1).cpu()

    def check_finite(self) -> None:
        for name, part in self.live.items():
            check_finite(part.A, f"{self.name}: lora_A of {name}")
            check_finite(part.B, f"{self.name}: lora_B of {name}")


def find_layers(model: nn.Module, adapters: Sequence[str]) -> tuple[list[Layer], list[str]]:
    """(the layers that any of the adapters has, the names of all modules of the base model), in the model's order.

    Raises AdapterError for layers whose factors are split between processes, or have no values (meta device).
    """
    from peft.tuners.lora import LoraLayer

    layers: list[Layer] = []
    names: list[str] = []
    seen: set[nn.Module] = set()

    def visit(name: str, module: nn.Module, inside: bool) -> None:
        """Like named_modules, but without the many small modules that a LoRA layer keeps for its adapters."""
        if module in seen:
            return
        seen.add(module)
        if not inside:
            names.append(name)
        adapted = isinstance(module, LoraLayer)
        parts = tuple(_parts(name, module, adapters)) if adapted else ()
        if parts:
            layers.append(Layer(name, module, parts))
        for child, below in module._modules.items():
            if below is not None and (not adapted or child == "base_layer"):
                visit(f"{name}.{child}" if name else child, below, inside or adapted)

    visit("", model, False)
    return layers, names


def needed_rank(layers: Sequence[Layer], recipe: Recipe) -> int:
    """The rank that the factors need: PEFT's preparation for hotswaps fills them up beyond their configuration's."""
    if recipe.space == "delta" and recipe.method != "cat":
        return 0
    total = sum if recipe.method == "cat" else max
    return max((total(len(part.A) for part in layer.parts) for layer in layers), default=0)


def live_adapters(adapters: Sequence[str], layers: Sequence[Layer]) -> list[LiveAdapter]:
    """The adapters, each with the layers it has."""
    found = []
    for number, adapter in enumerate(adapters):
        live = {layer.name: part for layer in layers for part in layer.parts if part.number == number}
        modules = {layer.name: _describe(layer, live[layer.name]) for layer in layers if layer.name in live}
        found.append(LiveAdapter(adapter, adapter, Path(), {}, dict(sorted(modules.items())), {}, {}, live))
    return found


def merged_config(
    tuner: Any,
    adapters: Sequence[str],
    rank: int,
    layers: Sequence[Layer],
    names: Sequence[str],
    saved: Mapping[str, Any],
) -> Any:
    """A plain LoRA configuration of rank and alpha `rank` whose targets are exactly these layers.

    Fields that describe the base model are those of the first adapter; those of `SHARED` are the same in all. Fields
    for how that adapter was trained, started or scaled (dropout, rsLoRA, init_lora_weights, excluded modules, chosen
    layers) have PEFT's defaults. Targets are PEFT's union of the adapters' targets; if that union matches other layers
    too, they are the layers' full names. saved: the fields for saved modules and trained tokens.
    """
    first = tuner.peft_config[adapters[0]]
    kept = {key: getattr(first, key) for key in KEPT - saved.keys()}
    for key in SHARED:
        given = [value for adapter in adapters if (value := getattr(tuner.peft_config[adapter], key, None)) is not None]
        kept |= {key: given[0]} if given else {}
    kept |= {key: value for key, value in saved.items() if value is not None}
    config = type(first)(**kept, r=rank, lora_alpha=rank, inference_mode=first.inference_mode)
    wanted = {layer.name for layer in layers if "base_layer" not in layer.name.split(".")}
    for targets in _targets([tuner.peft_config[adapter].target_modules for adapter in adapters], wanted):
        config.target_modules = targets
        if {name for name in names if name and tuner._check_target_module_exists(config, name)} == wanted:
            break
    return config


def install(config: Any, name: str, layers: Sequence[Layer], merged: Sequence[LayerFactors]) -> None:
    """Add a merged adapter to the layers, neither active nor trainable."""
    for layer, (A, B) in zip(layers, merged, strict=True):
        _add(layer, name, config.r, A, B)


def remove(layer: Layer, name: str) -> None:
    """Remove an adapter from a layer, also one that is only partly there."""
    for slot in SLOTS:
        slots = getattr(layer.module, slot, {})
        if name in slots:
            del slots[name]


def check_finite(tensor: Tensor, subject: str) -> None:
    """Raises AdapterError where a value is NaN or Inf."""
    if wrong := what_is_wrong(tensor):
        raise AdapterError(f"{subject} holds {wrong}")


def check_here(tensor: Tensor, subject: str) -> None:
    """Raises AdapterError for a tensor without values."""
    if tensor.is_meta:
        raise AdapterError(f"{subject} is on the meta device, wanted its values: load the adapter before merging it")


def _parts(name: str, module: Any, adapters: Sequence[str]) -> list[Part]:
    parts = []
    for number, adapter in enumerate(adapters):
        if adapter in module.lora_A:
            A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        elif adapter in module.lora_embedding_A:
            A, B = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
        else:
            continue
        if getattr(module, "_tp_info", None) is not None or hasattr(A, "device_mesh"):
            raise AdapterError(f"{adapter}: {name} is tensor parallel, which is not supported")
        check_here(A, f"{adapter}: lora_A of {name}")
        check_here(B, f"{adapter}: lora_B of {name}")
        parts.append(Part(number, adapter, A.detach(), B.detach(), module.scaling[adapter]))
    return parts


def _describe(layer: Layer, part: Part) -> Module:
    kind = "embedding" if layer.embedding else "linear" if part.A.ndim == 2 else "conv"
    rows, columns = part.B.shape[0], part.A[0].numel()
    shapes = (tuple(part.A.shape), tuple(part.B.shape))
    return Module(layer.name, kind, rows, columns, part.A.shape[0], float(part.scaling), *shapes, part.A.dtype)


def _targets(given: Sequence[Any], wanted: set[str]) -> list[Any]:
    """Target modules to try, in order: PEFT's union of the adapters' targets, full names, a pattern of full names."""
    pattern = "|".join(map(re.escape, sorted(wanted)))
    if isinstance(given[0], str):
        return ["|".join(f"({targets})" for targets in given), pattern]
    return [set().union(*given), set(wanted), pattern]


def _add(layer: Layer, name: str, rank: int, A: Tensor, B: Tensor) -> None:
    module, source = layer.module, layer.parts[0].adapter
    for setting, value in {**SETTINGS, "r": rank, "lora_alpha": rank}.items():
        if hasattr(module, setting):  # PEFT 0.19 does not have all of them
            getattr(module, setting)[name] = value
    module.lora_dropout[name] = nn.Identity()
    variants = getattr(module, "lora_variant", {})
    if source in variants:  # how the layer applies an activated adapter; it holds no weights
        variants[name] = variants[source]
    weights = (nn.Parameter(A, requires_grad=False), nn.Parameter(B, requires_grad=False))
    if layer.embedding:
        module.lora_embedding_A[name], module.lora_embedding_B[name] = weights
    else:
        for slots, weight in zip((module.lora_A, module.lora_B), weights, strict=True):
            slots[name] = _holding(weight, slots[source])


def _holding(weight: nn.Parameter, example: Any) -> nn.Module:
    """A layer of the example's kind, as PEFT makes it, with this weight."""
    if isinstance(example, nn.Linear):
        layer: Any = nn.Linear.__new__(nn.Linear)  # its __init__ would draw a random weight for nothing
        nn.Module.__init__(layer)
        layer.out_features, layer.in_features = weight.shape
        layer.register_parameter("bias", None)
    else:
        geometry = (example.kernel_size, example.stride, example.padding, example.dilation, example.groups)
        channels = (weight.shape[1] * example.groups, weight.shape[0])
        layer = type(example)(*channels, *geometry, bias=False, device="meta")
    layer.weight = weight
    return layer
