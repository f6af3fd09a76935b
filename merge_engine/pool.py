"""Adapters that are merged many times: opened and checked once, and what their merges need alike is kept.

A pool binds recipes to plans, each for all of its adapters or some, and shares out a memory budget.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merge_engine import engine, jit, torch_backend
from merge_engine.adapter import Adapter, open_adapters
from merge_engine.cache import Cache
from merge_engine.compiled import HELD
from merge_engine.errors import RecipeError
from merge_engine.lowrank import Stack, first_space
from merge_engine.ops import Backend
from merge_engine.plan import ModulePlan, Plan, make_plan
from merge_engine.recipe import Recipe
from merge_engine.selection import trims_of_each
from merge_engine.shards import parse_size
from merge_engine.shared_tiles import MOST_HELD
from merge_engine.tensors import StoredTensor
from merge_engine.tiles import TILE_ELEMENTS, KeepTile, Source

# Bytes of a process that has imported torch, triton and Numba and merged something small, some 450 MB, and of what
# allocators keep.
OWN = 544 << 20
_SCRATCHES = 12  # tiles that `operators` works with on each thread, and `compiled` with fewer

Request = Recipe | Mapping[str, Any]


class Room(NamedTuple):
    """A memory budget, shared out."""

    together: int  # merged matrices of one module that are made at once
    workers: int  # that cut them
    cache: int  # bytes


class Pool:
    """Adapters, a memory budget, and a cache.

    adapters: folders, hub ids, or opened ones. memory: what this process may hold, as "4GB" or in bytes.
    keeps_results: whether the factors of results are worth keeping, for merges that differ in scale only.
    Raises AdapterError for adapters that cannot be merged or hold NaN or Inf, RecipeError for a size that is none.
    """

    def __init__(
        self, adapters: Sequence[str | Path | Adapter], memory: int | str, *, keeps_results: bool = False
    ) -> None:
        self.keeps_results = keeps_results
        self.memory = _parse_memory(memory)
        self.cache = Cache(0)
        opened = open_adapters(adapters)
        for adapter in opened:
            adapter.check_finite()
        extras = _same_extras(opened)
        self.adapters = [_pooled(adapter, same, self.cache) for adapter, same in zip(opened, extras, strict=True)]

    def bind(self, request: Request) -> Plan:
        """The plan of a recipe: its fields, and optionally adapters: which, by number or name, in that order."""
        if isinstance(request, Recipe):
            return make_plan(self.adapters, request)
        values = dict(request)
        chosen = values.pop("adapters", None)
        if chosen is None:
            chosen = range(len(self.adapters))
        elif isinstance(chosen, str) or not isinstance(chosen, Sequence):
            raise RecipeError(f"adapters: wanted a list of numbers or names, got {chosen!r}")
        return make_plan([self._find(adapter) for adapter in chosen], Recipe.from_mapping(values))

    def _find(self, wanted: Any) -> Adapter:
        if isinstance(wanted, int) and not isinstance(wanted, bool) and 0 <= wanted < len(self.adapters):
            return self.adapters[wanted]
        found = [adapter for adapter in self.adapters if wanted == adapter.name]
        if len(found) != 1:
            names = ", ".join(adapter.name for adapter in self.adapters)
            many = f", the name of {len(found)}" if found else ""
            raise RecipeError(
                f"adapters: wanted a number below {len(self.adapters)} or one of {names}, got {wanted!r}{many}"
            )
        return found[0]

    def prepared(self, plan: Plan, backend: Backend) -> engine.Preparation:
        """`engine.prepare`, which looks at the weights only where the majority votes by them."""
        if not plan.spans_model and not plan.rule.majority:
            return engine.prepare(plan, backend, _ignore)
        asked = tuple(
            (module.name, module.adapters, module.densities, module.weights if plan.rule.majority else ())
            for module in plan.modules
        )
        key = ("preparation", backend.name, plan.adapters, plan.rule, plan.sides, seed_of(plan), asked)
        size = 256 * sum(len(module.adapters) for module in plan.modules)
        return self.cache.get(key, lambda: engine.prepare(plan, backend, _ignore), lambda _: size)

    def keeps(
        self, asks: Sequence[tuple[Plan, ModulePlan, engine.Preparation]], sources: Sequence[Source], side: str
    ) -> list[tuple[KeepTile, ...]]:
        """What each ask keeps of each source; all asks are for one module of the same adapters.

        What was found before is looked up, and all new thresholds of one source are found in one sweep.
        """
        columns = [self._keeps_of(asks, place, source, side) for place, source in enumerate(sources)]
        return list(zip(*columns, strict=True))

    def _keeps_of(
        self, asks: Sequence[tuple[Plan, ModulePlan, engine.Preparation]], place: int, source: Source, side: str
    ) -> list[KeepTile]:
        first, module, _ = asks[0]
        key = ("keeps", first.adapters[module.adapters[place]], module.name, side)
        known: dict[Hashable, KeepTile] = self.cache.get(key, dict, lambda _: 1024)
        keys = [_keep_key(plan, module, place, source) for plan, module, _ in asks]
        for ties in ("exact", "keep"):
            ks = list(
                dict.fromkeys(k for kind, k, of in keys if (kind, of) == ("trim", ties) and (kind, k, of) not in known)
            )
            known.update(zip((("trim", k, ties) for k in ks), trims_of_each([source], [ks], ties)[0], strict=True))
        found: list[KeepTile] = []
        for each, (plan, module, ready) in zip(keys, asks, strict=True):
            if each not in known:
                number, density = module.adapters[place], module.densities[place]
                keep = torch_backend.keep(plan, module.name, number, source, density, side, ready.trims[side])
                if each[0] != "drop":
                    found.append(keep)
                    continue
                known[each] = keep
            found.append(known[each])
        return found

    def stack(self, plan: Plan, module: ModulePlan, As: Sequence[Tensor], Bs: Sequence[Tensor]) -> Stack:
        """The stacked factors of a module, decomposed."""
        key = ("stack", tuple(plan.adapters[number] for number in module.adapters), module.name)
        return self.cache.get(key, lambda: Stack(As, Bs), lambda stack: stack.nbytes)

    def space(self, plan: Plan, module: ModulePlan, start: Tensor, shape: tuple[int, int], k: int) -> Tensor:
        """What the iteration for a module's merged delta begins with."""
        adapters = tuple(plan.adapters[number] for number in module.adapters)
        key = ("space", adapters, module.name, module.rank, k)
        return self.cache.get(key, lambda: first_space(start, shape, k), lambda rows: rows.nbytes)

    def begin(self, plans: Sequence[Plan], *, in_memory: bool) -> Room:
        """A pass begins: `room`, of which the cache takes its share."""
        room = self.room(plans, in_memory=in_memory)
        self.cache.begin(room.cache)
        return room

    def room(self, plans: Sequence[Plan], *, in_memory: bool) -> Room:
        """How the budget is shared out for one pass of these plans; in_memory: where their results stay.

        Raises RecipeError where not even one matrix at a time fits, saying how much would do.
        """
        threads = torch.get_num_threads()
        pairs = [(plan, module) for plan in plans for module in plan.modules]
        matrix = max(_matrix_bytes(plan, module) for plan, module in pairs)
        cutting = max(_cutting_bytes(plan, module) for plan, module in pairs)
        factors = 4 * max(4 * _eights(plan, module) * (module.rows + module.columns) for plan, module in pairs)
        tile = threads * 4 * TILE_ELEMENTS
        held = (
            threads * 4 * HELD
            if jit.loops()
            else tile * max(min(len(module.adapters), MOST_HELD) for _, module in pairs)
        )
        results = sum(map(result_bytes, plans)) if in_memory else 0
        fixed = OWN + results + factors + held + _SCRATCHES * tile
        for workers in range(min(threads, engine.MAX_RECOMPRESSIONS), 0, -1):
            free = self.memory - fixed - workers * cutting - (workers + 2) * matrix
            if free >= 0:
                more = min(len(plans) - 1, free // (2 * (matrix + tile)))
                return Room(1 + more, workers, free - more * (matrix + tile))
        least = self.memory - free
        raise RecipeError(f"memory: wanted at least {least / 1e9:.2f}GB for this merge, got {self.memory / 1e9:.2f}GB")


@dataclass(frozen=True, eq=False)
class PooledAdapter(Adapter):
    """An adapter whose values were checked when its pool was made, and whose factors are kept."""

    of: Adapter = field(repr=False)
    cache: Cache = field(repr=False)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.cache.get(("factors", self, name), lambda: self.of.factors(name), _bytes_of)

    def check_finite(self) -> None:
        """It was done."""


def result_bytes(plan: Plan) -> int:
    """Bytes of a plan's result in memory, at most."""
    return sum(4 * module.rank * (module.rows + module.columns) for module in plan.modules)


def seed_of(plan: Plan) -> int | None:
    """The seed, where it counts."""
    return plan.recipe.seed if plan.rule.keep == "bernoulli" else None


def _pooled(adapter: Adapter, extras: dict[str, StoredTensor], cache: Cache) -> PooledAdapter:
    values = {each.name: getattr(adapter, each.name) for each in fields(Adapter)}
    return PooledAdapter(**(values | {"extras": extras}), of=adapter, cache=cache)


def _same_extras(adapters: Iterable[Adapter]) -> list[dict[str, StoredTensor]]:
    """Their tensors beside the factors, equal ones as one object: so they are compared once, not for every plan."""
    seen: dict[str, list[StoredTensor]] = {}

    def first_like(key: str, extra: StoredTensor) -> StoredTensor:
        others = seen.setdefault(key, [])
        twin = next((other for other in others if other.same_as(extra)), None)
        if twin is None:
            others.append(extra)
        return twin or extra

    return [{key: first_like(key, extra) for key, extra in adapter.extras.items()} for adapter in adapters]


def _keep_key(plan: Plan, module: ModulePlan, place: int, source: Source) -> tuple[str, Any, Any]:
    """What `keep` of a source depends on: trims with a threshold of their own and drops are worth keeping."""
    rule, density = plan.rule, module.densities[place]
    if rule.keep == "magnitude" and not plan.spans_model and density < 1:
        return "trim", rule.kept(density, source.rows * source.columns), rule.trim_ties
    if rule.keep == "bernoulli" and density < 1:
        return "drop", density, (module.adapters[place], plan.recipe.seed, rule.l1_rescale)
    return "any", density, None


def _ranks(plan: Plan, module: ModulePlan) -> int:
    return sum(plan.adapters[number].modules[module.name].rank for number in module.adapters)


def _eights(plan: Plan, module: ModulePlan) -> int:
    """The same, each up to a multiple of 8, as factors are packed."""
    return sum(-(-plan.adapters[number].modules[module.name].rank // 8) * 8 for number in module.adapters)


def _matrix_bytes(plan: Plan, module: ModulePlan) -> int:
    """What is merged of one module: a matrix, or factors."""
    if plan.recipe.space == "delta" and plan.rule.keep != "all":
        return 4 * module.rows * module.columns
    return 4 * module.rank * (module.rows + module.columns)


def _cutting_bytes(plan: Plan, module: ModulePlan) -> int:
    """What `engine.cut` takes beside that, about: see `lowrank.from_matrix` and `stacked`."""
    ranks, width, least = _ranks(plan, module), module.rows + module.columns, min(module.rows, module.columns)
    if plan.recipe.space == "factors" or plan.rule.keep == "all":
        return 8 * (3 * ranks * width + 6 * ranks * ranks)
    if module.rank * 12 > least:  # by the Gram matrix
        return 8 * (4 * least * least + 3 * module.rank * width)
    start = min(ranks, max(2 * module.rank, engine.WIDEST_START))
    return 8 * (5 * (start + 8) + 12 * module.rank) * width


def _parse_memory(memory: int | str) -> int:
    try:
        return parse_size(memory)
    except RecipeError:
        raise RecipeError(f"memory: wanted a size as 4GB or 500MB, got {memory!r}") from None


def _bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def _ignore(_: int) -> None:
    pass
