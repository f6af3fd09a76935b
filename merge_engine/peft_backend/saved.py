"""What adapters train beside their factors: whole layers (modules_to_save) and rows of embeddings (trained tokens).

A layer that one adapter has trained is carried over. Trained rows are merged as the factors are, and not cut:
row = base row + X(weight_i, trained row_i - base row), X the same keep, election and combination over each adapter's
rows as one task tensor. PEFT drops both: its merged adapter has copies of the base's layers and rows.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from merge_engine.cpu.mask import keep_mask
from merge_engine.peft_backend.factors import combine, drop, trim
from merge_engine.peft_backend.layers import check_finite, check_here
from merge_engine.peft_backend.request import MergeRequest
from merge_engine.rules.philox import stream_id


@dataclass
class TokenRows:
    """The trained rows of one embedding: of each adapter that has some, its number, tokens and rows [tokens, dim]."""

    name: str
    wrapper: Any
    parts: list[tuple[int, list[int], Tensor]]

    @property
    def tokens(self) -> list[int]:
        """The tokens of all, in the order of the adapters."""
        return list(dict.fromkeys(token for _, tokens, _ in self.parts for token in tokens))


@dataclass
class Saved:
    """What the adapters of a merge have beside their factors, and what comes of it."""

    modules: list[tuple[Any, str]] = field(default_factory=list)  # (wrapper, the adapter that has trained it)
    rows: list[TokenRows] = field(default_factory=list)
    tied: list[Any] = field(default_factory=list)  # wrappers of layers that share their rows with another one

    def merge(self, request: MergeRequest) -> list[tuple[Tensor, Tensor]]:
        """(merged rows, base rows) of each embedding. Raises AdapterError for NaN and Inf."""
        return [_merged_rows(rows, request) for rows in self.rows]

    def install(self, name: str, merged: Sequence[tuple[Tensor, Tensor]]) -> None:
        copies: dict[int, Any] = {}  # weights that layers share are shared by the copies too
        for wrapper, adapter in self.modules:
            wrapper._adapters.add(name)
            wrapper.modules_to_save[name] = copy.deepcopy(wrapper.modules_to_save[adapter], copies)
            wrapper.modules_to_save[name].requires_grad_(False)
            _renew_hook(wrapper, name)
        for rows, (trained, base) in zip(self.rows, merged, strict=True):
            layer = rows.wrapper.token_adapter
            rows.wrapper._adapters.add(name)
            layer.token_indices[name] = rows.tokens
            layer.trainable_tokens_delta[name] = nn.Parameter(trained, requires_grad=False)
            layer.trainable_tokens_original[name] = base
        for wrapper in self.tied:
            wrapper._adapters.add(name)

    def remove(self, name: str) -> None:
        """Remove an adapter, also one that is only partly there."""
        for wrapper, _ in self.modules:
            _discard(wrapper.modules_to_save, name)
            wrapper._adapters.discard(name)
        for rows in self.rows:
            layer = rows.wrapper.token_adapter
            for slots in (layer.token_indices, layer.trainable_tokens_delta, layer.trainable_tokens_original):
                _discard(slots, name)
            rows.wrapper._adapters.discard(name)
        for wrapper in self.tied:
            wrapper._adapters.discard(name)

    def settings(self, configs: Sequence[Any]) -> dict[str, Any]:
        """modules_to_save and trainable_token_indices of the merged adapter, whose tokens are in the rows' order."""
        modules = dict.fromkeys(module for config in configs for module in config.modules_to_save or ())
        given = [tokens for config in configs if (tokens := getattr(config, "trainable_token_indices", None))]
        indices: Any = {rows.name: rows.tokens for rows in self.rows} or None
        if len(self.rows) == 1 and not any(isinstance(tokens, dict) for tokens in given):
            indices = self.rows[0].tokens
        return {"modules_to_save": list(modules) or None, "trainable_token_indices": indices}


def find_saved(model: nn.Module, adapters: Sequence[str]) -> Saved:
    """What the adapters have trained beside their factors. At most one has trained a layer: PEFT's check says so.

    Raises AdapterError for rows without values, on the meta device.
    """
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    saved = Saved()
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            saved.modules += [(module, adapter) for adapter in adapters if adapter in module.modules_to_save]
        elif isinstance(module, TrainableTokensWrapper) and module._adapters & set(adapters):
            layer = module.token_adapter
            if layer.tied_adapter:
                saved.tied.append(module)
                continue
            trained = layer.trainable_tokens_delta
            parts = []
            for number, adapter in enumerate(adapters):
                if adapter in trained:
                    check_here(trained[adapter], f"{adapter}: the trained tokens of {name}")
                    parts.append((number, list(layer.token_indices[adapter]), trained[adapter].detach()))
            saved.rows.append(TokenRows(name, module, parts))
    return saved


def _merged_rows(rows: TokenRows, request: MergeRequest) -> tuple[Tensor, Tensor]:
    layer, rule, density = rows.wrapper.token_adapter, request.recipe.rule(), request.density
    place = {token: row for row, token in enumerate(rows.tokens)}
    first = rows.parts[0][2]
    base = first.new_empty(len(place), first.shape[1], dtype=torch.float32)
    shifts = first.new_zeros(len(rows.parts), *base.shape, dtype=torch.float32)
    for shift, (number, tokens, trained) in zip(shifts, rows.parts, strict=True):
        adapter = request.adapters[number]
        check_finite(trained, f"{adapter}: the trained tokens of {rows.name}")
        original = layer.trainable_tokens_original[adapter].float()
        where = [place[token] for token in tokens]
        base[where] = original
        kept = (trained.float() - original).flatten()
        if density < 1 and rule.keep == "magnitude":
            trim(kept[None], rule.kept(density, len(kept)))
        elif request.drops:
            drop(kept, _mask(rows.name, number, original.shape, request).flatten(), density)
        shift[where] = kept.view(original.shape)
    weights = [request.weights[number] for number, _, _ in rows.parts]
    if len(weights) == 1 and weights[0] == 1 and (rule.keep == "all" or density >= 1):
        return first.clone(), base.to(first.dtype)  # as it is, without a rounding
    merged = (base + combine(shifts.flatten(1)[:, None], weights, rule).view(base.shape)).to(first.dtype)
    check_finite(merged, f"the trained tokens of {rows.name} merged to {first.dtype}")
    return merged, base.to(first.dtype)


def _mask(name: str, number: int, shape: torch.Size, request: MergeRequest) -> Tensor:
    if request.rng == "torch":
        return torch.bernoulli(torch.full(shape, request.density)).bool()
    rows, columns = map(range, shape)
    stream = stream_id(name, "delta")
    return keep_mask(
        request.density, seed=request.recipe.seed, stream=stream, adapter=number, rows=rows, columns=columns
    )


def _discard(slots: Any, name: str) -> None:
    if name in slots:
        del slots[name]


def _renew_hook(wrapper: Any, name: str) -> None:
    """A copied layer calls its own hook of accelerate, as PEFT's copies do."""
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    module = wrapper.modules_to_save[name]
    if hasattr(module, "_hf_hook"):
        hook = wrapper._create_new_hook(module._hf_hook)
        remove_hook_from_module(module)
        add_hook_to_module(module, hook)
