"""A drop-in for PEFT's ``add_weighted_adapter``: fast, exact, and a failed call leaves your model unchanged.

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
    """Replace ``add_weighted_adapter`` of all PEFT LoRA models by ours. Calling this again changes nothing."""
    _state.hold(enabled=True)


def disable() -> None:
    """Restore PEFT's own method, unless a ``with enabled():`` is still open. Calling this again changes nothing."""
    _state.hold(enabled=False)


@contextmanager
def enabled() -> Iterator[None]:
    """Replace the method inside the block, in all threads. Blocks may nest, and overlap between threads."""
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

    A factor type X: A = X(sign(w_i) sqrt|w_i|, A_i), B = X(sqrt|w_i|, B_i), w_i = weight_i * scaling_i;
    X_svd and svd: B A = the best approximation of rank ``svd_rank`` of X(weight_i, scaling_i B_i A_i);
    cat: A = all weight_i scaling_i A_i stacked, B = all B_i side by side.

    model: a PeftModel or its LoraModel. The arguments up to ``majority_sign_method`` are PEFT's. The factors of a type
    X equal PEFT's bit for bit in float32 (except among equal magnitudes at a trim's threshold). An svd type is at least
    as near to the merged delta as PEFT's. If ``adapter_name`` exists, nothing is done. One adapter is always "linear".

    svd_full_matrices: has no effect. svd_driver: has an effect only with svd="exact" on a CUDA device.
    seed: of DARE's drops. None: drawn from torch's global random stream, so that torch.manual_seed decides.
    rng: "philox": a mask depends on seed, layer, adapter and element only. "torch": masks from torch's stream in PEFT's
        order, which on a CPU are PEFT's masks; with a seed as after torch.manual_seed(seed), and then the global stream
        is left as it was.
    svd: how a dense merged delta is cut: "subspace", whose squared error exceeds the best by at most 1e-5 of it, or
        "exact", by a dense SVD, up to 300 times slower. ``combination_type="svd"`` is exact and fast with either.
    backend: merges deltas: "triton", "torch" or "auto" (see `engine.choose_backend`). Factors are merged by torch's
        operators on the device where they are.

    The new weights are contiguous, have their own storage, and are in the dtype and on the device of the A of the first
    adapter that a layer has. Layers of a smaller rank are filled up with zeros, so that the saved adapter loads
    everywhere. The new adapter is neither active nor trainable, and nothing else in the model changes. After an error
    the model is as it was.
    Memory beside the result: for factor types and cat a few MiB; for svd types the factors in float32 and the merged
    deltas of at most `engine.cut.MAX_RECOMPRESSIONS` + 2 layers; with rng="torch" also a byte for each element of each
    adapter, for the masks.

    Raises what PEFT raises for errors that PEFT finds (ValueError, TypeError, RuntimeError, in PEFT's words). Raises
    MergeError, a ValueError, where PEFT's result would be wrong: adapters with DoRA, lora_bias, trained biases,
    modules_to_save or trained tokens, NaN and Inf, density 0 for DARE, fewer or more weights than adapters, unequal
    ranks within a layer.
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
    """Whether PEFT's method is replaced: it is after `enable`, and while a block is open."""

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
