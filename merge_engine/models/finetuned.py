"""A full model as an input of a merge: each of its tensors, less that of the base, is a task tensor."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from merge_engine.errors import ModelError
from merge_engine.files.weights import StoredTensor
from merge_engine.formats.adapter import Adapter, Module
from merge_engine.formats.checkpoint import FLOATS, Checkpoint
from merge_engine.models.targets import Target
from merge_engine.models.vocabulary import Union, check_vocabulary
from merge_engine.runtime.finite import what_is_wrong

_PIECE = 1 << 21  # elements that are read at a time of a tensor whose rows are aligned by tokens


@dataclass(frozen=True)
class Difference:
    """x - base in one module, both [M, N], of any float dtype and any strides."""

    x: Tensor
    base: Tensor


@dataclass(frozen=True, eq=False)
class Finetuned:
    """One full model beside its base. Only headers have been read; several threads may read tensors at once.

    An adapter that saves embedding and head whole is one, too: `model` has these layers alone, and the others come from
    the factors of `adapter`.
    """

    model: Checkpoint
    targets: Mapping[str, Target]  # the base's tensors, by module
    modules: dict[str, Module] = field(repr=False)
    union: Union | None = None  # of the vocabularies, where rows are aligned by tokens
    adapter: Adapter | None = None

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def source(self) -> str:
        return self.model.source

    def difference(self, module: str, base: Tensor | None = None) -> Difference | tuple[Tensor, Tensor]:
        """Read one module: this model's tensor and the base's, or the factors where an adapter has the module.

        base: the base's tensor as [M, N]; it is read where it is not given.

        Raises:
            MergeError: a tensor cannot be read, or holds NaN or Inf; the message names model, tensor and file.
        """
        if self.adapter is not None and module in self.adapter.modules:
            return self.adapter.factors(module)
        target = self.targets[module]
        if base is None:
            base = target.matrix(read_finite(target.stored, "the base"))
        if self.union is not None and target.stored.key in self.union.keys:
            x = self._aligned(target.stored.key, target.tensor(base), self.union)
        else:
            x = read_finite(self.model.tensors[target.stored.key], self.name)
        return Difference(target.matrix(x), base)

    def rows(self, key: str) -> Iterator[tuple[Tensor, Tensor]]:
        """(places in the union [n], rows [n, ...]) of a tensor with one row for each token, piece by piece.

        Raises MergeError as `difference` does.
        """
        assert self.union is not None
        places = self.union.places[self.model]
        stored, start = self.model.tensors[key], 0
        width = prod(stored.shape[1:])
        for piece in stored.pieces(max(1, _PIECE // width) * width):
            _check_finite(piece, stored, self.name)
            rows = piece.reshape(-1, *stored.shape[1:])
            yield places[start : start + len(rows)], rows
            start += len(rows)

    def _aligned(self, key: str, base: Tensor, union: Union) -> Tensor:
        """This model's row of every token of the base; for tokens that it lacks, a copy of the base's row."""
        dtype = torch.promote_types(self.model.tensors[key].dtype, base.dtype)
        x = base.to(dtype, memory_format=torch.contiguous_format, copy=True)
        for places, rows in self.rows(key):
            added = (places >= union.first) & (places < union.first + len(union.added))
            here = (places >= 0) & ~added
            x[places[here]] = rows[here].to(dtype)
        return x


def added_rows(models: Sequence[Finetuned], key: str) -> Tensor:
    """mean_i x_i of each token that the base lacks, over the models i that have it: float32 [added, ...].

    The mean is not weighted: weights scale differences from the base, and here the base has no row. Summed in float32
    in the models' order. Raises MergeError as `Finetuned.difference` does.
    """
    union, shape = models[0].union, models[0].model.tensors[key].shape[1:]
    assert union is not None
    total, count = torch.zeros(len(union.added), *shape), torch.zeros(len(union.added))
    for model in models:
        for places, rows in model.rows(key):
            here = (places >= union.first) & (places < union.first + len(union.added))
            tokens = places[here] - union.first
            total[tokens] += rows[here].float()
            count[tokens] += 1
    return total.div_(count.reshape(-1, *[1] * len(shape)))


def read_finite(stored: StoredTensor, owner: str) -> Tensor:
    """The tensor, mapped where it can be; raises ModelError where it holds NaN or Inf."""
    tensor = stored.view()
    _check_finite(tensor, stored, owner)
    return tensor


def _check_finite(tensor: Tensor, stored: StoredTensor, owner: str) -> None:
    if wrong := what_is_wrong(tensor):
        raise ModelError(f"{owner}: tensor {stored.key} in {stored.file} holds {wrong}")


def open_finetuned(
    model: Checkpoint,
    base: Checkpoint,
    targets: Mapping[str, Target],
    described: Mapping[str, Module],
    union: Union | None = None,
    adapter: Adapter | None = None,
) -> Finetuned:
    """A full model, checked against its base.

    targets: the base's tensors that are merged, by module. described: modules that adapters have, too; the model's are
    described alike. union: where its rows go, if they are aligned by tokens; else its vocabulary has to be the base's.
    adapter: the adapter whose saved layers this model is; it is read once, to check it.

    Raises ModelError: the two have different tensors, shapes or vocabularies, or differ in a tensor that cannot be
    merged; AdapterError: an adapter holds NaN or Inf.
    """
    if adapter is not None:
        adapter.check_finite()
    for key in sorted(model.tensors.keys() ^ base.tensors.keys()) if adapter is None else ():
        owner, other = (model, base) if key in model.tensors else (base, model)
        if other.ties_embeddings and owner.twins.get(key) in other.tensors:
            continue  # a copy of a tied head, which only one of the two has saved
        raise ModelError(f"{owner.name} has tensor {key} but {other.name} does not")
    if union is None:
        check_vocabulary(base, [model])
    for twin, first in base.twins.items():
        own = model.tensors.get(twin)
        if own is not None and model.twins.get(twin) != first and not own.same_as(model.tensors[first]):
            raise ModelError(f"{model.name}: {twin} differs from {first}, to which {base.name} ties it")
    for key, stored in model.tensors.items():
        if key not in base.tensors:
            continue
        wanted = base.tensors[key]
        same = 1 if union is not None and key in union.keys else 0  # dimensions from here on have to be the same
        if stored.shape[same:] != wanted.shape[same:]:
            raise ModelError(
                f"{model.name}: {key} is {list(stored.shape)}, wanted {list(wanted.shape)} as in {base.name}"
            )
        if (stored.dtype in FLOATS) != (wanted.dtype in FLOATS):
            raise ModelError(f"{model.name}: {key} is {stored.dtype}, wanted {wanted.dtype} as in {base.name}")
        if stored.dtype not in FLOATS and not stored.same_as(wanted):
            raise ModelError(f"{model.name}: {key} is {stored.dtype} and differs from {base.name}: it cannot be merged")
    modules = {} if adapter is None else dict(adapter.modules)
    for name, target in targets.items():
        if target.stored.key not in model.tensors:
            continue
        rows, columns = target.matrix(torch.empty(target.stored.shape, device="meta")).shape
        dtype = model.tensors[target.stored.key].dtype
        shape = (min(rows, columns), *target.stored.shape[1:])
        dense = Module(name, "dense", rows, columns, shape[0], 1.0, shape, (rows, shape[0]), dtype)
        like = described.get(name, dense)
        modules[name] = replace(like, rank=shape[0], scaling=1.0, dtype=dtype)
    return Finetuned(model, targets, modules, union, adapter)
