"""A full model as an input of a merge: every tensor is a task tensor, finetuned - base."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from merge_engine.adapter import Module
from merge_engine.checkpoint import FLOATS, Checkpoint
from merge_engine.errors import ModelError
from merge_engine.tensors import StoredTensor
from merge_engine.vocabulary import check_vocabulary


@dataclass(frozen=True)
class Difference:
    """x - base in one module, both [M, N], of any float dtype and any strides."""

    x: Tensor
    base: Tensor


@dataclass(frozen=True)
class Target:
    """The tensor of a base model that a module is merged into."""

    stored: StoredTensor
    transposed: bool  # a delta [M, N] goes into a weight [N, M]

    def matrix(self, tensor: Tensor) -> Tensor:
        """The tensor as [M, N], without a copy: a vector is one row, a convolution's kernel lies in its row."""
        flat = tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1)
        return flat.t() if self.transposed else flat

    def tensor(self, matrix: Tensor) -> Tensor:
        """What `matrix` undoes: a tensor of the base's shape."""
        return (matrix.t() if self.transposed else matrix).reshape(self.stored.shape)


@dataclass(frozen=True, eq=False)
class Finetuned:
    """One full model beside its base. Nothing but headers has been read; reading is safe from several threads."""

    model: Checkpoint
    targets: Mapping[str, Target]  # in the base, by module
    modules: dict[str, Module] = field(repr=False)

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def source(self) -> str:
        return self.model.source

    def difference(self, module: str, base: Tensor | None = None) -> Difference:
        """Read one tensor, and that of the base where it is not given as [M, N].

        Raises:
            MergeError: it cannot be read, or holds NaN or Inf; the message names model, tensor and file.
        """
        target = self.targets[module]
        if base is None:
            base = target.matrix(read_finite(target.stored, "the base"))
        return Difference(target.matrix(read_finite(self.model.tensors[target.stored.key], self.name)), base)


def read_finite(stored: StoredTensor, owner: str) -> Tensor:
    """The tensor; raises ModelError where it holds NaN or Inf."""
    tensor = stored.read()
    if tensor.numel() and not all(torch.isfinite(end) for end in torch.aminmax(tensor)):
        what = "NaN" if torch.isnan(tensor).any() else "Inf"
        raise ModelError(f"{owner}: tensor {stored.key} in {stored.file} holds {what}")
    return tensor


def open_finetuned(
    model: Checkpoint, base: Checkpoint, targets: Mapping[str, Target], described: Mapping[str, Module]
) -> Finetuned:
    """A full model as the tasks of its `targets` in the base.

    described: what adapters say of modules that they have too, so that mixed modules are seen alike.

    Raises ModelError: the two have different tensors, shapes or vocabularies, or differ where nothing can be merged.
    """
    for key in sorted(model.tensors.keys() ^ base.tensors.keys()):
        owner, other = (model, base) if key in model.tensors else (base, model)
        raise ModelError(f"{owner.name} has tensor {key} but {other.name} has not")
    check_vocabulary(base, [model])
    for key, stored in model.tensors.items():
        wanted = base.tensors[key]
        if stored.shape != wanted.shape:
            raise ModelError(
                f"{model.name}: {key} is {list(stored.shape)}, wanted {list(wanted.shape)} as in {base.name}"
            )
        if (stored.dtype in FLOATS) != (wanted.dtype in FLOATS):
            raise ModelError(f"{model.name}: {key} is {stored.dtype}, wanted {wanted.dtype} as in {base.name}")
        if stored.dtype not in FLOATS and not stored.same_as(wanted):
            raise ModelError(f"{model.name}: {key} is {stored.dtype} and differs from {base.name}: it cannot be merged")
    modules = {}
    for name, target in targets.items():
        rows, columns = target.matrix(torch.empty(target.stored.shape, device="meta")).shape
        dtype = model.tensors[target.stored.key].dtype
        shape = (min(rows, columns), *target.stored.shape[1:])
        dense = Module(name, "dense", rows, columns, shape[0], 1.0, shape, (rows, shape[0]), dtype)
        like = described.get(name, dense)
        modules[name] = replace(like, rank=shape[0], scaling=1.0, dtype=dtype)
    return Finetuned(model, targets, modules)
