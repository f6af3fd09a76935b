"""Full models as inputs of a merge of whole tensors; an adapter on one is applied when a tensor is read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from merge_engine.errors import ModelError
from merge_engine.files.weights import StoredTensor
from merge_engine.formats.adapter import TOKENS, Adapter
from merge_engine.formats.checkpoint import FLOATS, Checkpoint, is_head
from merge_engine.models.experts import as_the_base_has_them
from merge_engine.models.finetuned import read_finite
from merge_engine.models.saved import saved_tensors
from merge_engine.models.targets import Target, targets_of_adapters
from merge_engine.models.vocabulary import vocabulary_keys

_ROWS = 1 << 10  # of a delta that are computed at a time
_BUFFERS = ("rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")  # older files have these, models compute them


@dataclass(frozen=True, eq=False)
class FullInput:
    """One full model of a merge, or a full model with an adapter on it."""

    model: Checkpoint
    adapter: Adapter | None = None
    adapted: Mapping[str, tuple[str, Target]] = field(default_factory=dict)  # {key: the module that changes it}
    saved: Mapping[str, StoredTensor] = field(default_factory=dict)  # {key: the tensor that replaces it}

    @property
    def name(self) -> str:
        return self.model.name if self.adapter is None else f"{self.model.name}+{self.adapter.name}"

    @property
    def source(self) -> str:
        return self.model.source if self.adapter is None else f"{self.model.source}+{self.adapter.source}"

    @cached_property
    def embedding(self) -> str | None:
        """The key of the embedding that a head may be tied to."""
        return next((key for key in vocabulary_keys(self.model) if not is_head(key)), None)

    @cached_property
    def keys(self) -> list[str]:
        """The keys of its tensors, without buffers that are computed when a model is loaded."""
        return [key for key in self.model.tensors if not key.endswith(_BUFFERS)]

    def stored(self, key: str) -> StoredTensor:
        """The tensor of a key; of a head that is tied and not saved the embedding. Raises ModelError without one."""
        if key in self.saved:
            return self.saved[key]
        if key not in self.model.tensors and is_head(key) and self.model.ties_embeddings and self.embedding:
            return self.model.tensors[self.embedding]
        if key not in self.model.tensors:
            raise ModelError(f"{self.name}: wanted tensor {key}, got none")
        return self.model.tensors[key]

    def is_changed(self, key: str) -> bool:
        """Whether the adapter has a delta for the tensor."""
        return self.stored(key).key in self.adapted

    def read(self, key: str) -> Tensor:
        """The tensor: in the dtype in which it is stored, or in float32 with the adapter's delta added.

        Raises MergeError where it cannot be read, or holds NaN or Inf.
        """
        stored = self.stored(key)
        tensor = read_finite(stored, self.name)
        if self.adapter is None or stored.key not in self.adapted:
            return tensor
        module, target = self.adapted[stored.key]
        A, B = (factor.float() for factor in self.adapter.factors(module))
        scaling, whole = self.adapter.modules[module].scaling, tensor.float()
        matrix = target.matrix(whole)
        for start in range(0, len(B), _ROWS):
            rows = slice(start, start + _ROWS)
            matrix[rows] = matrix[rows] + scaling * (B[rows] @ A)
        return whole


def full_input(model: Checkpoint, adapter: Adapter | None = None) -> FullInput:
    """Check that an adapter fits its model. Raises MergeError where it does not, or holds NaN or Inf."""
    if adapter is None:
        return FullInput(model)
    adapter = as_the_base_has_them(adapter, model)
    _check_factors_alone(adapter)
    targets = targets_of_adapters(model, [adapter])
    saved = saved_tensors(model, [adapter])
    adapter.check_finite()
    adapted = {target.stored.key: (module, target) for module, target in targets.items()}
    for key in adapted.keys() & saved.keys():
        raise ModelError(f"{adapter.name}: {key} is both adapted and saved whole; wanted one of the two")
    return FullInput(model, adapter, adapted, saved)


def _check_factors_alone(adapter: Adapter) -> None:
    """Refuse what is more than factors of whole tensors."""
    tokens = any(key.endswith(TOKENS) for key in adapter.extras)
    fused = any(module.expert is not None for module in adapter.modules.values())
    for what, there in (("DoRA", adapter.magnitudes), ("trained tokens", tokens), ("experts in one parameter", fused)):
        if there:
            raise ModelError(f"{adapter.name} has {what}; wanted LoRA alone here, or a merge --into BASE by its own")


def is_float(stored: StoredTensor) -> bool:
    return stored.dtype in FLOATS


def common_dtype(tensors: list[StoredTensor]) -> torch.dtype:
    """The dtype that all tensors promote to."""
    dtype = tensors[0].dtype
    for stored in tensors[1:]:
        dtype = torch.promote_types(dtype, stored.dtype)
    return dtype
