"""Writes one tensor to its place in the shards, rounded once, and to the journal that it is finished."""

from collections.abc import Iterable

import torch
from torch import Tensor
from xxhash import xxh3_128

from merge_engine.errors import ModelError
from merge_engine.files.journal import Journal
from merge_engine.files.safetensors_writer import tensor_bytes
from merge_engine.files.shards import ShardFiles, Slot
from merge_engine.runtime.finite import finite


def write_pieces(files: ShardFiles, journal: Journal, slot: Slot, pieces: Iterable[Tensor], *, merged: bool) -> None:
    """Write the pieces of a tensor one behind the other; those that are not merged are copied byte for byte.

    Raises ModelError where a value overflows the dtype of its place, or a merged value is NaN.
    """
    position, digest = 0, xxh3_128()
    for piece in pieces:
        same = not merged and piece.dtype == slot.dtype
        data = tensor_bytes(piece if same else _cast(piece, slot, merged=merged))
        digest.update(data)
        files.write(slot, position, data)
        position += data.nbytes
    journal.finished(slot.key, digest.hexdigest())


def _cast(tensor: Tensor, slot: Slot, *, merged: bool) -> Tensor:
    """The tensor in its place's dtype. Raises ModelError if a value overflows it, or if a merged value is NaN."""
    cast = tensor.to(slot.dtype)
    if (merged or slot.dtype == torch.float16) and not finite(cast):
        name, largest = str(slot.dtype).removeprefix("torch."), torch.finfo(slot.dtype).max
        wanted = "another dtype, or smaller weights"
        raise ModelError(f"{slot.key} has a value beyond {largest:.5g}, the largest of {name}, or NaN; wanted {wanted}")
    return cast
