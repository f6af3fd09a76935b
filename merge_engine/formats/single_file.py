"""LoRA of image and video models: one .safetensors file, as kohya's scripts, diffusers, ComfyUI and others write it.

``delta = alpha / r * up @ down``; of a convolution in three factors (LoCon with ``lora_mid``)
``delta[o, i, x] = alpha / r * sum_pq up[o, p] mid[p, q, x] down[q, i]``, which is ``B @ A`` with
``A[p, (i, x)] = sum_q mid[p, q, x] down[q, i]``. Alpha is a tensor beside the factors, or is in the header
(``lora_adapter_metadata``, from diffusers), or is r. ``formats.families`` has the spellings.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_engine.errors import AdapterError
from merge_engine.files.weights import StoredTensor, open_safetensors, safetensors_metadata
from merge_engine.formats.adapter import Adapter, Module, short_name
from merge_engine.formats.families import ALPHA, ENDINGS, REFUSED, SPELLINGS, Family, Spelling, names_of
from merge_engine.formats.peft_config import ADAPTER_CONFIG, OF_FOLDERS, check_config, rank_and_scaling
from merge_engine.formats.peft_config import REFUSED as REFUSED_FIELDS
from merge_engine.formats.peft_tensors import FLOATS

ADAPTER_METADATA = "lora_adapter_metadata"  # diffusers': PEFT's configuration, its fields after "<component>."
BASES = ("ss_base_model_version", "modelspec.architecture")  # the fields that name a base model
Sides = dict[str, StoredTensor]  # "down", "up" and, of a convolution in three factors, "mid"


@dataclass(frozen=True)
class Folded:
    """The A of a convolution in three factors, multiplied out when it is read, in float32."""

    down: StoredTensor  # [r, in, 1, ...]
    mid: StoredTensor  # [r, r, kernel ...]

    @property
    def key(self) -> str:
        return self.down.key

    @property
    def file(self) -> Path:
        return self.down.file

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.mid.shape[0], self.down.shape[1], *self.mid.shape[2:])

    @property
    def dtype(self) -> torch.dtype:
        return self.down.dtype

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.mid.nbytes

    def read(self) -> Tensor:
        """A [r, in, kernel ...]: summed in float64 and rounded once. Raises AdapterError as `StoredTensor.read`."""
        mid, down = self.mid.read().double().flatten(2), self.down.read().double().flatten(1)
        return torch.einsum("pqx,qi->pix", mid, down).float().reshape(self.shape)


def open_file(path: Path, source: str, name: str) -> Adapter:
    """Open a LoRA of one .safetensors file, reading its header and the alphas only.

    source: as it was asked for. name: what to call it.

    Raises:
        AdapterError: it is missing or damaged, holds something other than LoRA, or mixes spellings.
    """
    tensors = open_safetensors(path, name)
    metadata = safetensors_metadata(path, name)
    spelling, factors, alphas = _sorted(tensors, name)
    names = names_of(sorted(factors), name)
    scaling_of = _Scalings(metadata, alphas, name)
    modules = {module: _describe(name, module, factors[module], scaling_of) for module in sorted(factors)}
    pairs = {module: _pair(factors[module]) for module in modules}
    base = next((metadata[key] for key in BASES if metadata.get(key)), None)
    config = {"base_model_name_or_path": base}
    family = Family(spelling.family, names)
    return Adapter(name, source, path, config, modules, {}, pairs, family=family, metadata=metadata)


def _sorted(tensors: dict[str, StoredTensor], name: str) -> tuple[Spelling, dict[str, Sides], dict[str, StoredTensor]]:
    """(a spelling of the family, the factors by module and side, the alphas by module); AdapterError for others."""
    factors: dict[str, Sides] = {}
    alphas: dict[str, StoredTensor] = {}
    spelled: dict[str, Spelling] = {}
    for key, tensor in tensors.items():
        for pattern, reason in REFUSED:
            if re.search(pattern, key):
                raise AdapterError(f"{name}: tensor {key} cannot be merged: {reason}")
        ending = next((ending for ending in ENDINGS if key.endswith(ending) and key != ending), None)
        if ending is not None:
            spelling, side = ENDINGS[ending]
            module = key[: -len(ending)]
            first = spelled.setdefault(module, spelling)
            if first is not spelling:
                raise AdapterError(f"{name}: {module} is spelled {first.down} and {spelling.down}, wanted one of them")
            factors.setdefault(module, {})[side] = tensor
        elif key.endswith(ALPHA) and key != ALPHA:
            alphas[key[: -len(ALPHA)]] = tensor
        else:
            wanted = next(iter(spelled.values()), SPELLINGS[0]).down
            raise AdapterError(f"{name}: tensor {key} is unknown, wanted <module>{wanted} and the like")
    if not factors:
        raise AdapterError(f"{name}: the file holds no LoRA tensors, wanted <module>.lora_down.weight and the like")
    for module in alphas.keys() - factors.keys():
        raise AdapterError(f"{name}: tensor {module}{ALPHA} has no factors beside it")
    families = {spelling.family: module for module, spelling in sorted(spelled.items(), reverse=True)}
    if len(families) > 1:
        (one, first_module), (two, second), *_ = sorted(families.items())
        raise AdapterError(f"{name}: {first_module} is spelled as in {one}, {second} as in {two}; wanted one family")
    return next(iter(spelled.values())), factors, alphas


def _pair(sides: Sides) -> tuple[StoredTensor | Folded, StoredTensor]:
    """(A, B): see the formula above."""
    return Folded(sides["down"], sides["mid"]) if "mid" in sides else sides["down"], sides["up"]


def _describe(adapter: str, name: str, sides: Sides, scaling_of: "_Scalings") -> Module:
    """The module of two or three factors; AdapterError where one is missing, or they do not fit each other."""
    for side, other in (("down", "up"), ("up", "down")):
        if side not in sides:
            present = next(iter(sides.values())) if other not in sides else sides[other]
            raise AdapterError(f"{adapter}: {present.key} has no {side} factor beside it")
    down, up, mid = sides["down"], sides["up"], sides.get("mid")
    for tensor in sides.values():
        where = f"{adapter}: {tensor.key} is {list(tensor.shape)}"
        if not 2 <= len(tensor.shape) <= 5 or len(tensor.shape) != len(down.shape) or 0 in tensor.shape:
            raise AdapterError(f"{where}, wanted a factor of a linear or convolution layer")
        if tensor.dtype not in FLOATS:
            raise AdapterError(f"{where} {short_name(tensor.dtype)}, wanted floating point")
    rank = down.shape[0]
    if mid is not None and (len(mid.shape) == 2 or mid.shape[:2] != (rank, rank)):
        raise AdapterError(f"{adapter}: {mid.key} is {list(mid.shape)}, wanted [{rank}, {rank}, kernel ...]")
    if mid is not None and any(size != 1 for size in down.shape[2:]):
        raise AdapterError(f"{adapter}: {down.key} is {list(down.shape)}, wanted [{rank}, in, 1 ...] beside a mid")
    if len(up.shape) > 2 and up.shape[1] < rank and rank % up.shape[1] == 0:
        raise AdapterError(
            f"{adapter}: {up.key} is {list(up.shape)} at rank {rank}: a convolution in {rank // up.shape[1]} groups, "
            "which cannot be merged"
        )
    if up.shape[1] != rank or any(size != 1 for size in up.shape[2:]):
        raise AdapterError(f"{adapter}: {up.key} is {list(up.shape)}, wanted rank {rank} as in {down.key}")
    a_shape = _pair(sides)[0].shape
    kind = "linear" if len(a_shape) == 2 else "conv"
    # Two dtypes of one module are rare; both are merged in float32, and bfloat16 and float16 have no common dtype else.
    dtype = down.dtype if down.dtype == up.dtype else torch.float32
    scaling = scaling_of(name, rank)
    return Module(name, kind, up.shape[0], math.prod(a_shape[1:]), rank, scaling, a_shape, up.shape, dtype)


class _Scalings:
    """alpha / r of every module: from the header's configuration, from the alpha beside the factors, or 1."""

    def __init__(self, metadata: dict[str, str], alphas: dict[str, StoredTensor], adapter: str) -> None:
        self._adapter = adapter
        self._alphas = alphas
        self._of_component: dict[str, Any] = {}
        text = metadata.get(ADAPTER_METADATA)
        if text is None:
            return
        if alphas:
            raise AdapterError(
                f"{adapter}: the header has {ADAPTER_METADATA} and the file {min(alphas)}{ALPHA}: two sources of "
                "alpha; wanted one"
            )
        for component, config in _components(text, adapter).items():
            subject = f"{adapter}: {ADAPTER_METADATA}" + (f" of {component}" if component else "")
            try:
                check_config({"peft_type": "LORA", **config}, subject, REFUSED_FIELDS | OF_FOLDERS)
                self._of_component[component] = rank_and_scaling(config, subject)
            except AdapterError as error:  # it speaks of the file that PEFT's folders have
                raise AdapterError(str(error).replace(f" in {ADAPTER_CONFIG}", "")) from error

    def __call__(self, module: str, rank: int) -> float:
        if self._of_component:
            component = next((name for name in self._of_component if name and module.startswith(f"{name}.")), "")
            if component not in self._of_component:
                raise AdapterError(f"{self._adapter}: {ADAPTER_METADATA} says nothing of {module.split('.')[0]}")
            wanted, scaling = self._of_component[component](module.removeprefix(f"{component}."))
            if wanted != rank:
                raise AdapterError(
                    f"{self._adapter}: {module} has rank {rank}, wanted {wanted} from {ADAPTER_METADATA}"
                )
            return float(scaling)
        if module not in self._alphas:
            return 1.0
        alpha = self._alphas[module]
        if math.prod(alpha.shape) != 1:
            raise AdapterError(f"{self._adapter}: {alpha.key} is {list(alpha.shape)}, wanted one number")
        value = float(alpha.read().reshape(()).to(torch.float64))
        if not math.isfinite(value):
            raise AdapterError(f"{self._adapter}: {alpha.key} is {value}, wanted a number")
        return value / rank


def _components(text: str, adapter: str) -> dict[str, dict[str, Any]]:
    """PEFT's configurations by component ("transformer", "text_encoder"); "" for fields without one."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{adapter}: {ADAPTER_METADATA} in the header is damaged: {error}") from error
    if not isinstance(fields, dict):
        raise AdapterError(f"{adapter}: {ADAPTER_METADATA} is a {type(fields).__name__}, wanted an object")
    components: dict[str, dict[str, Any]] = {}
    for key, value in fields.items():
        component, _, field = key.rpartition(".")
        components.setdefault(component, {})[field] = value
    for component, config in components.items():
        if "r" not in config:
            raise AdapterError(f"{adapter}: {ADAPTER_METADATA} has no rank r of {component or 'the model'}")
    return components
