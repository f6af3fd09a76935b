"""LoRA on parameters that hold the matrices of all experts (PEFT's ``target_parameters``): one module for each expert.

PEFT wraps a layer once for each of its parameters, in the order in which the layer registers them, so that the keys say
how deep a pair is nested, and not whose it is: ``experts.base_layer.lora_A.weight`` is the inner one. With E experts of
rank r, ``A [E r, N]`` has the rows of expert e from e r on, and ``B [M, r E]`` its columns e, e + E, e + 2 E, ...:
``delta_e = s * B[:, e::E] @ A[e r : (e + 1) r]``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from merge_engine.errors import AdapterError, some
from merge_engine.files.weights import DerivedTensor, StoredTensor
from merge_engine.formats.adapter import Expert, Factor, Module

Sides = dict[str, StoredTensor]  # by "A" and "B"
# The order in which transformers' layers register the parameters that are adapted together.
REGISTERED = ("gate_up_proj", "down_proj")
_NESTED = "base_layer"


def split_experts(
    adapter: str, factors: Mapping[str, Sides], config: Mapping[str, Any], rank_of: Callable[[str], int]
) -> tuple[dict[str, Sides], dict[tuple[str, str], Sides]]:
    """(pairs by module, pairs by (layer, parameter)), of pairs by the stems of their keys.

    rank_of: the rank that the configuration gives a module.

    Raises AdapterError where a pair is nested in another and target_parameters does not say whose they are.
    """
    layers: dict[str, dict[int, Sides]] = {}
    for stem, sides in factors.items():
        layer, depth = _unnested(stem)
        layers.setdefault(layer, {})[depth] = sides
    plain: dict[str, Sides] = {}
    parameters: dict[tuple[str, str], Sides] = {}
    for layer, pairs in layers.items():
        exact, names = _adapted_parameters(layer, config)
        if names and (exact or len(pairs) > 1 or _rows(pairs[min(pairs)]) != rank_of(layer)):
            parameters |= _by_parameter(adapter, layer, pairs, names)
        elif _NESTED in layer.split(".") or list(pairs) != [0]:
            key = next(iter(pairs[max(pairs)].values())).key
            raise AdapterError(
                f"{adapter}: tensor {key} belongs to a nested layer (torch.nn.MultiheadAttention, or a parameter that "
                "target_parameters does not name), which is not supported"
            )
        else:
            plain[layer] = pairs[0]
    return plain, parameters


def _unnested(stem: str) -> tuple[str, int]:
    """The layer's own name, and how deep in wrappers a pair is: ``experts.base_layer`` is ("experts", 1)."""
    layer, depth = stem, 0
    while layer.endswith(f".{_NESTED}"):
        layer, depth = layer.removesuffix(f".{_NESTED}"), depth + 1
    return layer, depth


def _rows(sides: Sides) -> int:
    return sides["A"].shape[0] if "A" in sides and sides["A"].shape else 0


def _adapted_parameters(layer: str, config: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Whether ``target_parameters`` names the layer, and the parameters that it may name there.

    PEFT compares ends of names after a dot. A name without a dot is that of a parameter of any layer.
    """
    exact, found = False, set()
    for target in config.get("target_parameters") or ():
        path, _, parameter = str(target).rpartition(".")
        if not path or layer == path or layer.endswith(f".{path}"):
            found.add(parameter)
            exact = exact or bool(path)
    return exact, sorted(found)


def _by_parameter(
    adapter: str, layer: str, pairs: Mapping[int, Sides], names: Sequence[str]
) -> dict[tuple[str, str], Sides]:
    """{(layer, parameter): its pair}, from a layer's pairs by depth; AdapterError where that is not known."""
    if sorted(pairs) != list(range(len(names))):
        raise AdapterError(
            f"{adapter}: {layer} has {some(len(pairs), 'pair')} of factors, wanted one for each of {', '.join(names)}, "
            "which target_parameters names"
        )
    inner_first = _inner_first(f"{adapter}: {layer}", names)
    return {(layer, name): pairs[depth] for depth, name in enumerate(reversed(inner_first))}


def _inner_first(what: str, names: Iterable[str]) -> list[str]:
    """Parameters of one layer as they are wrapped; AdapterError where the order is not known."""
    found = sorted(names)
    if len(found) > 1 and not set(found) <= set(REGISTERED):
        raise AdapterError(
            f"{what} has adapted parameters {', '.join(found)}; the order of several is only known for "
            f"{' and '.join(REGISTERED)}"
        )
    return sorted(found, key=REGISTERED.index) if len(found) > 1 else found


class LastTensor:
    """Keeps the tensor that was read last: the experts of one parameter are read one after the other."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._stored: StoredTensor | None = None
        self._tensor = torch.empty(0)

    def read(self, stored: StoredTensor) -> Tensor:
        """The tensor, which nobody may change. Raises as `StoredTensor.read` does."""
        with self._lock:
            if self._stored is not stored:
                self._tensor, self._stored = stored.read(), stored
            return self._tensor


@dataclass(frozen=True)
class ExpertColumns(DerivedTensor):
    """``B [M, r]`` of one expert: every E-th column of all experts' ``B [M, r E]``."""

    number: int
    count: int  # E
    last: LastTensor = field(repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes // self.count

    def read(self) -> Tensor:
        """A new contiguous tensor of the stored dtype. Raises as `StoredTensor.read` does."""
        return self.last.read(self.stored)[:, self.number :: self.count].contiguous()


def pair_of(module: Module, sides: Sides, last: LastTensor) -> tuple[Factor, Factor]:
    """A and B of one expert. last: of all experts of an adapter."""
    assert module.expert is not None
    number, count = module.expert.number, module.expert.count
    return sides["A"].rows(number * module.rank, module.rank), ExpertColumns(sides["B"], number, count, last)


def nested_stems(experts: Iterable[Expert]) -> dict[str, str]:
    """{parameter by its whole name: the stem of its keys}: as PEFT nests them."""
    layers: dict[str, set[str]] = {}
    for expert in experts:
        layers.setdefault(expert.layer, set()).add(expert.parameter)
    stems = {}
    for layer, names in layers.items():
        for depth, name in enumerate(reversed(_inner_first(layer, names))):
            stems[f"{layer}.{name}"] = layer + f".{_NESTED}" * depth
    return stems


def describe_experts(
    adapter: str, layer: str, parameter: str, sides: Sides, rank: int, scaling: float
) -> dict[str, Module]:
    """One module for each expert, by name: "model.layers.0.mlp.experts.gate_up_proj.3".

    Raises AdapterError where the two factors do not fit each other or the rank.
    """
    where = f"{adapter}: {parameter} of {layer}"
    for side in ("A", "B"):
        if side not in sides:
            raise AdapterError(f"{where} has no lora_{side}")
    a, b = sides["A"], sides["B"]
    count, rest = divmod(a.shape[0], rank) if len(a.shape) == 2 else (0, 0)
    if count < 1 or rest or len(b.shape) != 2 or b.shape[1] != a.shape[0] or 0 in (*a.shape, *b.shape):
        raise AdapterError(
            f"{where} has factors {list(a.shape)} and {list(b.shape)}, wanted [E r, N] and [M, r E] "
            f"with rank {rank} for each of E experts"
        )
    if a.dtype != b.dtype or not a.dtype.is_floating_point:
        raise AdapterError(f"{where} has A in {a.dtype} and B in {b.dtype}, wanted one floating-point dtype")
    made = {}
    for number in range(count):
        expert = Expert(layer, parameter, number, count)
        name = f"{expert.key}.{number}"
        shapes = (rank, a.shape[1]), (b.shape[0], rank)
        made[name] = Module(name, "linear", b.shape[0], a.shape[1], rank, scaling, *shapes, a.dtype, expert)
    return made


def stacked(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """``A [E R, N]`` and ``B [M, R E]`` of the experts' own pairs, in their order; R: the largest rank, by zeros."""
    rank = max(len(A) for A, _ in pairs)
    (first, second), count = pairs[0], len(pairs)
    rows = first.new_zeros(count, rank, first.shape[1])
    columns = second.new_zeros(len(second), rank, count)
    for number, (A, B) in enumerate(pairs):
        rows[number, : len(A)] = A
        columns[:, : len(A), number] = B
    return rows.flatten(0, 1), columns.flatten(1)


def check_experts(modules: Mapping[str, Sequence[tuple[str, Module]]]) -> None:
    """Check the experts of several adapters against each other: {module: (adapter, its module) of all that have it}.

    Raises AdapterError: adapters have different numbers of experts, one adapts a layer of which another adapts
    parameters, or a layer's parameters have no known order.
    """
    counts: dict[str, tuple[str, int]] = {}
    owners: dict[str, str] = {}
    parameters: dict[str, set[str]] = {}
    for adapter, module in (each for owned in modules.values() for each in owned):
        if (expert := module.expert) is None:
            continue
        owners[expert.layer] = adapter
        parameters.setdefault(expert.layer, set()).add(expert.parameter)
        first, count = counts.setdefault(expert.key, (adapter, expert.count))
        if count != expert.count:
            raise AdapterError(f"{adapter}: {expert.key} has {expert.count} experts, wanted {count} as in {first}")
    for layer, owner in owners.items():
        if layer in modules:
            other = modules[layer][0][0]
            raise AdapterError(f"{owner} adapts a parameter of {layer}, and {other} the layer; wanted one of the two")
        _inner_first(f"{owner}: {layer}", parameters[layer])
