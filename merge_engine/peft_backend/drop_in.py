"""A drop-in for PEFT's ``add_weighted_adapter``: fast, exact, and either done or not begun.

import merge_engine.peft_backend

merge_engine.peft_backend.enable()
model.add_weighted_adapter(["sql", "chat", "ads"], [2, 1, 1], "merged", combination_type="ties", density=0.2)

Source: `peft.tuners.lora.LoraModel.add_weighted_adapter` of PEFT 0.19 to 0.21.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from merge_engine.peft_backend.deltas import merge_deltas
from merge_engine.peft_backend.factors import merge_factors, philox_mask, stack_factors
from merge_engine.peft_backend.layers import Layer, LayerFactors, find_layers, install, merged_config
from merge_engine.peft_backend.request import MergeRequest, check_request
from merge_engine.peft_backend.torch_masks import draw_factor_masks, draw_injection, torch_stream

_METHOD = "add_weighted_adapter"


def enable() -> None:
    """Let ``add_weighted_adapter`` of every PEFT LoRA model be ours. Calling it again changes nothing."""
    _state.hold(enabled=True)


def disable() -> None:
    """Give PEFT its own method back, unless a ``with enabled():`` is still open. Calling it again changes nothing."""
    _state.hold(enabled=False)


@contextmanager
def enabled() -> Iterator[None]:
    """Ours inside the block, in all threads; afterwards as it was. Blocks may nest and overlap between threads."""
    _state.hold(blocks=1)
    try:
        yield
    finally:
        _state.hold(blocks=-1)


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
    rng: str = "philox",
    svd: str = "subspace",
    backend: str | None = None,
) -> None:
    """Add to a PEFT LoRA model the adapter ``adapter_name``, merged from ``adapters``, as PEFT's method does.

    X in space of factors: A = X(sign(w_i) sqrt|w_i|, A_i), B = X(sqrt|w_i|, B_i), w_i = weight_i * scaling_i;
    X_svd and svd: B A = the best approximation of rank ``svd_rank`` of X(weight_i, scaling_i B_i A_i);
    cat: A = all weight_i scaling_i A_i stacked, B = all B_i side by side.

    model: a PeftModel or its LoraModel. The arguments up to ``majority_sign_method`` are PEFT's. The factors of ``X``
    equal PEFT's bit for bit in float32 (but for equal magnitudes at a trim's threshold); an svd type is at least as
    near to the merged delta as PEFT's. If ``adapter_name`` exists nothing is done, and one adapter is always "linear".

    svd_full_matrices: has no effect. svd_driver: has one only with svd="exact" on a CUDA device.
    seed: of DARE's drops. None: drawn from torch's global stream, so that torch.manual_seed decides.
    rng: "philox": a mask depends on seed, layer, adapter and element only; "torch": PEFT's own stream, drawn in its
        order, the same masks on a CPU. With a seed, as after torch.manual_seed(seed), and the global stream stays put.
    svd: how a dense merged delta is cut: "subspace", to a relative excess of 1e-5 of the squared error, or "exact", by
        a dense SVD, up to 300 times slower. ``combination_type="svd"`` is exact and fast either way.
    backend: who merges deltas: "triton", "torch" or "auto" (see `ops.choose`). LayerFactors are merged by torch's
        operators where they are.

    The new weights are contiguous, of their own storage, in the dtype and on the device of the first adapter's A that a
    layer has; layers of a smaller rank are filled up with zeros, so that the saved adapter loads everywhere. It is not
    active and not trainable, and nothing else of the model changes. After an error the model is as it was.
    Memory beside the result: for factors and cat a few MiB; for svd types the factors in float32 and the merged deltas
    of at most `engine.MAX_RECOMPRESSIONS` + 2 layers; with rng="torch" a byte an element and adapter for the masks.

    Raises what PEFT raises where it checks (ValueError, TypeError, RuntimeError, in its words); MergeError, a
    ValueError, for what it gets wrong: adapters with DoRA, lora_bias, trained biases, modules_to_save or trained
    tokens, NaN and Inf, density 0 for DARE, fewer or more weights than adapters, unequal ranks within a layer.
    """
    tuner = _lora_model(model)
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
        config = merged_config(tuner, request.adapters, request.rank, layers, names)
        with torch_stream(seed) if rng == "torch" and request.drops else nullcontext():
            if rng == "torch" and request.drops:
                draw_injection(tuner, adapter_name, request.adapters[0], request.rank, layers)
            merged = _merge(layers, request)
        install(tuner, adapter_name, config, layers, merged)


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


def _lora_model(model: Any) -> Any:
    from peft import PeftModel
    from peft.tuners.lora import LoraModel

    tuner = model.base_model if isinstance(model, PeftModel) else model
    overridden = getattr(type(tuner), _METHOD, None) is not getattr(LoraModel, _METHOD)
    if not isinstance(tuner, LoraModel) or overridden:
        raise TypeError(f"{type(tuner).__name__} does not support add_weighted_adapter method.")
    return tuner


class _State:
    """Whether PEFT's method is replaced: while it is enabled, or a block is open."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.enabled = False
        self.blocks = 0
        self.stock: Callable[..., Any] | None = None

    def hold(self, *, enabled: bool | None = None, blocks: int = 0) -> None:
        from peft.tuners.lora import LoraModel

        with self.lock:
            self.enabled = self.enabled if enabled is None else enabled
            self.blocks += blocks
            wanted = self.enabled or self.blocks > 0
            if wanted and self.stock is None:
                self.stock = LoraModel.add_weighted_adapter
                setattr(LoraModel, _METHOD, add_weighted_adapter)
            elif not wanted and self.stock is not None:
                setattr(LoraModel, _METHOD, self.stock)
                self.stock = None


_state = _State()
