"""Experts of adapters and of base models brought together: LoRA on a parameter ``[E, ., .]``, and how the base has it.

A base that has the parameter itself is seen as one with a tensor for each expert, so that each is merged by itself. A
base that has a tensor for each expert is what transformers fuses when it loads it: gate and up become the upper and the
lower half of gate_up_proj. There the adapter's pairs are seen as pairs of these tensors; B is cut in two.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from merge_engine.errors import ModelError
from merge_engine.files.shards import Piece
from merge_engine.files.weights import StoredTensor
from merge_engine.formats.adapter import Adapter, Expert, Factor, Module
from merge_engine.formats.checkpoint import Checkpoint

# How files name the tensors of one expert, and the part of the layer's name that transformers changes as it loads them.
_GATE_UP_DOWN = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_RENAMED = ((".mlp.experts", ".mlp.experts"), (".mlp.experts", ".block_sparse_moe.experts"))
# Models whose files have the parameter [E, in, out], and PEFT the delta [out, in]. It shows in the shapes, unless they
# are square: of these the classes say is_transposed, or transformers transposes what it loads.
TRANSPOSED = frozenset({"gpt_oss", "openai_privacy_filter", "aria", "aria_text", "qwen3_vl_moe", "qwen3_vl_moe_text"})
Pieces = dict[str, tuple[Piece, ...]]  # by key of the base


@dataclass(frozen=True)
class FactorRows:
    """Some rows of a factor."""

    whole: Factor
    height: int  # rows of the whole
    rows: slice

    @property
    def key(self) -> str:
        return self.whole.key

    @property
    def file(self) -> Path:
        return self.whole.file

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes * (self.rows.stop - self.rows.start) // self.height

    def read(self) -> Tensor:
        """A new contiguous tensor. Raises as the factor's own `read` does."""
        return self.whole.read()[self.rows].clone()


def stores_transposed(base: Checkpoint) -> bool:
    """Whether the base's files have experts [in, out], where their shape does not say."""
    described = [base.config, *(base.config.get(part) for part in ("text_config", "llm_config"))]
    return any(isinstance(each, dict) and each.get("model_type") in TRANSPOSED for each in described)


def pieces_of_experts(base: Checkpoint, adapters: Iterable[Adapter]) -> Pieces:
    """{key of the base: one piece for each expert} of all parameters of experts that are adapted, and that it has.

    Raises ModelError where the base has another number of experts.
    """
    found: Pieces = {}
    for adapter in adapters:
        for module in adapter.modules.values():
            expert = module.expert
            if expert is None or expert.key in found or expert.key not in base.tensors:
                continue
            shape = base.tensors[expert.key].shape
            if len(shape) == 2 and expert.count == 1:
                found[expert.key] = (Piece(f"{module.name}.weight", 0, shape[0], shape),)
                continue
            if len(shape) != 3 or shape[0] != expert.count:
                raise ModelError(
                    f"{adapter.name}: {expert.key} has {expert.count} experts, wanted those of {list(shape)} "
                    f"as in {base.name}"
                )
            found[expert.key] = tuple(
                Piece(f"{expert.key}.{number}.weight", number, 1, shape[1:]) for number in range(expert.count)
            )
    return found


def divided(checkpoint: Checkpoint, pieces: Mapping[str, Sequence[Piece]]) -> Checkpoint:
    """The model with several tensors in the place of one. Nothing is read."""
    tensors: dict[str, StoredTensor] = {}
    for key, stored in checkpoint.tensors.items():
        for piece in pieces.get(key, ()):
            part = stored.rows(piece.start, piece.count)
            mapped = None if part.mapped is None else part.mapped.reshape(piece.shape)
            tensors[piece.key] = replace(part, key=piece.key, shape=piece.shape, mapped=mapped)
        if key not in pieces:
            tensors[key] = stored
    return replace(checkpoint, tensors=tensors)


def as_the_base_has_them(adapter: Adapter, base: Checkpoint) -> Adapter:
    """The adapter with its experts' pairs as pairs of the base's own tensors, where that has one for each expert.

    Raises ModelError where the base has neither the parameter nor known tensors of each expert.
    """
    modules: dict[str, Module] = {}
    pairs: dict[str, tuple[Factor, Factor]] = {}
    for name, module in adapter.modules.items():
        own = adapter.pair(name)
        if module.expert is None or module.expert.key in base.tensors:
            modules[name], pairs[name] = module, own
            continue
        for key, rows in _tensors_of(adapter, module, module.expert, base):
            height = rows.stop - rows.start
            part = replace(module, name=key, rows=height, b_shape=(height, module.rank), expert=None)
            modules[key] = part
            pairs[key] = own if height == module.rows else (own[0], FactorRows(own[1], module.rows, rows))
    if modules.keys() == adapter.modules.keys():
        return adapter
    return replace(adapter, modules={name: modules[name] for name in sorted(modules)}, _pairs=pairs)


def _tensors_of(adapter: Adapter, module: Module, expert: Expert, base: Checkpoint) -> Iterator[tuple[str, slice]]:
    """(layer of the base, its rows of the expert's delta)."""
    half = module.rows // 2
    for old, new in _RENAMED:
        layer = f"{expert.layer.replace(old, new)}.{expert.number}"
        for gate, up, down in _GATE_UP_DOWN:
            found = {
                "gate_up_proj": {gate: slice(0, half), up: slice(half, 2 * half)},
                "down_proj": {down: slice(0, module.rows)},
            }.get(expert.parameter, {})
            if found and all(f"{layer}.{name}.weight" in base.tensors for name in found):
                yield from ((f"{layer}.{name}", rows) for name, rows in found.items())
                return
    raise ModelError(
        f"{adapter.name}: wanted tensor {expert.key} in {base.name}, or gate_proj, up_proj and down_proj (w1, w3, w2) "
        f"of each of its experts, got neither"
    )
