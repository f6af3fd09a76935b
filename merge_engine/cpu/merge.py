"""The torch backend: `reference`'s arithmetic, tile by tile, on the CPU, in memory that does not grow with adapters.

Selection and merge look at the same fixed tiles of the same sources (`tiles`); an output element is written once. What
is done with a tile is written twice: as operators of torch and numpy, and as compiled loops for where Numba is
installed. Of the same task tensors both make the same bits; the terms of a product are added in another order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from merge_engine.cpu.keep import Drop, KeepTile, MergeSpec, dropped
from merge_engine.cpu.merge_tile_by_loops import TileMerge, can_combine
from merge_engine.cpu.merge_tile_by_torch import kept, merge_tile, times
from merge_engine.cpu.source import Source, filled, for_each_tile
from merge_engine.cpu.tile_grid import Tile
from merge_engine.loops import door
from merge_engine.rules.rule import Rule
from merge_engine.runtime.memory import new_tensor, scratch


def merge_deltas(
    sources: Sequence[Source],
    weights: Sequence[float],
    keeps: Sequence[KeepTile],
    rule: Rule,
    *,
    scale: float = 1.0,
    tied: int = 1,
    base: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """(base +) scale * combine(w_i keep(t_i) where sign(keep(t_i)) is elected) [M, N]: one pass, one store an element.

    sources: task tensors of one shape. keeps: what stays of each (`trims`, `Drop`, or None for all).
    tied: the side that a column with a vote of 0 elects (+1, -1). base: [M, N] of any float dtype to add to.
    out: [M, N] of any float dtype and any strides to write into, by default new and float32; it may be `base` itself,
        if no source looks at it.
    Follows `reference.combine`; sums run in adapter order in float32, the base is added last, and the one rounding is
    the store into out.
    """
    if out is None:
        out = new_tensor((sources[0].rows, sources[0].columns))
    spec, merged, direct = MergeSpec(tuple(weights), tuple(keeps), rule, tied), out, _addressable(out) and base is None
    compiled = door.loops(out.shape[0] * out.shape[1] * len(sources))
    compiled_merge = TileMerge(sources, spec, [spec.weights]) if compiled and can_combine(rule) else None

    def merge(tile: Tile) -> None:
        view = merged[tile.top : tile.bottom, tile.left : tile.right]
        if compiled_merge is None:
            values = merge_tile(sources, spec, tile, scale)
        else:
            values = view if direct else scratch("merged", tile.shape)
            compiled_merge.into([values], tile, scale)
        if base is not None:
            under = base[tile.top : tile.bottom, tile.left : tile.right]
            values = under + values if base.dtype == torch.float64 else values.add_(under)
        if values is not view:
            view.copy_(values)

    for_each_tile(sources[0], merge)
    return merged


def _addressable(out: Tensor) -> bool:
    """Whether loops can write into it."""
    return out.dtype == torch.float32 and out.stride(1) == 1


def l1_norms(source: Source, drop: Drop) -> tuple[float, float]:
    """(sum |t|, sum |t| over what `drop` keeps), each tile summed in float32, tiles in float64 and in order."""

    def norms(tile: Tile) -> tuple[float, float]:
        values = filled(source, tile)
        before = values.abs().sum().item()
        return before, dropped(values, drop, tile).abs().sum().item()

    pairs = for_each_tile(source, norms)
    return sum(before for before, _ in pairs), sum(after for _, after in pairs)


def l1_factor(source: Source, drop: Drop) -> float:
    """|t|_1 / |keep(t)|_1, and 1 where either norm is below 1e-7 or everything is kept (mergekit's rescale)."""
    before, after = l1_norms(source, drop)
    return 1.0 if drop.density >= 1 or min(before, after) < 1e-7 else before / after


def vote_balance(sources: Sequence[Source], weights: Sequence[float], keeps: Sequence[KeepTile], rule: Rule) -> int:
    """How many columns vote + less how many vote -: its sign, over all modules, is the model's majority sign."""

    def balance(tile: Tile) -> int:
        votes = scratch("votes", tile.shape).zero_()
        for source, weight, keep in zip(sources, weights, keeps, strict=True):
            values = times(kept(source, keep, tile), weight if rule.vote_weighted else 1.0)
            votes.add_(values.sign_() if rule.elect == "frequency" else values)
        return int(votes.sign_().sum(dtype=torch.float64).item())

    return sum(for_each_tile(sources[0], balance))
