"""What adapters hold beside their factors (modules_to_save, saved embeddings): which of it a merge carries over."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from merge_engine.errors import AdapterError
from merge_engine.files.weights import StoredTensor
from merge_engine.formats.adapter import KEY_PREFIX, TOKENS, Adapter, is_base_copy, short_name
from merge_engine.formats.tokens import carried_tokens, token_layer

Owned = Sequence[tuple[str, StoredTensor]]  # (adapter, its tensor) of one key, in the adapters' order


@dataclass(frozen=True)
class AverageTensor(StoredTensor):
    """mean_i x_i, of tensors of one shape and dtype: summed in float64, rounded once to the dtype.

    It takes the place of a stored tensor; the parts are read when it is.
    """

    parts: tuple[StoredTensor, ...] = field(default=(), repr=False)

    def read(self) -> torch.Tensor:
        """A new tensor of the parts' dtype. Raises as `StoredTensor.read` does."""
        pieces = [piece.clone() for piece in self.pieces()]
        return torch.cat(pieces).reshape(self.shape) if pieces else torch.empty(self.shape, dtype=self.dtype)

    def pieces(self, elements: int = 1 << 20) -> Iterator[torch.Tensor]:
        """Flat pieces of at most `elements` elements. Raises as `StoredTensor.read` does."""
        for pieces in zip(*(part.pieces(elements) for part in self.parts), strict=True):
            total = pieces[0].to(torch.float64, copy=True)
            for piece in pieces[1:]:
                total += piece.double()
            yield (total / len(pieces)).to(self.dtype)


def shared_extras(adapters: Sequence[Adapter], saved: str | None = None) -> dict[str, StoredTensor]:
    """{key: tensor} of what is carried over beside the merged factors; see `carried_over` and `carried_tokens`.

    Raises:
        AdapterError: a tensor, or the row of a trained token, differs between two adapters, and saved does not say
            what to do; or a layer that one adapter holds whole is adapted in another.
    """
    whole = []
    for adapter in adapters:
        layers = {key: stored for key, stored in adapter.extras.items() if not key.endswith(TOKENS)}
        whole.append((adapter.name, layers))
    found = carried_over(whole, saved) | carried_tokens(adapters, saved)
    _check_layers(adapters, found)
    return dict(sorted(found.items()))


def _check_layers(adapters: Sequence[Adapter], extras: Mapping[str, StoredTensor]) -> None:
    """Raise AdapterError where a layer is held whole, or has trained tokens, and is changed in another way, too."""
    for key in extras:
        if is_base_copy(key):
            continue
        owner = next(adapter.name for adapter in adapters if key in adapter.extras)
        layer = token_layer(key) if key.endswith(TOKENS) else key.removeprefix(KEY_PREFIX).rpartition(".")[0]
        layer = layer.removesuffix(".modules_to_save")
        if not key.endswith(TOKENS) and f"{KEY_PREFIX}{layer}{TOKENS}" in extras:
            raise AdapterError(f"{owner} holds {layer} whole, and another adapter trains tokens of it")
        adapting = [adapter.name for adapter in adapters if layer in adapter.modules]
        if adapting:
            raise AdapterError(
                f"{owner} holds {layer} whole, and {adapting[0]} adapts it; such layers cannot be merged"
            )


def carried_over(
    owners: Sequence[tuple[str, Mapping[str, StoredTensor]]], saved: str | None = None
) -> dict[str, StoredTensor]:
    """{key: tensor}, in the order of the keys, of (adapter, its tensors by key).

    A tensor that one adapter has, or that is the same in all that have it, bit for bit, is taken as it is. Where it
    differs: saved="first" takes that of the first adapter that has it, "average" the mean over those that have it, not
    weighted. Copies of a base weight (``base_layer``) are never averaged: where they differ, so do the base models.

    Raises:
        AdapterError: a tensor differs, and saved is None; or shapes or dtypes differ. It names tensor and adapters.
    """
    keys = sorted({key for _, extras in owners for key in extras})
    return {key: _one(key, [(name, extras[key]) for name, extras in owners if key in extras], saved) for key in keys}


def _one(key: str, owned: Owned, saved: str | None) -> StoredTensor:
    first, stored = owned[0]
    for other, twin in owned[1:]:
        if (twin.shape, twin.dtype) != (stored.shape, stored.dtype):
            raise AdapterError(
                f"{key} differs: {first} has {list(stored.shape)} {short_name(stored.dtype)}, "
                f"{other} has {list(twin.shape)} {short_name(twin.dtype)}; such tensors cannot be merged"
            )
    different = [other for other, twin in owned[1:] if twin is not stored and not twin.same_as(stored)]
    if not different:
        return stored
    what = f"{key} differs between {first} and {different[0]}"
    if is_base_copy(key):
        raise AdapterError(f"{what}: they were trained on different base models")
    if saved is None:
        raise AdapterError(f"{what}; such tensors cannot be merged: wanted the same in both, or saved average or first")
    if saved == "first":
        return stored
    if not stored.dtype.is_floating_point:
        raise AdapterError(f"{what}: it is {short_name(stored.dtype)}, which has no average; wanted saved first")
    return _average([twin for _, twin in owned])


def _average(parts: Sequence[StoredTensor]) -> StoredTensor:
    plain = replace(parts[0], mapped=None)
    return AverageTensor(plain.key, plain.file, plain.shape, plain.dtype, parts=tuple(parts))
