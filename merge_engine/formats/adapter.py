"""An adapter of any file format: a description of its modules, and factors that are read when they are asked for."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

import torch

from merge_engine.errors import AdapterError
from merge_engine.files.weights import StoredTensor
from merge_engine.formats.families import PEFT, Family
from merge_engine.runtime.finite import what_is_wrong
from merge_engine.runtime.threads import threads

KEY_PREFIX = "base_model.model."
TOKENS = ".token_adapter.trainable_tokens_delta"


class Factor(Protocol):
    """A or B of a module: a tensor in a file, or what is made of some when it is read."""

    @property
    def key(self) -> str: ...
    @property
    def file(self) -> Path: ...
    @property
    def nbytes(self) -> int: ...
    def read(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class Expert:
    """One of the matrices in a parameter ``[E, ., .]`` of a layer of experts: PEFT's ``target_parameters``."""

    layer: str  # in the base model: "model.layers.0.mlp.experts"
    parameter: str  # "gate_up_proj"
    number: int
    count: int  # E

    @property
    def key(self) -> str:
        """The whole parameter, as the base model and the configuration name it."""
        return f"{self.layer}.{self.parameter}"


@dataclass(frozen=True)
class Module:
    """One pair of LoRA factors, described by what the file's header says of them."""

    name: str  # in the base model: "model.layers.0.self_attn.q_proj"
    kind: str  # "linear", "embedding" or "conv"
    rows: int  # M of the delta s * B[M, r] @ A[r, N]
    columns: int  # N; for a convolution, input channels * kernel volume
    rank: int
    scaling: float  # alpha / r, or alpha / sqrt(r) with rsLoRA, after the patterns
    a_shape: tuple[int, ...]  # as stored
    b_shape: tuple[int, ...]
    dtype: torch.dtype  # as stored
    expert: Expert | None = None  # whose pair it is, where the pairs of many are stored in one

    @property
    def target(self) -> str:
        """What PEFT's configuration calls it: the module, or the parameter that holds all experts."""
        return self.name if self.expert is None else self.expert.key


@dataclass(frozen=True, eq=False)
class Adapter:
    """One LoRA adapter on disk. Only headers have been read; several threads may read tensors at once."""

    name: str  # the last part of its folder or hub id
    source: str  # as it was asked for
    path: Path
    config: dict[str, Any]
    modules: dict[str, Module]  # sorted by name
    extras: dict[str, StoredTensor]  # by key: modules_to_save, trained tokens, saved embeddings
    _pairs: Mapping[str, tuple[Factor, Factor]] = field(repr=False)
    magnitudes: Mapping[str, StoredTensor] = field(default_factory=dict, repr=False, kw_only=True)  # DoRA's, by module
    family: Family = field(default=PEFT, kw_only=True)
    metadata: dict[str, str] = field(default_factory=dict, repr=False, kw_only=True)  # of a single file's header

    @property
    def base_model(self) -> str | None:
        return self.config.get("base_model_name_or_path")

    @property
    def size_bytes(self) -> int:
        """Bytes of all its tensors."""
        factors = sum(a.nbytes + b.nbytes for a, b in self._pairs.values())
        return factors + sum(each.nbytes for each in (*self.extras.values(), *self.magnitudes.values()))

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """``A [r, N]`` and ``B [M, r]`` of one module, read now, contiguous, in the stored dtype.

        Both are float32 where a factor is stored in another dtype than the other, or as a product of two tensors.

        Raises:
            AdapterError: a file is gone or became shorter since it was opened; or the module has DoRA's magnitudes, and
                is not its factors' product.
        """
        if name in self.magnitudes:
            self.refuse_dora()
        a, b = (factor.read().flatten(1) for factor in self._pairs[name])
        return (a, b) if a.dtype == b.dtype else (a.float(), b.float())

    def refuse_dora(self) -> None:
        """Raise AdapterError where the adapter has DoRA's magnitudes."""
        if self.magnitudes:
            raise AdapterError(
                f"{self.name}: use_dora is set in adapter_config.json; DoRA rescales the base weight, and what it "
                "changes is not known without that; wanted a merge --into BASE"
            )

    def pair(self, name: str) -> tuple[Factor, Factor]:
        """A and B of one module, to be read later."""
        return self._pairs[name]

    def keys(self, name: str) -> tuple[str, str]:
        """The keys of A and of B of one module in its file."""
        a, b = self._pairs[name]
        return a.key, b.key

    def check_finite(self) -> None:
        """Read every tensor once.

        On one thread: several would wait for each other at every tensor, 8 ms where a core is busy with something else.

        Raises:
            AdapterError: one holds NaN or Inf, the message names adapter, tensor and file; or a delta, which is at most
                ``|scaling| r max|A| max|B|``, may overflow float32.
        """
        with threads(1):
            for stored in (*self.extras.values(), *self.magnitudes.values()):
                self._largest(stored)
            for name, (a, b) in self._pairs.items():
                module = self.modules[name]
                bound = abs(module.scaling) * module.rank * self._largest(a) * self._largest(b)
                if bound > torch.finfo(torch.float32).max:
                    may = f"the delta of {name} may reach {bound:.1e}, which overflows float32"
                    raise AdapterError(f"{self.name}: {may}")

    def _largest(self, stored: Factor) -> float:
        """max|x|; raises AdapterError where x holds NaN or Inf."""
        values = stored.read()
        if values.dtype.itemsize == 1:
            values = values.float()  # torch has no aminmax of 8-bit floats
        if not values.numel() or not (values.is_floating_point() or values.is_complex()):
            return 0.0
        if values.is_complex():
            values = torch.view_as_real(values)
        least, most = map(float, torch.aminmax(values))
        if not (math.isfinite(least) and math.isfinite(most)):
            wrong = what_is_wrong(values)
            raise AdapterError(f"{self.name}: tensor {stored.key} in {stored.file} holds {wrong}")
        return max(-least, most)


def saves(target: str, key: str) -> bool:
    """Whether ``target``, an entry of ``modules_to_save``, names the layer of ``key``; PEFT compares ends of names."""
    parts = key[len(KEY_PREFIX) :].split(".")
    return any(".".join(parts[:end]).endswith(target) for end in range(1, len(parts)))


def is_base_copy(key: str) -> bool:
    """Whether a key is that of a copy of a weight of the base model, saved beside the factors."""
    return key.endswith((".base_layer.weight", ".base_layer.bias"))


def short_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def common_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The smallest dtype that holds the values of all; of 8-bit floats, which torch does not promote, bfloat16."""
    return reduce(torch.promote_types, (torch.bfloat16 if dtype.itemsize == 1 else dtype for dtype in dtypes))
