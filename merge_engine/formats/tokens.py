"""Trained tokens (PEFT's ``trainable_token_indices``): rows of an embedding that an adapter has in place of the base's.

PEFT stores the rows themselves, not what was added to the base's: what a row changes is known beside the base only.
"""

from collections.abc import Sequence
from typing import Any

import torch

from merge_engine.errors import AdapterError, shown
from merge_engine.files.weights import StoredTensor
from merge_engine.formats.adapter import KEY_PREFIX, TOKENS, Adapter, short_name

LARGEST = 2**63  # of an index


def token_layer(key: str) -> str:
    """The layer whose rows a tensor holds."""
    return key.removeprefix(KEY_PREFIX).removesuffix(TOKENS)


def tokens_of(adapter: Adapter, key: str) -> list[int]:
    """The indices of the rows in a tensor of trained tokens, in its order.

    Raises AdapterError where the configuration does not name one index for each row.
    """
    given: Any = adapter.config.get("trainable_token_indices")
    stored, layer = adapter.extras[key], token_layer(key)
    if isinstance(given, dict):
        names = sorted((name for name in given if layer.endswith(name)), key=len)
        given = given[names[-1]] if names else None
    whole = isinstance(given, list) and all(type(token) is int and 0 <= token < LARGEST for token in given)
    if not whole or len(set(given)) != len(given) or len(stored.shape) != 2 or stored.shape[0] != len(given):
        raise AdapterError(
            f"{adapter.name}: {key} is {list(stored.shape)}, wanted a row for each of trainable_token_indices, "
            f"which are {shown(given)}"
        )
    return list(given)


def merged_tokens(adapters: Sequence[Adapter], key: str) -> list[int]:
    """The tokens of all adapters that have the tensor, in their order, each once."""
    having = [adapter for adapter in adapters if key in adapter.extras]
    return list(dict.fromkeys(token for adapter in having for token in tokens_of(adapter, key)))


def carried_tokens(adapters: Sequence[Adapter], saved: str | None = None) -> dict[str, StoredTensor]:
    """{key: rows [tokens, dim]} of what is carried over, in the order of `merged_tokens`.

    A row that only one adapter has, or that all have bit for bit, is taken as it is. Where rows differ: saved="first"
    takes that of the first adapter that has it, "average" their mean in float64, rounded once.

    Raises AdapterError: a row differs, and saved is None; or widths or dtypes differ.
    """
    keys = sorted({key for adapter in adapters for key in adapter.extras if key.endswith(TOKENS)})
    return {key: _one(key, [adapter for adapter in adapters if key in adapter.extras], saved) for key in keys}


def _one(key: str, having: Sequence[Adapter], saved: str | None) -> StoredTensor:
    first, stored = having[0].name, having[0].extras[key]
    rows: dict[int, list[tuple[str, torch.Tensor]]] = {}
    for adapter in having:
        own = adapter.extras[key]
        if (own.shape[1:], own.dtype) != (stored.shape[1:], stored.dtype):
            raise AdapterError(
                f"{key} differs: {first} has rows of {list(stored.shape[1:])} {short_name(stored.dtype)}, "
                f"{adapter.name} of {list(own.shape[1:])} {short_name(own.dtype)}; such tensors cannot be merged"
            )
        for token, row in zip(tokens_of(adapter, key), own.read(), strict=True):
            rows.setdefault(token, []).append((adapter.name, row))
    made = torch.stack([_row(key, token, owned, saved) for token, owned in rows.items()])
    return StoredTensor(key, stored.file, tuple(made.shape), stored.dtype, mapped=made)


def _row(key: str, token: int, owned: Sequence[tuple[str, torch.Tensor]], saved: str | None) -> torch.Tensor:
    (first, row), *others = owned
    different = [name for name, other in others if not torch.equal(_bits(other), _bits(row))]
    if not different or saved == "first":
        return row
    if saved is None:
        raise AdapterError(
            f"{key}: the row of token {token} differs between {first} and {different[0]}, and what they changed is not "
            "known without the base; wanted a merge --into BASE, or saved average or first"
        )
    return (torch.stack([other.double() for _, other in owned]).sum(0) / len(owned)).to(row.dtype)


def _bits(row: torch.Tensor) -> torch.Tensor:
    return row.contiguous().view(torch.uint8)


def token_settings(adapters: Sequence[Adapter], extras: Sequence[str]) -> Any:
    """trainable_token_indices of the merged adapter: a list as in the inputs, or a table by layer; None without any."""
    keys = [key for key in extras if key.endswith(TOKENS)]
    tables = any(isinstance(adapter.config.get("trainable_token_indices"), dict) for adapter in adapters)
    if len(keys) == 1 and not tables:
        return merged_tokens(adapters, keys[0])
    return {token_layer(key): merged_tokens(adapters, key) for key in keys} or None
