"""What the kernels do with each task tensor: int32 ``terms`` [recipes, modules, adapters, TERMS], see `task_tile`."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import SMALL
from .source import Band, Drop, Keep, Source, Trim, check_tensor, on_device
from .task_tile import TERMS, THRESHOLD, TOP

AT_ONCE: tl.constexpr = tl.constexpr(128)  # rows of terms a program
SMALLEST: tl.constexpr = tl.constexpr(1)  # the bits of the smallest positive float32
ALL_ROWS: tl.constexpr = tl.constexpr(2147483647)

# What a random drop has for each task tensor, from the host: the words LIMIT to KEY1 of `task_tile`, and whether none
# stays.
WORDS: tl.constexpr = tl.constexpr(6)


def keep_name(keep: Keep) -> str:
    """The constexpr of a keep: "all", "magnitude", "band" or "bernoulli"."""
    return "all" if keep is None else _KEEP_NAMES[type(keep)]


_KEEP_NAMES: dict[type, str] = {Trim: "magnitude", Band: "band", Drop: "bernoulli"}


@triton.jit
def _put_trim(terms, value_ptr, row_ptr, column_ptr, slots, mask):
    """The first three words at terms = threshold, cut row and cut column.

    A threshold of 0 keeps every element that is not 0: those that are 0 add nothing and are never counted.
    """
    value = tl.load(value_ptr + slots, mask=mask, other=0.0).to(tl.int32, bitcast=True)
    row = tl.load(row_ptr + slots, mask=mask, other=0)
    tl.store(terms, tl.maximum(value, SMALLEST), mask=mask)
    tl.store(terms + 1, tl.where(value == 0, ALL_ROWS, row), mask=mask)
    tl.store(terms + 2, tl.load(column_ptr + slots, mask=mask, other=0), mask=mask)


# Trims and weights lie where the numbers of recipes, modules and adapters put them.
@triton.jit(
    do_not_specialize=["slots", "tensors", "adapters"],
    do_not_specialize_on_alignment=[
        "weights_ptr",
        "value_ptr",
        "row_ptr",
        "column_ptr",
        "top_value_ptr",
        "top_row_ptr",
        "top_column_ptr",
    ],
)
def _terms_kernel(
    terms_ptr,  # int32 [recipes, modules, adapters, TERMS]
    scaling_ptr,  # float32 [modules, adapters]
    weights_ptr,  # float32 [recipes, adapters]
    value_ptr,  # float32 [recipes, modules, adapters]: a trim, or the wide one of a band
    row_ptr,  # int32, likewise
    column_ptr,  # int32, likewise
    top_value_ptr,  # the other trim of a band
    top_row_ptr,
    top_column_ptr,
    words_ptr,  # int32 [recipes, modules, adapters, WORDS] of a random drop
    factor_ptr,  # float64 or float32 [recipes, modules, adapters]: what it multiplies by
    slots,  # recipes * modules * adapters
    tensors,  # modules * adapters
    adapters,
    KEEP: tl.constexpr,
):
    """terms = (gain, weight, what is kept): one row for each recipe, module and adapter."""
    slot = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    mask = slot < slots
    terms = terms_ptr + slot.to(tl.int64) * TERMS
    gain = tl.load(scaling_ptr + slot % tensors, mask=mask, other=0.0)
    weight = tl.load(weights_ptr + slot // tensors * adapters + slot % adapters, mask=mask, other=0.0)
    if (KEEP == "magnitude") | (KEEP == "band"):
        _put_trim(terms + THRESHOLD, value_ptr, row_ptr, column_ptr, slot, mask)
    if KEEP == "band":
        _put_trim(terms + TOP, top_value_ptr, top_row_ptr, top_column_ptr, slot, mask)
    if KEEP == "bernoulli":
        words = words_ptr + slot * WORDS
        for i in tl.static_range(5):
            tl.store(terms + 2 + i, tl.load(words + i, mask=mask, other=0), mask=mask)
        none_stays = tl.load(words + 5, mask=mask, other=0) == 1
        factor = tl.load(factor_ptr + slot, mask=mask, other=0.0).to(tl.float64)
        gain = (gain.to(tl.float64) * tl.where(none_stays, 0.0, factor)).to(tl.float32)
    tl.store(terms, gain.to(tl.int32, bitcast=True), mask=mask)
    tl.store(terms + 1, weight.to(tl.int32, bitcast=True), mask=mask)


def terms_of(source: Source, keep: Keep, weights: Tensor) -> Tensor:
    """The terms of a merge. weights: float32 [recipes, adapters] on the source's device, contiguous, of any shape."""
    modules, adapters, _, _ = source.shape
    device, shape = source.x.device, (weights.numel() // max(adapters, 1), modules, adapters)
    terms = torch.empty(*shape, TERMS.value, dtype=torch.int32, device=device)
    tensors = dict.fromkeys(
        (
            "value_ptr",
            "row_ptr",
            "column_ptr",
            "top_value_ptr",
            "top_row_ptr",
            "top_column_ptr",
            "words_ptr",
            "factor_ptr",
        )
    )
    if isinstance(keep, Trim):
        tensors |= _trim_tensors(keep, shape, device, "")
    elif isinstance(keep, Band):
        tensors |= _trim_tensors(keep.wide, shape, device, "") | _trim_tensors(keep.top, shape, device, "top_")
    elif isinstance(keep, Drop):
        tensors |= _drop_tensors(keep, shape, device)
    if terms.numel():
        slots = terms.numel() // TERMS.value
        with torch.cuda.device_of(terms):
            _terms_kernel[(triton.cdiv(slots, AT_ONCE.value),)](
                terms_ptr=terms,
                scaling_ptr=source.scaling.contiguous(),
                weights_ptr=weights,
                slots=slots,
                tensors=modules * adapters,
                adapters=adapters,
                KEEP=keep_name(keep),
                **tensors,
                **SMALL,
            )
    return terms


def _trim_tensors(trim: Trim, shape: tuple[int, ...], device: torch.device, prefix: str) -> dict[str, Tensor]:
    check_tensor("trim value", trim.value, shape, device, (torch.float32,), contiguous=False)
    check_tensor("trim row", trim.row, shape, device, (torch.int32,), contiguous=False)
    check_tensor("trim column", trim.column, shape, device, (torch.int32,), contiguous=False)
    names = ("value", "row", "column")
    return {f"{prefix}{name}_ptr": getattr(trim, name).contiguous() for name in names}


def _drop_tensors(drop: Drop, shape: tuple[int, int, int], device: torch.device) -> dict[str, Any]:
    recipes, modules, adapters = shape
    if drop.density.shape != shape or len(drop.seeds) != recipes:
        raise ValueError(
            f"drop has density {list(drop.density.shape)} and {len(drop.seeds)} seeds, wanted {list(shape)} and "
            f"{recipes}"
        )
    if drop.streams.shape != (modules,) or drop.adapters.shape != (adapters,):
        raise ValueError(
            f"drop has streams {list(drop.streams.shape)} and adapters {list(drop.adapters.shape)}, wanted "
            f"[{modules}] and [{adapters}]"
        )
    density = drop.density.double().cpu()
    if not bool(((density > 0) & (density <= 1)).all()):
        raise ValueError(f"drop has densities {density.unique().tolist()}, wanted 0 < density <= 1")
    if drop.factor is not None and drop.factor.shape != shape:
        raise ValueError(f"drop factor is {list(drop.factor.shape)}, wanted {list(shape)}")
    threshold = (density * 2.0**32).round().long()  # exact product, half to even: philox.keep_threshold
    words = torch.empty(*shape, WORDS.value, dtype=torch.int64)
    # The kernel keeps words up to a limit, so that a density of 1 fits 32 bits; a threshold of 0 keeps none.
    words[..., 0] = (threshold - 1).clamp_min(0)
    words[..., 1] = drop.streams.long().cpu()[:, None]
    words[..., 2] = drop.adapters.long().cpu()
    keys = torch.tensor([[seed & 0xFFFFFFFF, seed >> 32] for seed in drop.seeds], dtype=torch.int64)
    words[..., 3:5] = keys[:, None, None, :]
    words[..., 5] = threshold == 0
    factor = density.reciprocal() if drop.factor is None else drop.factor
    return {"words_ptr": on_device(_words(words), device), "factor_ptr": on_device(factor, device).contiguous()}


def _words(values: Tensor) -> Tensor:
    """int64 in [0, 2**32) -> int32 of the same bits."""
    return torch.where(values >= 2**31, values - 2**32, values).to(torch.int32)
