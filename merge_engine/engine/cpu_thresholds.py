"""What each task tensor keeps, on the CPU: a plan's densities become thresholds and random drops."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from merge_engine.cpu.keep import Band, Drop, KeepTile, Trim
from merge_engine.cpu.merge import l1_factor
from merge_engine.cpu.select import trims_of_each
from merge_engine.cpu.source import Product, Source
from merge_engine.engine.backend import Group, Known
from merge_engine.rules.philox import stream_id


class Threshold(NamedTuple):
    """A trim before its threshold is known: the k largest magnitudes stay."""

    k: int
    ties: str


class Between(NamedTuple):
    """A band before its thresholds are known: what `wide` keeps and `top` does not."""

    wide: Threshold
    top: Threshold


class Rescaled(NamedTuple):
    """A drop before its factor is known: the L1 norm before it over that after it."""

    drop: Drop


Wanted = Threshold | Between | Rescaled | KeepTile


def find_keeps(groups: Sequence[Group], known: Sequence[Known]) -> list[tuple[KeepTile, ...]]:
    """What every group keeps of each task tensor.

    groups: one module of the same adapters, in one plan or several. known: for each adapter what was found before, by
    what was wanted; what is found now is added. New thresholds are found together, several in one sweep.
    """
    sources: Sequence[Source] = groups[0].packed
    wanted = [[_wanted(group, place) for place in range(len(sources))] for group in groups]
    for ties in ("exact", "keep"):
        new = [
            list(dict.fromkeys(one for each in column for one in _thresholds(each, ties) if one not in found))
            for column, found in zip(zip(*wanted, strict=True), known, strict=True)
        ]
        trims = trims_of_each(sources, [[each.k for each in column] for column in new], ties)
        for found, column, own in zip(known, new, trims, strict=True):
            found.update(zip(column, own, strict=True))
    return [tuple(map(_found, row, sources, known)) for row in wanted]


def only_thresholds(group: Group) -> tuple[list[int], str] | None:
    """(k of each adapter, how ties are taken) where all of a group's products are trimmed to their k largest."""
    wanted = [_wanted(group, place) for place in range(len(group.packed))]
    thresholds = [each for each in wanted if isinstance(each, Threshold)]
    if len(thresholds) < len(wanted) or not all(isinstance(source, Product) for source in group.packed):
        return None
    return [each.k for each in thresholds], group.plan.rule.trim_ties


def _wanted(group: Group, place: int) -> Wanted:
    keep = group.plan.rule.keep
    if keep not in _KEEPS:
        raise ValueError(f"the CPU backend has no keep {keep!r}")
    return _KEEPS[keep](group, place)


def _all(group: Group, place: int) -> Wanted:
    return None


def _magnitude(group: Group, place: int) -> Wanted:
    (module,), plan = group.modules, group.plan
    density = module.densities[place]
    if density >= 1:
        return None
    if plan.spans_model:
        trim: Trim = group.trims[module.name, module.adapters[place]]
        return trim
    source = group.packed[place]
    return Threshold(plan.rule.kept(density, source.rows * source.columns), plan.rule.trim_ties)


def _band(group: Group, place: int) -> Wanted:
    (module,), rule, source = group.modules, group.plan.rule, group.packed[place]
    density, numel = module.densities[place], source.rows * source.columns
    top = rule.topped(density, numel)
    if top == 0:
        return _magnitude(group, place)
    return Between(Threshold(top + rule.kept(density, numel), rule.trim_ties), Threshold(top, rule.trim_ties))


def _bernoulli(group: Group, place: int) -> Wanted:
    (module,), plan = group.modules, group.plan
    density = module.densities[place]
    if density >= 1:
        return None
    drop = Drop(density, plan.recipe.seed, stream_id(module.name, group.side), module.adapters[place])
    return Rescaled(drop) if plan.rule.l1_rescale else drop


_KEEPS: dict[str, Callable[[Group, int], Wanted]] = {
    "all": _all,
    "magnitude": _magnitude,
    "band": _band,
    "bernoulli": _bernoulli,
}


def _thresholds(wanted: Wanted, ties: str) -> list[Threshold]:
    """What a sweep has to find for it, with equal magnitudes taken so."""
    own = wanted if isinstance(wanted, Between) else [wanted]
    return [each for each in own if isinstance(each, Threshold) and each.ties == ties]


def _found(wanted: Wanted, source: Source, known: Known) -> KeepTile:
    if isinstance(wanted, Rescaled) and wanted not in known:
        known[wanted] = replace(wanted.drop, factor=l1_factor(source, wanted.drop))
    if isinstance(wanted, Between):
        return Band(known[wanted.wide], known[wanted.top])
    keep: KeepTile = known[wanted] if isinstance(wanted, Threshold | Rescaled) else wanted
    return keep
