"""Several plans over the same adapters, carried out in one pass over their modules.

With a backend that merges module by module, each one is read and packed once for all plans, one sweep finds the
thresholds of all densities, each tile is multiplied out once, and plans that differ only in scale or dtype are merged
once, up to the last step. With others each group of modules is read and packed once, and one launch merges it for all
plans that share a kernel, as far as memory allows.
"""

from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from merge_engine.engine.backend import Backend, Group
from merge_engine.engine.cut import Finished, cut, scaled
from merge_engine.engine.cut_group import cut_at_once, cut_works, cutters
from merge_engine.engine.plan import ModulePlan, Plan
from merge_engine.engine.prepare import Loaded, Preparation, Work, load_group, names_of, works_of
from merge_engine.errors import about
from merge_engine.lowrank.small_svd import LowRank
from merge_engine.many.budget import Room
from merge_engine.many.pool import Pool, seed_of
from merge_engine.runtime.threads import ahead, threads

T = TypeVar("T")
Numbers = list[int]  # of the plans that share a result up to its scale and dtype


class Member(NamedTuple):
    """One module of plans whose results for it differ in scale and dtype only; plan: the first of them."""

    numbers: Numbers
    plan: Plan
    module: ModulePlan
    ready: Preparation


class Grouped(NamedTuple):
    """Plans whose results differ in scale and dtype only, and the groups of the first of them."""

    numbers: Numbers
    plan: Plan
    ready: Preparation
    groups: Sequence[Sequence[ModulePlan]]


class Family(NamedTuple):
    """Members that merge the same task tensors of one module, with these task tensors."""

    members: list[Member]
    loaded: Loaded


class Step(NamedTuple):
    """A member and its state: merged and to be cut, found in the cache, or failed."""

    member: Member
    state: Work | Finished | Exception


FinishedOrError = Finished | Exception
# Of some plans, for one module; whether others hold the result too, so that it must be copied before it is given away.
Outcome = tuple[Numbers, ModulePlan, FinishedOrError, bool]


def merged_modules(
    plans: Sequence[Plan], backend: Backend, pool: Pool, room: Room, failed: set[int]
) -> Iterator[tuple[int, ModulePlan, FinishedOrError]]:
    """(number of the plan, module, its result) for every module of every plan, with the bits of `engine.merge`.

    A plan that fails yields one of its modules with the exception, and no further ones. The caller adds to `failed` the
    numbers of plans whose modules it does not want any more.
    """
    if backend.merges_several:
        found = _module_by_module(plans, backend, pool, room, failed)
    else:
        found = _group_by_group(plans, backend, pool, room, failed)
    with closing(found) as outcomes:
        for numbers, module, outcome, held in outcomes:
            for number in numbers:
                if number not in failed:
                    result = outcome
                    if not isinstance(outcome, Exception):
                        result = _attempt(_own, outcome, plans[number], module, held or len(numbers) > 1)
                    if isinstance(result, Exception):
                        failed.add(number)
                    yield number, module, result


def _group_by_group(
    plans: Sequence[Plan], backend: Backend, pool: Pool, room: Room, failed: set[int]
) -> Generator[Outcome, None, None]:
    equal: dict[Hashable, Numbers] = {}
    for number, plan in enumerate(plans):
        equal.setdefault((plan.adapters, plan.modules, _settings(plan)), []).append(number)
    alike: dict[Hashable, list[Grouped]] = {}
    for numbers in equal.values():
        plan = plans[numbers[0]]
        ready = _attempt(pool.prepared, plan, backend)
        if isinstance(ready, Exception):
            yield numbers, plan.modules[0], ready, False
            continue
        groups = backend.groups(plan)
        names = tuple(tuple(module.name for module in group) for group in groups)
        key = plan.adapters, plan.view, plan.sides, plan.by_factors, names
        alike.setdefault(key, []).append(Grouped(numbers, plan, ready, groups))

    def jobs() -> Iterator[tuple[Grouped, list[Work] | Exception]]:
        for members in alike.values():
            yield from _together(members, backend, failed)

    def cut_part(job: tuple[Grouped, list[Work] | Exception]) -> list[Outcome]:
        (numbers, plan, _, _), works = job
        if isinstance(works, Exception):
            return [(numbers, plan.modules[0], works, False)]
        results = _attempt(cut_works, plan, backend, works)
        if isinstance(results, Exception):
            return [(numbers, plan.modules[0], results, False)]
        return [(numbers, work.module, each, False) for work, each in zip(works, results, strict=True)]

    for outcomes in ahead(cut_part, jobs(), cutters(backend, room.workers)):
        yield from outcomes


def _together(
    members: Sequence[Grouped], backend: Backend, failed: set[int]
) -> Iterator[tuple[Grouped, list[Work] | Exception]]:
    """What is to be cut at once, of every group of every member. After a failure there is no more of a member."""
    first, over = members[0], set[int]()

    def load(place: int) -> Loaded | Exception:
        return _attempt(load_group, first.plan, backend, first.groups[place])

    for place, loaded in enumerate(ahead(load, range(len(first.groups)))):
        going = [each for each in members if not (failed | over).issuperset(each.numbers)]
        if isinstance(loaded, Exception):
            yield from ((member, loaded) for member in going)
            return
        merges = [[_group(member, place, loaded, side) for side in loaded.packed] for member in going]
        for part in backend.parts(merges) if merges else []:
            results = _attempt(_merged, backend, loaded, [merges[i] for i in part])
            for i, member in enumerate(going[number] for number in part):
                if isinstance(results, Exception):
                    over.update(member.numbers)
                    yield member, results
                else:
                    works = works_of(member.groups[place], loaded, {side: of[i] for side, of in results.items()})
                    yield from ((member, each) for each in cut_at_once(backend, works))


def _group(member: Grouped, place: int, loaded: Loaded, side: str) -> Group:
    _, plan, ready, groups = member
    modules = [plan.as_merged(module, own) for module, own in zip(groups[place], loaded.joined, strict=True)]
    return ready.group(plan, modules, side, loaded.packed[side])


def _merged(backend: Backend, loaded: Loaded, merges: Sequence[Sequence[Group]]) -> dict[str, list[list[Tensor]]]:
    """By side, of every merge, the tensors of all modules."""
    with about(names_of(loaded.group)):
        sides = zip(loaded.packed, zip(*merges, strict=True), strict=True)
        return {side: backend.merge_together(groups) for side, groups in sides}


def _module_by_module(
    plans: Sequence[Plan], backend: Backend, pool: Pool, room: Room, failed: set[int]
) -> Generator[Outcome, None, None]:
    modules = [{module.name: module for module in plan.modules} for plan in plans]
    ready: dict[int, Preparation] = {}
    for number, plan in enumerate(plans):
        found = _attempt(pool.prepared, plan, backend)
        if isinstance(found, Exception):
            yield [number], plan.modules[0], found, False
        else:
            ready[number] = found

    def load(name: str) -> list[Family | Step]:
        """The families of a module; a `Step` for each member that is in the cache, or cannot be read."""
        having = [number for number in ready if number not in failed and name in modules[number]]
        members = [Member([number], plans[number], modules[number][name], ready[number]) for number in having]
        families: dict[Hashable, list[Member]] = {}
        loaded: list[Family | Step] = []
        for member in _as_one(members):
            result = pool.cache.find(_result_key(member)) if pool.keeps_results else None
            if result is not None:
                loaded.append(Step(member, result))
            else:
                families.setdefault((_adapters(member), member.plan.sides, member.plan.view), []).append(member)
        for family in families.values():
            try:
                loaded.append(_read(family, backend))
            except Exception as error:
                loaded += [Step(member, error) for member in family]
        return loaded

    def jobs() -> Iterator[Step]:
        names = sorted({name for known in modules for name in known})
        for loaded in map(load, names) if alone else ahead(load, names):
            for step in loaded:
                if isinstance(step, Step):
                    yield step
                    continue
                try:
                    yield from _merge(step, backend, pool, room.together)
                except Exception as error:
                    yield from (Step(member, error) for member in step.members)

    # A thread reads ahead while this one merges. Where the cuts are all there is to do, this one has time to read, and
    # what waits to be cut is small.
    alone = all(plan.by_factors for plan in plans)
    for job, outcome, held in ahead(partial(_finished, backend, pool), jobs(), room.workers, room=2 * alone):
        yield job.member.numbers, job.member.module, outcome, held


def _as_one(members: Sequence[Member]) -> list[Member]:
    """Members whose results differ in scale only, joined into one."""
    found: dict[Hashable, Member] = {}
    for member in members:
        found.setdefault(_result_key(member), member._replace(numbers=[])).numbers.extend(member.numbers)
    return list(found.values())


def _read(members: list[Member], backend: Backend) -> Family:
    """Read the factors, and pack them if any member needs more than the factors."""
    merging = [member for member in members if not member.plan.by_factors]
    _, plan, module, _ = (merging or members)[0]
    return Family(members, load_group(plan, backend, [module]))


def _merge(family: Family, backend: Backend, pool: Pool, together: int) -> Iterator[Step]:
    """Merge every member, `together` matrices at once. Members that differ only in their cut share a merged matrix."""
    loaded = family.loaded
    for member in family.members:
        if member.plan.by_factors:
            yield Step(member, _work(member, loaded, {}))
    merging = [member for member in family.members if not member.plan.by_factors]
    if not merging:
        return
    specs: dict[tuple[Hashable, ...], list[Member]] = {}
    sides = [_specs(merging, loaded, side, backend, pool) for side in loaded.packed]
    for member, *of_sides in zip(merging, *sides, strict=True):
        specs.setdefault(tuple(of_sides), []).append(member)
    waiting = list(specs.items())
    while waiting:
        part, waiting = waiting[:together], waiting[together:]
        with about(part[0][1][0].module.name):
            merged = {
                side: backend.merge_several(packed, [of_sides[i] for of_sides, _ in part])
                for i, (side, packed) in enumerate(loaded.packed.items())
            }
        for i, (_, members) in enumerate(part):
            tensors = {side: _taken(results, i) for side, results in merged.items()}
            for member in members:
                yield Step(member, _work(member, loaded, tensors))


def _work(member: Member, loaded: Loaded, merged: dict[str, Tensor]) -> Work:
    return Work(member.module, loaded.factors[0], merged, loaded.joined[0])


def _specs(members: Sequence[Member], loaded: Loaded, side: str, backend: Backend, pool: Pool) -> Sequence[Hashable]:
    """The specification of one side's merge, for every member."""
    groups = []
    for _, plan, module, ready in members:
        groups.append(ready.group(plan, [plan.as_merged(module, loaded.joined[0])], side, loaded.packed[side]))
    first = members[0]
    with about(first.module.name):
        return backend.specs(groups, pool.known_keeps(first.plan, first.module, side))


def _taken(results: list[Tensor], i: int) -> Tensor:
    """Take a result out of the list, so that nothing else holds its memory."""
    tensor, results[i] = results[i], results[i][:0]
    return tensor


def _finished(backend: Backend, pool: Pool, job: Step) -> tuple[Step, FinishedOrError, bool]:
    """The result of a step, and whether the cache holds it."""
    (_, plan, module, _), state = job
    if not isinstance(state, Work):
        return job, state, True
    made = _attempt(lambda: cut(plan, backend, state, pool.decompositions(plan, module)))
    if not pool.keeps_results or isinstance(made, Exception):
        return job, made, False
    pool.cache.put(_result_key(job.member), made, _result_bytes(made.factors), cheap=plan.by_factors)
    return job, made, True


def _own(result: Finished, plan: Plan, module: ModulePlan, held: bool) -> Finished:
    """The plan's result, scaled, in memory of its own."""
    with threads(1):  # further threads would spin while the next module is cut
        made = scaled(result, plan.recipe, module.name)
        if not held:
            return made
        A, B, energy = made.factors
        return made._replace(factors=LowRank(A.clone(), B.clone() if B is result.factors.B else B, energy))


def _settings(plan: Plan) -> Hashable:
    """Everything in a plan that decides how its modules are merged and cut, except the scale."""
    recipe = plan.recipe
    of_cores = recipe.method if plan.on_cores else None
    automatic = recipe.scale == "auto"  # then the result comes with the norms of the deltas
    fields = recipe.space, recipe.balance, recipe.ridge, recipe.energy, seed_of(plan)
    return plan.rule, plan.stacks, of_cores, automatic, fields


def _result_key(member: Member) -> Hashable:
    _, plan, module, ready = member
    # A threshold of the whole model depends on the other modules' task tensors, and these on all of their adapters.
    others = plan.adapters if plan.spans_model and plan.joint is not None else ()
    return "result", _adapters(member), module, _settings(plan), tuple(ready.tied.values()), others


def _result_bytes(result: LowRank) -> int:
    return 4 * (result.A.numel() + result.B.numel())


def _adapters(member: Member) -> Hashable:
    return tuple(member.plan.adapters[number] for number in member.module.adapters)


def _attempt(function: Callable[..., T], *arguments: Any) -> T | Exception:
    """What the function returns, or the exception that it raises."""
    try:
        return function(*arguments)
    except Exception as error:
        return error
