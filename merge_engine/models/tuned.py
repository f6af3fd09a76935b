"""Adapters whose task tensors are known beside the base only: DoRA, and rows of trained tokens.

DoRA: ``W' = m (W + s B A) / |W + s B A|``, the norm over the inputs of each output, and W' - W is the task tensor.
Trained tokens: the rows themselves are stored, and row - base row is the task tensor: one of all the rows that the same
adapters train. An adapter that has not trained a token takes no part in its row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from merge_engine.errors import ModelError
from merge_engine.files.shards import Piece
from merge_engine.files.weights import StoredTensor
from merge_engine.formats.adapter import TOKENS, Adapter, Module
from merge_engine.formats.checkpoint import FLOATS, Checkpoint
from merge_engine.formats.tokens import token_layer, tokens_of
from merge_engine.models.experts import Pieces
from merge_engine.models.finetuned import Difference, Finetuned, read_finite
from merge_engine.models.saved import held_whole
from merge_engine.models.targets import Target
from merge_engine.runtime.threads import threads

Places = dict[str, tuple[str, int]]  # {key of a row: (the module that it is merged in, its place there)}


@dataclass(frozen=True)
class StackedRows(StoredTensor):
    """Rows [T, D] that are stored apart, as one tensor. The key is that of the first."""

    parts: tuple[StoredTensor, ...] = field(default=(), repr=False)

    def read(self) -> Tensor:
        """A new tensor. Raises as `StoredTensor.read` does."""
        return torch.cat([part.read() for part in self.parts])


@dataclass(frozen=True)
class TokenModule:
    """Tokens of one layer that the same adapters train.

    extra: the key of their rows in the adapters. target: their rows in the base, as one tensor.
    """

    name: str
    extra: str
    tokens: tuple[int, ...]
    target: Target
    adapters: tuple[Adapter, ...]


@dataclass(frozen=True)
class TokenModules:
    """All trained tokens of a merge. pieces: how the base's tensors are divided, so that each row is written alone."""

    modules: tuple[TokenModule, ...]
    places: Places
    pieces: Pieces


@dataclass(frozen=True, eq=False)
class TunedAdapter(Finetuned):
    """An adapter beside its base; see `models.finetuned.Finetuned`."""

    tokens: Mapping[str, StoredTensor] = field(default_factory=dict)  # rows, by module

    def difference(self, module: str, base: Tensor | None = None) -> Difference | tuple[Tensor, Tensor]:
        """See `Finetuned.difference`; factors where LoRA alone changes a module."""
        adapter = self.adapter
        assert adapter is not None
        if module not in self.tokens and module not in adapter.magnitudes:
            return adapter.factors(module)
        if base is None:
            target = self.targets[module]
            base = target.matrix(read_finite(target.stored, "the base"))
        if module in self.tokens:
            return Difference(self.tokens[module].read(), base)
        with threads(1):  # on several, products and sums have other last bits
            return Difference(self._dora(adapter, module, base), base)

    def _dora(self, adapter: Adapter, module: str, base: Tensor) -> Tensor:
        """m (W + s B A) / |W + s B A| [M, N] in float32."""
        A, B = (factor.read().flatten(1).float() for factor in adapter.pair(module))
        weight = torch.addmm(base.float(), B, A, alpha=adapter.modules[module].scaling)
        norms = torch.linalg.vector_norm(weight, dim=1)
        if not bool(norms.all()):
            row = int((norms == 0).nonzero()[0])
            raise ModelError(f"{adapter.name}: row {row} of {module} is 0 with its delta, which DoRA divides by")
        return weight.mul_((adapter.magnitudes[module].read().reshape(-1).float() / norms)[:, None])


def needs_its_base(adapter: Adapter) -> bool:
    """Whether an adapter's task tensors are known beside the base only."""
    return bool(adapter.magnitudes) or any(key.endswith(TOKENS) for key in adapter.extras)


def tuned(adapter: Adapter, targets: Mapping[str, Target], tokens: Sequence[TokenModule]) -> TunedAdapter:
    """The adapter beside its base. Raises AdapterError where it holds NaN or Inf."""
    adapter.check_finite()
    modules: dict[str, Module] = {
        name: replace(module, scaling=1.0) if name in adapter.magnitudes else module
        for name, module in adapter.modules.items()
    }
    rows: dict[str, StoredTensor] = {}
    for each in tokens:
        if adapter not in each.adapters:
            continue
        stored = adapter.extras[each.extra]
        places = {token: place for place, token in enumerate(tokens_of(adapter, each.extra))}
        parts = tuple(stored.rows(places[token], 1) for token in each.tokens)
        shape = (len(parts), stored.shape[1])
        rows[each.name] = StackedRows(stored.key, stored.file, shape, stored.dtype, parts=parts)
        modules[each.name] = Module(
            each.name, "tokens", *shape, shape[0], 1.0, shape, (shape[0], shape[0]), stored.dtype
        )
    seen = Checkpoint(adapter.name, adapter.source, adapter.path, {}, {})
    return TunedAdapter(seen, targets, modules, None, adapter, rows)


def token_modules(base: Checkpoint, adapters: Sequence[Adapter]) -> TokenModules:
    """The trained tokens of all adapters, grouped by the adapters that train them.

    Raises ModelError: the base lacks the layer or a row of it, rows have another width, or an adapter changes the layer
    in another way; AdapterError: as `tokens_of`.
    """
    modules: list[TokenModule] = []
    places: Places = {}
    pieces: Pieces = {}
    for extra in sorted({key for adapter in adapters for key in adapter.extras if key.endswith(TOKENS)}):
        layer = token_layer(extra)
        key = f"{layer}.weight"
        owners: dict[int, list[Adapter]] = {}
        for adapter in adapters:
            _check_layer(base, adapter, layer, extra, adapters)
            if extra in adapter.extras:
                for token in tokens_of(adapter, extra):
                    owners.setdefault(token, []).append(adapter)
        root = base.twins.get(key, key)
        family = [root, *(twin for twin, first in base.twins.items() if first == root)]
        for each in family:
            pieces[each] = _pieces(each, base.tensors[each].shape, sorted(owners))
        groups: dict[tuple[Adapter, ...], list[int]] = {}
        for token in sorted(owners):
            groups.setdefault(tuple(owners[token]), []).append(token)
        for number, (having, tokens) in enumerate(groups.items()):
            name = f"{layer}.trained_tokens" + (f".{number}" if number else "")
            stored = base.tensors[root]
            parts = tuple(replace(stored.rows(token, 1), key=_row_key(root, token)) for token in tokens)
            shape = (len(parts), stored.shape[1])
            rows = StackedRows(parts[0].key, stored.file, shape, stored.dtype, parts=parts)
            modules.append(TokenModule(name, extra, tuple(tokens), Target(rows, transposed=False), having))
            for each in family:
                places |= {_row_key(each, token): (name, place) for place, token in enumerate(tokens)}
    return TokenModules(tuple(modules), places, pieces)


def _check_layer(base: Checkpoint, adapter: Adapter, layer: str, extra: str, adapters: Sequence[Adapter]) -> None:
    key = f"{layer}.weight"
    if extra not in adapter.extras:
        trainer = next(other.name for other in adapters if extra in other.extras)
        if key in held_whole(adapter) or layer in adapter.modules:
            raise ModelError(
                f"{adapter.name} changes {layer}, and {trainer} trains tokens of it; wanted one of the two"
            )
        return
    if layer in adapter.modules:
        raise ModelError(f"{adapter.name}: {layer} is adapted, and has trained tokens; wanted one of the two")
    stored, rows = base.tensors.get(key), adapter.extras[extra].shape
    if stored is None or stored.dtype not in FLOATS or len(stored.shape) != 2:
        raise ModelError(f"{adapter.name}: wanted a floating-point matrix {key} in {base.name} for its trained tokens")
    largest = max(tokens_of(adapter, extra), default=0)
    if rows[1] != stored.shape[1] or largest >= stored.shape[0]:
        raise ModelError(
            f"{adapter.name}: it has rows of {rows[1]} for tokens up to {largest}, "
            f"wanted those of {list(stored.shape)} as {key} in {base.name}"
        )


def _row_key(key: str, token: int) -> str:
    return f"{key}[{token}]"


def _pieces(key: str, shape: tuple[int, ...], tokens: Sequence[int]) -> tuple[Piece, ...]:
    """Each of the tokens' rows by itself, and what is between them."""
    made: list[Piece] = []
    start = 0
    for token in [*tokens, shape[0]]:
        if token > start:
            made.append(Piece(f"{key}[{start}:{token}]", start, token - start, (token - start, *shape[1:])))
        if token < shape[0]:
            made.append(Piece(_row_key(key, token), token, 1, (1, *shape[1:])))
        start = token + 1
    return tuple(made)
