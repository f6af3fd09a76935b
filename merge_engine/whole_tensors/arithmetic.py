"""Sums of models, and base + lambda * combine(w_i keep(x_i - base)): task arithmetic, TIES, DARE, Breadcrumbs, DELLA.

Source: the papers named in `rules.rule`; DELLA: Deep, Bhardwaj and Poria 2024 (arXiv:2406.11617).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_engine.cpu.keep import Band, Drop, Keep
from merge_engine.cpu.mask import random_words
from merge_engine.cpu.merge import l1_factor, merge_deltas
from merge_engine.cpu.select import trims_of_each
from merge_engine.cpu.source import Difference, filled, for_each_tile
from merge_engine.cpu.tile_grid import Tile
from merge_engine.errors import RecipeError
from merge_engine.rules.philox import stream_id
from merge_engine.rules.rule import Rule
from merge_engine.runtime.memory import scratch
from merge_engine.whole_tensors.group import Group, combination, differences, sweep
from merge_engine.whole_tensors.ranks import chances_of_ranks, keep_by_rank

TINY = 1e-8  # sums of weights below this are not divided by
NO_SUM = "wanted other weights, or normalize: false"  # what to do there
_TINY_NORM = 1e-7  # below this mergekit does not rescale


def linear(group: Group) -> None:
    """sum_i w_i x_i, divided by sum_i w_i with normalize. Raises RecipeError where that is 0."""
    weights = list(group.options["weight"])
    if group.options["normalize"]:
        total = math.fsum(weights)
        if abs(total) < TINY:
            raise RecipeError(f"weight: linear divides by their sum, got 0 for {group.name}; {NO_SUM}")
        weights = [weight / total for weight in weights]
    combination(group, weights)


def passthrough(group: Group) -> None:
    """x, or scale * x."""
    (scale,) = group.options["scale"]
    combination(group, [1.0 if scale is None else scale])


def task_arithmetic(group: Group) -> None:
    _arithmetic(group, _all, elects=False)


def ties(group: Group) -> None:
    _arithmetic(group, _trim, elects=True)


def dare_linear(group: Group) -> None:
    _arithmetic(group, _drop, elects=False)


def dare_ties(group: Group) -> None:
    _arithmetic(group, _drop, elects=True)


def breadcrumbs(group: Group) -> None:
    _arithmetic(group, _band, elects=False)


def breadcrumbs_ties(group: Group) -> None:
    _arithmetic(group, _band, elects=True)


def della(group: Group) -> None:
    _arithmetic(group, _magnitude_drop, elects=True)


def della_linear(group: Group) -> None:
    _arithmetic(group, _magnitude_drop, elects=False)


@dataclass(frozen=True)
class Masked:
    """Keep where the mask is, and multiply by factor."""

    mask: Tensor  # bool, or factors of their own [rows, columns]
    factor: float = 1.0

    def apply(self, values: Tensor, tile: Tile) -> Tensor:
        mask = self.mask[tile.top : tile.bottom, tile.left : tile.right]
        values.mul_(scratch("chosen", values.shape).copy_(mask))  # as floats: half the time
        return values if self.factor == 1 else values.mul_(self.factor)


@dataclass(frozen=True)
class Scaled:
    """What another keep keeps, times factor; None keeps nothing."""

    keep: Keep | None
    factor: float = 1.0

    def apply(self, values: Tensor, tile: Tile) -> Tensor:
        return values.zero_() if self.keep is None else self.keep.apply(values, tile).mul_(self.factor)


Find = Callable[[Group, int, Difference], Keep | None]


def _arithmetic(group: Group, find: Find, *, elects: bool) -> None:
    """base + lambda * sum of w_i keep(x_i - base) [of the elected sign] / divisor; see `cpu.merge.merge_deltas`.

    normalize: divided by the sum of the weights, of those that agree where a sign is elected; 1 where it is 0.
    """
    options = group.options
    assert group.base is not None
    matrices = [group.rows_of(tensor) for tensor in group.tensors]
    base = group.rows_of(group.base)
    sources = [Difference(matrix, base) for matrix in matrices]
    keeps = [find(group, i, source) for i, source in enumerate(sources)]
    weights, scale = list(options["weight"]), options["lambda"]
    if options["normalize"] and not elects:
        total = math.fsum(weights)
        scale = scale / total if abs(total) >= TINY else scale
    rule = Rule(
        keep="all",
        elect="total" if elects else "none",
        combine="sum",
        divisor="weight" if elects and options["normalize"] else "one",
        vote_weighted=True,
        scope="tensor",
        trim_ties="exact",
        min_k=0,
        extra_k=0,
        majority=False,
        l1_rescale=False,
    )
    merge_deltas(sources, weights, keeps, rule, scale=scale, base=base, out=group.rows_of(group.out))


def _all(group: Group, number: int, source: Difference) -> Keep | None:
    return None


def _trim(group: Group, number: int, source: Difference) -> Keep | None:
    """The k = int(density n) largest magnitudes; at least one, in mergekit's convention; of equal ones the first."""
    density, count = group.options["density"][number], source.rows * source.columns
    if density >= 1 or not count:
        return None
    k = int(density * count)
    if density > 0 and not group.published:
        k = max(1, k)
    if k == 0:
        return Scaled(None)
    return _rescaled(group, source, trims_of_each([source], [[k]], "exact")[0][0])


def _band(group: Group, number: int, source: Difference) -> Keep | None:
    """Without the int(gamma n) largest, the int(density n) largest of the rest; fewer are dropped to keep so many."""
    density, gamma = group.options["density"][number], group.options["gamma"][number]
    count = source.rows * source.columns
    if density >= 1 or not count:
        return None
    k = int(density * count)
    top = min(int(gamma * count), count - k)
    if k == 0:
        return Scaled(None)
    if top == 0:
        return _rescaled(group, source, trims_of_each([source], [[k]], "exact")[0][0])
    dropped, wide = trims_of_each([source], [[top, top + k]], "exact")[0]
    return _rescaled(group, source, Band(wide, dropped))


def _drop(group: Group, number: int, source: Difference) -> Keep | None:
    """Each element with probability density; rescaled by 1/density, in mergekit's convention to the L1 norm."""
    density = group.options["density"][number]
    if density >= 1:
        return None
    if round(density * 2**32) == 0:
        return Scaled(None)
    drop = Drop(density, group.seed, stream_id(_module(group), "delta"), number, 1.0)
    if not group.options["rescale"]:
        return drop
    factor = 1 / density if group.published else l1_factor(source, drop)
    return Drop(drop.density, drop.seed, drop.stream, number, factor)


def _magnitude_drop(group: Group, number: int, source: Difference) -> Keep | None:
    """Each element of a row with p = density - epsilon + 2 epsilon rank / (N - 1), by the rank of its magnitude.

    Rescaled by 1/p, in mergekit's convention to the L1 norm of the whole tensor. Of equal magnitudes the first has the
    lower rank. Raises RecipeError where density - epsilon or density + epsilon are not between 0 and 1.
    """
    density, epsilon = group.options["density"][number], group.options["epsilon"][number]
    if density >= 1:
        return None
    if density <= 0:
        return Scaled(None)
    if density + epsilon >= 1 or density - epsilon <= 0:
        raise RecipeError(
            f"epsilon: wanted density - epsilon and density + epsilon between 0 and 1, got density {density:g} "
            f"and epsilon {epsilon:g} for {group.name}"
        )
    shape = (source.rows, source.columns)
    mask = torch.empty(shape, dtype=torch.bool)
    factors = torch.empty(shape) if group.options["rescale"] and group.published else None
    stream, chances = stream_id(_module(group), "delta"), chances_of_ranks(source.columns, density, epsilon)

    def draw(part: slice) -> tuple[float, float]:
        (values,) = differences([source.x], part, source.base)
        words = random_words(
            seed=group.seed, stream=stream, adapter=number, rows=part, columns=slice(0, source.columns)
        )
        wide = scratch("float64", values.shape, torch.float64)
        before = float(wide.copy_(values.abs_()).sum())
        keep_by_rank(values, words, chances, mask[part], None if factors is None else factors[part])
        return before, float(wide.copy_(values).sum())

    sums = sweep(shape, draw)
    if factors is not None:
        return Masked(factors)
    before, after = (sum(each) for each in zip(*sums, strict=True))
    if not group.options["rescale"] or min(before, after) < _TINY_NORM:
        return Masked(mask)
    return Masked(mask, before / after)


def _rescaled(group: Group, source: Difference, keep: Keep) -> Keep:
    """The keep, rescaled to the tensor's L1 norm where the recipe says so; no rescale of norms below 1e-7."""
    if not group.options["rescale"]:
        return keep

    def norms(tile: Tile) -> tuple[float, float]:
        values = filled(source, tile)
        before = values.abs().sum().item()
        return before, keep.apply(values, tile).abs().sum().item()

    before, after = (sum(each) for each in zip(*for_each_tile(source, norms), strict=True))
    return keep if min(before, after) < _TINY_NORM else Scaled(keep, before / after)


def _module(group: Group) -> str:
    return group.name.removesuffix(".weight")
