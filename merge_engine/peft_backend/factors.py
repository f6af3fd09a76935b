"""PEFT's factor types on live factors: all A are merged, then all B, and rounded in PEFT's order.

With w_i = weight_i * scaling_i, the weight of A_i is sign(w_i) sqrt(|w_i|), and that of B_i is sqrt(|w_i|). Adapters
are trimmed or dropped in their own dtype, weighted and added in float32 (torch's promotion with a vector of float32
weights), and rounded once to the dtype of the first adapter's A. Results equal PEFT's bit for bit, with one exception:
of equal magnitudes at its threshold, a trim keeps those with the lowest flat index.

Layers of one shape are merged together; on a CPU, as many at a time as fit in a core's cache.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from merge_engine.cpu.mask import keep_mask
from merge_engine.errors import AdapterError
from merge_engine.peft_backend.layers import Layer, LayerFactors, check_finite
from merge_engine.rules.factor_weights import factor_weights
from merge_engine.rules.philox import stream_id
from merge_engine.rules.rule import Rule
from merge_engine.runtime.finite import finite
from merge_engine.runtime.threads import ahead, threads

SIDES = ("A", "B")
IN_ORDER = 4  # torch.sum adds up to so many rows one after the other
CPU_BATCH, DEVICE_BATCH = 1 << 18, 1 << 26  # elements of all adapters that are merged at once
Mask = Callable[[Layer, int, str], Tensor]  # (layer, index of a part in it, side) -> what DARE keeps


class Batch(NamedTuple):
    """One side of layers that have the same shape, dtypes, device, number of adapters and weights."""

    side: str
    layers: list[Layer]
    weights: tuple[float, ...]


def merge_factors(
    layers: Sequence[Layer], weights: Sequence[float], rule: Rule, density: float, rank: int, mask: Mask
) -> list[LayerFactors]:
    """(A [rank, ...], B [M, rank, ...]) of each layer; smaller ranks are filled up with zeros.

    Raises AdapterError where factors of one layer differ in rank, hold NaN or Inf, or overflow the result's dtype.
    """
    found: dict[tuple[str, str], Tensor] = {}
    workers = torch.get_num_threads()
    on_cpu = layers[0].parts[0].A.device.type == "cpu"

    def work(batch: Batch) -> tuple[Batch, list[Tensor]]:
        return batch, _merge(batch, rule, density, rank, mask)

    batches = _batches(layers, weights)
    selects = on_cpu and rule.keep == "magnitude" and density < 1  # by numpy, which uses one thread
    with threads(1) if on_cpu else nullcontext():  # torch's operations are too short to gain from more threads
        results = ahead(work, batches, workers) if selects else map(work, batches)
        for batch, merged in results:
            found.update(((layer.name, batch.side), tensor) for layer, tensor in zip(batch.layers, merged, strict=True))
    return [(found[layer.name, "A"], found[layer.name, "B"]) for layer in layers]


def stack_factors(layers: Sequence[Layer], weights: Sequence[float], rank: int) -> list[LayerFactors]:
    """A = the rows of all weight_i scaling_i A_i, B = the columns of all B_i; filled up to `rank` with zeros. Exact.

    Raises AdapterError for a grouped convolution, whose factors cannot be stacked, and for NaN and Inf.
    """

    def work(layer: Layer) -> LayerFactors:
        if layer.grouped:
            raise AdapterError(f"{layer.name} is a grouped convolution, whose factors cannot be stacked")
        A, B = layer.parts[0].A, layer.parts[0].B
        A, B = A.new_zeros(rank, *A.shape[1:]), A.new_zeros(len(B), rank, *B.shape[2:])
        start = 0
        for part in layer.parts:
            end = start + len(part.A)
            A[start:end] = part.A * weights[part.number] * part.scaling
            B[:, start:end] = part.B
            start = end
        for side, tensor in zip(SIDES, (A, B), strict=True):
            check_finite(tensor, f"cat: lora_{side} of {layer.name}")
        return A, B

    return list(ahead(work, layers, torch.get_num_threads()))


def strengths(layer: Layer, weights: Sequence[float], side: str) -> tuple[float, ...]:
    """The weights of a layer's adapters on one side."""
    return tuple(factor_weights([weights[part.number] * part.scaling for part in layer.parts], side))


def philox_mask(density: float, seed: int) -> Mask:
    """Masks that depend on seed, layer, side, adapter and element only; see `rules.philox`."""

    def mask(layer: Layer, place: int, side: str) -> Tensor:
        part = layer.parts[place]
        shape = _factor(layer, place, side).flatten(1).shape
        stream = stream_id(layer.name, side)
        rows, columns = range(shape[0]), range(shape[1])
        return keep_mask(density, seed=seed, stream=stream, adapter=part.number, rows=rows, columns=columns)

    return mask


def _batches(layers: Sequence[Layer], weights: Sequence[float]) -> Iterator[Batch]:
    batches: dict[tuple[object, ...], Batch] = {}
    for layer in layers:
        for side in SIDES:
            tensors = [_factor(layer, place, side) for place in range(len(layer.parts))]
            first = tensors[0]
            for part, tensor in zip(layer.parts, tensors, strict=True):
                if tensor.shape != first.shape:
                    raise AdapterError(
                        f"{part.adapter}: lora_{side} of {layer.name} is {list(tensor.shape)}, wanted "
                        f"{list(first.shape)} as in {layer.parts[0].adapter}: factors of different ranks cannot be "
                        "merged side by side; cat, svd and the types that end in _svd can"
                    )
            counted = strengths(layer, weights, side)
            dtypes = tuple((part.A.dtype, tensor.dtype) for part, tensor in zip(layer.parts, tensors, strict=True))
            key = (side, first.shape, first.device, counted, dtypes)
            batch = batches.setdefault(key, Batch(side, [], counted))
            batch.layers.append(layer)
            budget = CPU_BATCH if first.device.type == "cpu" else DEVICE_BATCH
            if (len(batch.layers) + 1) * len(tensors) * first.numel() > budget:
                yield batches.pop(key)
    yield from batches.values()


def _merge(batch: Batch, rule: Rule, density: float, rank: int, mask: Mask) -> list[Tensor]:
    layers, side = batch.layers, batch.side
    dtype = layers[0].parts[0].A.dtype
    if rule.elect == "none" and (rule.keep != "magnitude" or density >= 1) and len(batch.weights) <= IN_ORDER:
        drops = rule.keep == "bernoulli" and density < 1
        tensors = [_added(layer, side, batch.weights, density, mask if drops else None).to(dtype) for layer in layers]
    else:
        tensors = list(_combined(batch, rule, density, mask).to(dtype).unbind())
    for tensor in tensors:
        if not finite(tensor):
            _blame(batch, dtype)
    missing = rank - layers[0].parts[0].A.shape[0]
    if missing and any(layer.grouped for layer in layers):
        raise AdapterError(f"{layers[0].name} is a grouped convolution, whose rank cannot be raised to {rank}")
    shape = _factor(layers[0], 0, side).shape
    return [_padded(tensor.view(shape), SIDES.index(side), missing) for tensor in tensors]


def _added(layer: Layer, side: str, weights: Sequence[float], density: float, mask: Mask | None) -> Tensor:
    """sum_i w_i x_i, or sum_i w_i drop(x_i), of one layer, flat; added in order, as torch.sum adds up to four rows."""
    total: Tensor | None = None
    device = _factor(layer, 0, side).device
    for place, weight in enumerate(weights):
        x = _factor(layer, place, side).to(device).flatten()
        if mask is not None:
            x = x.clone()
            drop(x, mask(layer, place, side).flatten(), density)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        term = wide * float(np.float32(weight))
        total = term if total is None else total.add_(term)
    assert total is not None
    return total


def _combined(batch: Batch, rule: Rule, density: float, mask: Mask) -> Tensor:
    """combine(elect(keep(x))) of every layer: [layers, numel]."""
    layers, side = batch.layers, batch.side
    places = range(len(batch.weights))
    device = _factor(layers[0], 0, side).device
    x = _stacked([_factor(layer, place, side).to(device).flatten() for place in places for layer in layers])
    if density < 1 and rule.keep == "magnitude":
        trim(x, rule.kept(density, x.shape[1]))
    elif density < 1 and rule.keep == "bernoulli":
        for row, (place, layer) in zip(x, ((place, layer) for place in places for layer in layers), strict=True):
            drop(row, mask(layer, place, side).flatten(), density)
    return combine(x.view(len(places), len(layers), -1), batch.weights, rule)


def _blame(batch: Batch, dtype: torch.dtype) -> None:
    """Raise AdapterError for a result that is not finite, with the adapter whose factor is not.

    Every step keeps NaN and Inf, so checking the results is enough to notice them.
    """
    for layer in batch.layers:
        for place, part in enumerate(layer.parts):
            check_finite(_factor(layer, place, batch.side), f"{part.adapter}: lora_{batch.side} of {layer.name}")
    names = ", ".join(layer.name for layer in batch.layers)
    raise AdapterError(f"lora_{batch.side} merged for {names} overflows {dtype}")


def trim(x: Tensor, k: int) -> None:
    """Zero all but the k largest magnitudes of each row of x [n, numel] in place; of equal ones the first stay."""
    if k == 0:
        x.mul_(0)
        return
    magnitude = x.abs()
    kth = _kth_largest(magnitude, k)
    keep = magnitude >= kth
    surplus = keep.sum(1) - k
    for row in surplus.nonzero().flatten().tolist():
        tied = (magnitude[row] == kth[row]).nonzero().flatten()
        keep[row, tied[len(tied) - int(surplus[row]) :]] = False
    x.mul_(_ones(keep, x))


def drop(x: Tensor, keep: Tensor, density: float) -> None:
    """x * keep / density in place, with PEFT's two roundings."""
    x.mul_(_ones(keep.to(x.device), x)).div_(density)


def _kth_largest(magnitude: Tensor, k: int) -> Tensor:
    """The k-th largest of each row: [n, 1] from [n, numel]. On a CPU numpy selects five times faster than torch."""
    place = magnitude.shape[1] - k
    if magnitude.device.type != "cpu":
        return magnitude.kthvalue(place + 1, dim=1, keepdim=True).values
    wide = magnitude if magnitude.dtype.itemsize >= 4 else magnitude.float()
    found = np.partition(wide.numpy(), place, axis=1)[:, place]
    return torch.from_numpy(found.copy()).to(magnitude.dtype)[:, None]


def combine(x: Tensor, weights: Sequence[float], rule: Rule) -> Tensor:
    """[G, numel] from kept task tensors [n, G, numel]."""
    weight = torch.tensor(weights, device=x.device)[:, None, None]
    if rule.elect == "none":
        return _sum(_times(x, weight))
    plus = _sum(x.sign() if rule.elect == "frequency" else x) >= 0
    sign = _ones(plus, x).mul_(2).sub_(1)
    x.mul_(sign).clamp_(min=0)  # what agrees is positive now, the rest is zero: exact, and faster than masks
    count = _sum(x.sign().float()).clamp_(min=1)
    return _sum(_times(x, weight)).mul_(sign).div_(count)


def _ones(mask: Tensor, like: Tensor) -> Tensor:
    """1 where mask, else 0, in the dtype of `like`; bytes are converted in an eighth of the time of bools."""
    return mask.view(torch.uint8).to(like.dtype)


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """x * weight, in place if the dtype stays the same."""
    return x.mul_(weight) if torch.result_type(x, weight) == x.dtype else x * weight


def _sum(x: Tensor) -> Tensor:
    """x.sum(0). torch adds more than `IN_ORDER` rows in an order that depends on the column: then every layer is summed
    by itself, as in PEFT."""
    return x.sum(0) if len(x) <= IN_ORDER else torch.stack([layer.sum(0) for layer in x.unbind(1)])


def _factor(layer: Layer, place: int, side: str) -> Tensor:
    part = layer.parts[place]
    return part.A if side == "A" else part.B


def _padded(tensor: Tensor, dim: int, missing: int) -> Tensor:
    """The tensor in storage of its own, with so many rows (dim 0) or columns (dim 1) of zeros appended."""
    if not missing and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    shape = list(tensor.shape)
    shape[dim] += missing
    out = tensor.new_zeros(shape) if missing else tensor.new_empty(shape)
    out.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return out


_local = threading.local()


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """[len, numel]; on a CPU in a buffer of this thread, since new memory would cost more time than the arithmetic."""
    if tensors[0].device.type != "cpu":
        return torch.stack(tensors)  # type: ignore[arg-type]
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    size = len(tensors) * tensors[0].numel()
    buffers: dict[str, Tensor] = _local.__dict__
    buffer = buffers.get(str(dtype))
    if buffer is None or buffer.numel() < size:
        buffer = buffers[str(dtype)] = torch.empty(max(size, CPU_BATCH), dtype=dtype)
    return torch.stack(tensors, out=buffer[:size].view(len(tensors), -1))  # type: ignore[arg-type]
