"""One tile of a merge, by operators of torch and numpy, where Numba is not installed.

The arithmetic is `reference`'s; sums run in the order of the adapters, in float32.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from merge_engine.cpu.keep import KeepTile, MergeSpec
from merge_engine.cpu.source import Source, filled
from merge_engine.cpu.tile_grid import Tile
from merge_engine.rules.rule import require
from merge_engine.runtime.memory import scratch


def merge_tile(sources: Sequence[Source], spec: MergeSpec, tile: Tile, scale: float) -> Tensor:
    """scale * combine(w_i keep(t_i) where sign(keep(t_i)) is elected), in this thread's scratch."""
    require(spec.rule, "a tile", combine=tuple(_COMBINES), elect=("none", "total", "frequency"))
    return _COMBINES[spec.rule.combine](sources, spec, tile, scale)


def kept(source: Source, keep: KeepTile, tile: Tile) -> Tensor:
    """The tile of keep(t), in this thread's scratch."""
    values = filled(source, tile)
    return values if keep is None else keep.apply(values, tile)


def _sum(sources: Sequence[Source], spec: MergeSpec, tile: Tile, scale: float) -> Tensor:
    require(spec.rule, "a tile", divisor=("count", "weight", "one"))
    return (_sum_tile if spec.rule.elect == "none" else _elect_tile)(sources, spec, tile, scale)


def _largest(sources: Sequence[Source], spec: MergeSpec, tile: Tile, scale: float) -> Tensor:
    """scale * the element of largest magnitude of the elected side, 0 where that is empty."""
    rule, shape = spec.rule, tile.shape
    require(rule, "a tile, for the largest,", vote_weighted=(True,), divisor=("one",), elect=("total", "frequency"))
    votes, part = scratch("votes", shape).zero_(), scratch("part", shape)
    sides = scratch("sums", (2, *shape)).zero_()
    for source, weight, keep in zip(sources, spec.weights, spec.keeps, strict=True):
        values = times(kept(source, keep, tile), weight)
        votes.add_(torch.sign(values, out=part) if rule.elect == "frequency" else values)
        torch.maximum(sides[0], values, out=sides[0])
        torch.minimum(sides[1], values, out=sides[1])
    return times(_elected(votes, sides, scratch("shares", (2, 0, 0)), spec.tied, part), scale)


def _consensus(sources: Sequence[Source], spec: MergeSpec, tile: Tile, scale: float) -> Tensor:
    """scale * S, S = sum_i w_i keep(t_i), where enough of the i have |w_i keep(t_i)| > mask |S - w_i keep(t_i)|.

    S comes first, so that every task tensor is looked at twice.
    """
    rule, shape = spec.rule, tile.shape
    require(rule, "a tile, for a consensus,", elect=("none",), divisor=("one",))
    total, count = _sum_tile(sources, spec, tile, 1.0), scratch("passes", shape, torch.int32).zero_()
    rest, mask = scratch("part", shape), scratch("mask", shape, torch.bool)
    for source, weight, keep in zip(sources, spec.weights, spec.keeps, strict=True):
        values = times(kept(source, keep, tile), weight)
        torch.sub(total, values, out=rest).abs_().mul_(rule.mask)
        count.add_(torch.gt(values.abs_(), rest, out=mask))
    return times(total.masked_fill_(torch.lt(count, rule.min_tasks, out=mask), 0.0), scale)


_COMBINES = {"sum": _sum, "max": _largest, "consensus": _consensus}


def _sum_tile(sources: Sequence[Source], spec: MergeSpec, tile: Tile, scale: float) -> Tensor:
    """scale * sum_i w_i keep(t_i), in this thread's scratch."""
    total = scratch("votes", tile.shape).zero_()
    for source, weight, keep in zip(sources, spec.weights, spec.keeps, strict=True):
        total.add_(times(kept(source, keep, tile), weight))
    return times(total, scale)


def _elect_tile(sources: Sequence[Source], spec: MergeSpec, tile: Tile, scale: float) -> Tensor:
    """scale * sum of the elected side / divisor, in this thread's scratch.

    Both sides are carried along, and one is chosen at the end.
    """
    rule, shape = spec.rule, tile.shape
    counter = torch.uint8 if rule.divisor == "count" and len(sources) < 256 else torch.float32
    votes = scratch("votes", shape).zero_()
    sums = scratch("sums", (2, *shape)).zero_()
    shares = scratch("shares", (2, 0, 0) if rule.divisor == "one" else (2, *shape), counter).zero_()
    for source, weight, keep in zip(sources, spec.weights, spec.keeps, strict=True):
        ballot, gain = (weight, 1.0) if rule.vote_weighted else (1.0, weight)
        share = weight if rule.divisor == "weight" else 1
        values = times(kept(source, keep, tile), ballot)
        _cast(values, gain, rule.elect == "frequency", share, votes, sums, shares)
    return times(_elected(votes, sums, shares, spec.tied, scratch("part", shape)), scale)


def _cast(
    values: Tensor, gain: float, by_sign: bool, share: float, votes: Tensor, sums: Tensor, shares: Tensor
) -> None:
    """votes += values, or their signs; sums[side] += gain * values and shares[side] += share, where these are on it."""
    part, mask = scratch("part", values.shape), scratch("mask", values.shape, torch.bool)
    votes.add_(torch.sign(values, out=part) if by_sign else values)
    for side, clamp, compare in ((0, torch.clamp_min, np.greater), (1, torch.clamp_max, np.less)):
        sums[side].add_(times(clamp(values, 0, out=part), gain))
        if shares.shape[1]:
            compare(values.numpy(), np.float32(0), out=mask.numpy())
            shares[side].add_(mask.view(torch.uint8), alpha=share)


def _elected(votes: Tensor, sums: Tensor, shares: Tensor, tied: int, out: Tensor) -> Tensor:
    """out = the sum of the side that is elected / its share, or 1 where that is 0."""
    mask = scratch("mask", votes.shape, torch.bool)
    elects_plus = np.greater_equal if tied > 0 else np.greater
    elects_plus(votes.numpy(), np.float32(0), out=mask.numpy())
    _chosen(mask, sums[0], sums[1], out)
    if shares.shape[1]:
        divisor = _chosen(mask, shares[0], shares[1], votes)
        out.div_(divisor.masked_fill_(divisor == 0, 1))
    return out


def times(values: Tensor, factor: float) -> Tensor:
    """values * factor in place."""
    return values if factor == 1 else values.mul_(factor)


def _chosen(mask: Tensor, yes: Tensor, no: Tensor, out: Tensor) -> Tensor:
    """out = yes where mask, else no, as float32: exact, since one of the two products is a zero."""
    chosen = scratch("chosen", mask.shape).copy_(mask.view(torch.uint8))
    torch.mul(yes, chosen, out=out)
    return out.add_(chosen.neg_().add_(1).mul_(no))
