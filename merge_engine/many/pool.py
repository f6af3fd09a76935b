"""Adapters that are merged many times: opened and checked once, with a cache of what their merges have in common.

A pool binds recipes to plans, each over all of its adapters or some of them, and divides a memory budget.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_engine.engine.backend import Backend, Known
from merge_engine.engine.cut import Decompositions
from merge_engine.engine.joint import Joined, Joint
from merge_engine.engine.plan import ModulePlan, Plan, make_joint, make_plan
from merge_engine.engine.prepare import Preparation, Work, prepare
from merge_engine.errors import RecipeError
from merge_engine.files.weights import StoredTensor
from merge_engine.formats.adapter import Adapter
from merge_engine.formats.open import open_adapters
from merge_engine.lowrank.cores import Cores
from merge_engine.lowrank.stack import Stack
from merge_engine.many.budget import Room, room
from merge_engine.many.cache import Cache
from merge_engine.rules.guesses import listed
from merge_engine.rules.recipe import Recipe
from merge_engine.runtime.memory import parse_size

RecipeLike = Recipe | Mapping[str, Any]


class Pool:
    """Adapters, a memory budget, and a cache.

    adapters: folders, hub ids, or opened adapters, or a mapping of them to the weights of recipes that give none.
    memory: what this process may hold, as "4GB" or in bytes.
    keeps_results: whether to keep the factors of results, for merges that differ in scale only.
    Raises AdapterError for adapters that cannot be merged or hold NaN or Inf, RecipeError for an invalid size.
    """

    def __init__(
        self, adapters: Sequence[str | Path | Adapter], memory: int | str, *, keeps_results: bool = False
    ) -> None:
        self.keeps_results = keeps_results
        self.memory = parse_size(memory, "memory")
        self.cache = Cache(0)
        sources, self.weights = listed(adapters)
        opened = open_adapters(sources)
        for adapter in opened:
            adapter.check_finite()
        extras = _same_extras(opened)
        self.adapters = [_pooled(adapter, same, self.cache) for adapter, same in zip(opened, extras, strict=True)]

    def bind(self, request: RecipeLike) -> Plan:
        """The plan of a recipe: its fields, and optionally adapters: numbers or names of those to merge, in order."""
        if isinstance(request, Recipe):
            if self.weights is not None and request.weights is None:
                request = replace(request, weights=tuple(self.weights))
            return make_plan(self.adapters, request, self._joint)
        values = dict(request)
        chosen = values.pop("adapters", None)
        if chosen is None:
            chosen = range(len(self.adapters))
        elif isinstance(chosen, str) or not isinstance(chosen, Sequence):
            raise RecipeError(f"adapters: wanted a list of numbers or names, got {chosen!r}")
        adapters = [self._find(adapter) for adapter in chosen]
        if self.weights is not None and values.get("weights") is None:
            of = dict(zip(map(id, self.adapters), self.weights, strict=True))
            values["weights"] = [of[id(adapter)] for adapter in adapters]
        return make_plan(adapters, Recipe.from_mapping(values), self._joint)

    def _joint(self, plan: Plan) -> Joint | None:
        """The plan's joined modules, kept in the cache by what they depend on."""

        def keep(key: Hashable, make: Callable[[], Joined]) -> Joined:
            having = tuple(adapter for adapter in plan.adapters if key in adapter.modules)
            return self.cache.get(("joined", having, plan.view, key), make, lambda joined: joined.nbytes)

        return make_joint(plan, keep)

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

    def prepared(self, plan: Plan, backend: Backend) -> Preparation:
        """`prepare`, from the cache. The weights count only where they decide the majority's sign."""
        if not plan.spans_model and not plan.rule.majority:
            return prepare(plan, backend, _ignore)
        modules = tuple(
            (module.name, module.adapters, module.densities, module.weights if plan.rule.majority else ())
            for module in plan.modules
        )
        key = ("preparation", backend.name, plan.adapters, plan.view, plan.rule, plan.sides, seed_of(plan), modules)
        size = 256 * sum(len(module.adapters) for module in plan.modules)
        return self.cache.get(key, lambda: prepare(plan, backend, _ignore), lambda _: size)

    def known_keeps(self, plan: Plan, module: ModulePlan, side: str) -> list[Known]:
        """For each adapter that has the module, the thresholds and drops that earlier merges found."""
        having = tuple(plan.adapters[number] for number in module.adapters)
        found: list[Known] = []
        for place, adapter in enumerate(having):
            # A task tensor depends on its adapter only, or on all adapters that have the module, in their order.
            seen: Hashable = adapter if plan.joint is None else (place, having, plan.view)
            found.append(self.cache.get(("keeps", seen, module.name, side), dict, lambda _: 1024))
        return found

    def decompositions(self, plan: Plan, module: ModulePlan) -> Decompositions:
        """The decompositions that a cut of the module needs, kept in the cache."""
        having = tuple(plan.adapters[number] for number in module.adapters)
        return _KeptDecompositions(self.cache, (having, plan.recipe.balance), module)

    def begin(self, plans: Sequence[Plan], backend: Backend, *, in_memory: bool) -> Room:
        """Begin a pass: divide the budget (see `budget.room`), and give the cache its part."""
        found = room(plans, backend, self.memory, in_memory=in_memory)
        self.cache.begin(found.cache)
        return found


class _KeptDecompositions(Decompositions):
    """The decompositions of one module's factors, from a cache."""

    def __init__(self, cache: Cache, adapters: Hashable, module: ModulePlan) -> None:
        self.cache, self.adapters, self.module = cache, adapters, module

    def stack(self, work: Work, device: torch.device) -> Stack:
        make = partial(super().stack, work, device)
        return self.cache.get(("stack", self.adapters, self.module.name), make, lambda stack: stack.nbytes)

    def cores(self, stack: Stack, scalings: Sequence[float]) -> Cores:
        make = partial(super().cores, stack, scalings)
        return self.cache.get(("cores", self.adapters, self.module.name), make, lambda cores: cores.nbytes)

    def start(self, rows: Tensor, shape: tuple[int, int], k: int) -> Tensor:
        make = partial(super().start, rows, shape, k)
        key = ("space", self.adapters, self.module.name, self.module.rank, k)
        return self.cache.get(key, make, lambda found: found.nbytes)

    def norms(self, work: Work) -> tuple[float, ...]:
        key = ("norms", self.adapters, self.module.name)
        return self.cache.get(key, work.norms, lambda norms: 64 + 32 * len(norms))


@dataclass(frozen=True, eq=False)
class PooledAdapter(Adapter):
    """An adapter whose values were checked when its pool was made, and whose factors are kept in a cache."""

    of: Adapter = field(repr=False)
    cache: Cache = field(repr=False)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.cache.get(("factors", self, name), lambda: self.of.factors(name), _bytes_of)

    def check_finite(self) -> None:
        """Nothing to do: the pool checked the values when it was made."""


def seed_of(plan: Plan) -> int | None:
    """The seed, or None where nothing is drawn."""
    return plan.recipe.seed if plan.rule.keep == "bernoulli" else None


def _pooled(adapter: Adapter, extras: dict[str, StoredTensor], cache: Cache) -> PooledAdapter:
    values = {each.name: getattr(adapter, each.name) for each in fields(Adapter)}
    return PooledAdapter(**(values | {"extras": extras}), of=adapter, cache=cache)


def _same_extras(adapters: Iterable[Adapter]) -> list[dict[str, StoredTensor]]:
    """The tensors beside the factors; equal ones become one object, so that they are compared once, not for every plan.

    `shared_extras` takes one object for equal without reading it.
    """
    seen: dict[str, list[StoredTensor]] = {}

    def first_like(key: str, extra: StoredTensor) -> StoredTensor:
        others = seen.setdefault(key, [])
        twin = next((other for other in others if other.same_as(extra)), None)
        if twin is None:
            others.append(extra)
        return twin or extra

    return [{key: first_like(key, extra) for key, extra in adapter.extras.items()} for adapter in adapters]


def _bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def _ignore(_: int) -> None:
    pass
