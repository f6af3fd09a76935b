"""A drop-in for PEFT's ``add_weighted_adapter``: fast, exact, and a failed call leaves your model unchanged.

import merge_engine.peft_backend

merge_engine.peft_backend.enable()
model.add_weighted_adapter(["sql", "chat", "ads"], [2, 1, 1], "merged", combination_type="ties", density=0.2)

Source: `peft.tuners.lora.LoraModel.add_weighted_adapter` of PEFT 0.19 to 0.21.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from merge_engine.peft_backend.deltas import merge_deltas
from merge_engine.peft_backend.factors import merge_factors, philox_mask, stack_factors
from merge_engine.peft_backend.layers import (
    Layer,
    LayerFactors,
    find_layers,
    install,
    merged_config,
    needed_rank,
    remove,
)
from merge_engine.peft_backend.request import MergeRequest, check_request
from merge_engine.peft_backend.saved import find_saved
from merge_engine.peft_backend.torch_masks import draw_factor_masks, draw_injection, torch_stream
from merge_engine.peft_backend.tuner import tuner_of


def add_weighted_adapter(
    model: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    *,
    seed: int | None = None,
    rng: str = "torch",
    svd: str = "subspace",
    backend: str | None = None,
) -> None:
    """Add to a PEFT LoRA model the adapter ``adapter_name``, merged from ``adapters``, as PEFT's method does.

    A factor type X: A = X(sign(w_i) sqrt|w_i|, A_i), B = X(sqrt|w_i|, B_i), w_i = weight_i * scaling_i;
    X_svd and svd: B A = the best approximation of rank ``svd_rank`` of X(weight_i, scaling_i B_i A_i);
    cat: A = all weight_i scaling_i A_i stacked, B = all B_i side by side.

    model: a PeftModel, its LoraModel, or a model with LoRA adapters but without PeftModel, such as transformers' and
    diffusers' after ``add_adapter``. The arguments up to ``majority_sign_method`` are PEFT's. The factors of a type
    X equal PEFT's bit for bit in float32 (except among equal magnitudes at a trim's threshold). An svd type is at least
    as near to the merged delta as PEFT's. If ``adapter_name`` exists, nothing is done. One adapter is always "linear".

    svd_full_matrices: has no effect. svd_driver: has an effect only with svd="exact" on a CUDA device.
    svd_clamp: the limit is a quantile of the factors' signed values, so it depends on the sign of each singular vector,
        which no SVD defines. Deltas are then cut by the dense SVD that PEFT calls, and the result is PEFT's, but where
        singular values are equal, or ``svd_rank`` is above the merged delta's rank: there the vectors are any.
    rng: of DARE's drops. "torch": masks from torch's global stream in PEFT's order, which after torch.manual_seed
        are PEFT's. "philox": a mask depends on seed, layer, adapter and element only, and is the same on every device.
    seed: of DARE's drops. None: what torch.manual_seed has set decides. A number: with rng="torch" as after
        torch.manual_seed(seed), and then the global stream is left as it was.
    svd: how a dense merged delta is cut: "subspace", whose squared error exceeds the best by at most 1e-5 of it, or
        "exact", by a dense SVD, up to 300 times slower. ``combination_type="svd"`` is exact and fast with either.
    backend: merges deltas: "triton", "torch" or "auto" (see `engine.choose_backend`). Factors are merged by torch's
        operators on the device where they are.

    The new weights are contiguous, have their own storage, and are in the dtype and on the device of the A of the first
    adapter that a layer has. Layers of a smaller rank are filled up with zeros, so that the saved adapter loads
    everywhere. Layers that one adapter saves whole are carried over, and trained tokens merged: see
    `peft_backend.saved`. The new adapter is neither active nor trainable, and nothing else in the model changes. After
    an error the model is as it was.
    Memory beside the result: for factor types and cat a few MiB; for svd types the factors in float32 and the merged
    deltas of at most `engine.cut.MAX_RECOMPRESSIONS` + 2 layers; with rng="torch" also a byte for each element of each
    adapter, for the masks.

    Raises what PEFT raises for errors that PEFT finds (ValueError, TypeError, RuntimeError, in PEFT's words). Raises
    MergeError, a ValueError, where PEFT's result would be wrong: adapters with DoRA, lora_bias, trained biases,
    different invocation tokens or replications, NaN and Inf, factors on the meta device, density 0 for DARE, fewer or
    more weights than adapters, unequal ranks within a layer.
    """
    tuner = tuner_of(model)
    if adapter_name in tuner.peft_config:
        return
    draws = seed is None and rng == "philox" and str(combination_type).startswith("dare")
    request = check_request(
        tuner,
        adapters,
        weights,
        combination_type,
        svd_rank=svd_rank,
        svd_clamp=svd_clamp,
        svd_driver=svd_driver,
        density=density,
        majority_sign_method=majority_sign_method,
        seed=int(torch.randint(2**62, ()).item()) if draws else seed or 0,
        rng=rng,
        svd=svd,
        backend=backend,
    )
    with torch.no_grad():
        layers, names = find_layers(tuner.model, request.adapters)
        saved = find_saved(tuner.model, request.adapters)
        configured = request.rank
        request = replace(request, rank=max(configured, needed_rank(layers, request.recipe)))
        settings = saved.settings([tuner.peft_config[adapter] for adapter in request.adapters])
        config = merged_config(tuner, request.adapters, request.rank, layers, names, settings)
        with torch_stream(seed) if rng == "torch" and request.drops else nullcontext():
            if rng == "torch" and request.drops:
                draw_injection(tuner, adapter_name, request.adapters[0], configured, layers)
            merged = _merge(layers, request)
            rows = saved.merge(request)
        try:
            tuner.peft_config[adapter_name] = config
            install(config, adapter_name, layers, merged)
            saved.install(adapter_name, rows)
        except BaseException:
            tuner.peft_config.pop(adapter_name, None)
            saved.remove(adapter_name)
            for layer in layers:
                remove(layer, adapter_name)
            raise


def _merge(layers: Sequence[Layer], request: MergeRequest) -> list[LayerFactors]:
    recipe, density = request.recipe, request.density
    if recipe.method == "cat":
        return stack_factors(layers, request.weights, request.rank)
    if recipe.space == "delta":
        return merge_deltas(layers, request)
    if request.rng == "torch" and request.drops:
        mask = draw_factor_masks(layers, density)
    else:
        mask = philox_mask(density, recipe.seed)
    return merge_factors(layers, request.weights, recipe.rule(), density, request.rank, mask)
