"""PEFT's svd types on live factors: the engine merges the deltas tile by tile and cuts them to a rank.

In memory are the merged deltas of one layer, or of as many layers as the engine cuts at once, and no adapter's delta.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from merge_engine.engine.backend import Backend
from merge_engine.engine.choose_backend import choose
from merge_engine.engine.cut import recompress
from merge_engine.engine.merge import merged_modules
from merge_engine.engine.plan import Plan, make_plan
from merge_engine.engine.prepare import merge_groups, prepare
from merge_engine.errors import AdapterError
from merge_engine.lowrank.small_svd import LowRank
from merge_engine.peft_backend.layers import Layer, LayerFactors, Part, check_finite, live_adapters
from merge_engine.peft_backend.request import MergeRequest
from merge_engine.peft_backend.torch_masks import TorchStreamBackend

Cut = Generator[tuple[str, LowRank], None, None]


def merge_deltas(layers: Sequence[Layer], request: MergeRequest) -> list[LayerFactors]:
    """(A [rank, ...], B [M, rank, ...]) of each layer, in the dtype and on the device of its first adapter's A.

    Ranks above min(M, N), or above that of the merged delta, are filled up with zeros. Raises AdapterError for a
    grouped convolution, whose delta is not a product of two matrices, and for NaN and Inf.
    """
    for layer in layers:
        if layer.grouped:
            raise AdapterError(f"{layer.name} is a grouped convolution, whose delta is not a product of two matrices")
    plan = make_plan(live_adapters(request.adapters, layers), request.recipe)
    backend = choose(request.backend)
    if request.rng == "torch" and request.drops:
        stream = TorchStreamBackend(layers, request.density)
        plan, backend = stream.prepared(plan), stream
    of = {layer.name: layer for layer in layers}
    cut = _exactly_cut(plan, backend, request, of) if request.exact else _cut(plan, backend)
    with closing(cut) as modules:
        found = {name: _shaped(of[name], result, request) for name, result in modules}
    return [found[layer.name] for layer in layers]


def _cut(plan: Plan, backend: Backend) -> Cut:
    for name, result in merged_modules(plan, backend, False):
        yield name, result.factors


def _exactly_cut(plan: Plan, backend: Backend, request: MergeRequest, layers: Mapping[str, Layer]) -> Cut:
    """Cut merged deltas by a dense SVD; with svd="exact" sums of products as usual, with a clamp them too."""
    ready = prepare(plan, backend, lambda covered: None)
    for work in merge_groups(plan, backend, ready):
        if "delta" in work.merged:
            yield work.module.name, _cut_matrix(work.merged["delta"], work.module.rank, request)
        elif request.clamp is not None:
            deltas = [request.weights[part.number] * _delta(part) for part in layers[work.module.name].parts]
            yield work.module.name, _cut_matrix(torch.stack(deltas).sum(0), work.module.rank, request)
        else:
            module, result = recompress(plan, backend, work)
            yield module.name, result.factors


def _delta(part: Part) -> Tensor:
    return part.B.flatten(1).float() @ part.A.flatten(1).float() * part.scaling


def _cut_matrix(matrix: Tensor, rank: int, request: MergeRequest) -> LowRank:
    driver = request.driver if matrix.device.type == "cuda" else None
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False, driver=driver)
    squares = S.square()
    energy = float(squares[:rank].sum() / squares.sum()) if bool(squares.sum() > 0) else 1.0
    return LowRank(Vh[:rank], U[:, :rank] * S[:rank], energy)


def _shaped(layer: Layer, result: LowRank, request: MergeRequest) -> LayerFactors:
    """The result in the shape of the layer's factors, filled up to the rank with zeros."""
    first = layer.parts[0]
    A, B = result.A, result.B
    if request.clamp is not None:
        values = np.concatenate([B.flatten().cpu().numpy(), A.flatten().cpu().numpy()])
        top = float(np.quantile(values, request.clamp))
        A, B = A.clamp(-top, top), B.clamp(-top, top)
    rows = first.A.new_zeros(request.rank, *first.A.shape[1:])
    columns = first.B.new_zeros(first.B.shape[0], request.rank, *first.B.shape[2:], dtype=first.A.dtype)
    rows.flatten(1)[: len(A)] = A
    columns.flatten(1)[:, : len(A)] = B
    for side, tensor in (("A", rows), ("B", columns)):
        check_finite(tensor, f"lora_{side} of {layer.name} merged to {tensor.dtype}")
    return rows, columns
