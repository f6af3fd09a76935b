"""Merges by the fused Triton kernels: one launch for a group of modules of one shape, on a GPU or interpreted."""

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from merge_engine.cpu.merge_several import working_bytes
from merge_engine.engine.backend import Group, Known
from merge_engine.engine.copies import Copies, SameMemory, StreamCopies
from merge_engine.engine.plan import ModulePlan, Plan, Task
from merge_engine.errors import MergeError
from merge_engine.kernels import merge as kernels
from merge_engine.kernels import select
from merge_engine.kernels.source import Dense, Drop, Keep, Lora, Pair, Source, Trim, launch_of, on_device, pack
from merge_engine.kernels.trims import bands, search_bytes, trims
from merge_engine.models.finetuned import Difference, Finetuned
from merge_engine.rules.philox import stream_id
from merge_engine.rules.rule import Rule, require

logger = logging.getLogger(__name__)
GROUP_BYTES = 1 << 30  # of merged deltas in one launch, and of what finds their thresholds, on a GPU
HOST_GROUP_BYTES = 1 << 24  # and in the interpreter
PACKED = (torch.float32, torch.float16, torch.bfloat16)  # what the kernels read as it is; the rest is widened
Trims = dict[str, Trim]  # by module: [1, 1, adapters]
T = TypeVar("T", Lora, Dense)


class TritonBackend:
    """See `backend.Backend`. device: where the kernels run, the CPU if they are interpreted. copies: to it and back.

    Factors and tensors of a base are put into pinned memory by the reading thread and copied on a stream of their own,
    so that one group's copies overlap with the launches of the group before it. Launched on the current stream; what a
    merge gives is complete for any thread that reads it on the default one.
    """

    name = "triton"
    merges_several = False  # a launch takes many modules, of one plan or of several

    def __init__(self, device: torch.device, copies: Copies | None = None) -> None:
        self.device = device
        self.cuts_groups = device.type != "cpu"  # on a GPU, small operators cost more than their arithmetic
        self.copies: Copies = copies or (StreamCopies(device) if device.type == "cuda" else SameMemory())

    @property
    def identity(self) -> str:
        return self.name

    def groups(self, plan: Plan) -> list[list[ModulePlan]]:
        """Modules alike in all but their numbers, so that one launch can take them.

        What is packed for a module, and the kernel that it takes, depend on no other: a group may be cut anywhere.
        """
        if plan.lifts:  # each has a size of its own, which is known when it is read
            return [[module] for module in plan.mine]
        alike: dict[Any, list[ModulePlan]] = {}
        for module in plan.mine:
            parts = [plan.adapters[number].modules[module.name] for number in module.adapters]
            factors = tuple((part.rank, part.dtype) for part in parts)
            key = (module.rows, module.columns, module.adapters, module.weights, module.scalings, factors)
            alike.setdefault(key, []).append(module)
        groups = []
        for modules in alike.values():
            first = modules[0]
            dense = any(isinstance(plan.adapters[number], Finetuned) for number in first.adapters)
            # Dense: whole matrices, not factors, of every input.
            held = 4 * first.rows * first.columns * (len(first.adapters) - 1) if dense else 0
            size = self._at_once(held + _merging_bytes(plan.rule, len(first.adapters), first.rows, first.columns))
            groups += [modules[start : start + size] for start in range(0, len(modules), size)]
        return groups

    def parts(self, merges: Sequence[Sequence[Group]]) -> list[list[int]]:
        """Merges that one launch can take, as many as a launch may take modules."""
        alike: dict[Hashable, list[int]] = {}
        for number, sides in enumerate(merges):
            alike.setdefault(tuple(map(_kernel_of, sides)), []).append(number)
        found = []
        for numbers in alike.values():
            size = self._at_once(sum(map(_group_bytes, merges[numbers[0]])))
            found += [numbers[start : start + size] for start in range(0, len(numbers), size)]
        return found

    def _at_once(self, nbytes: int) -> int:
        """How many of so many bytes a launch may take."""
        return max(1, (HOST_GROUP_BYTES if self.device.type == "cpu" else GROUP_BYTES) // max(nbytes, 1))

    def pack(self, plan: Plan, group: Sequence[ModulePlan], factors: Sequence[list[Task]], side: str) -> Source:
        """Slabs of the group in host memory, pinned if they go to a GPU."""
        if any(isinstance(task, Difference) for tasks in factors for task in tasks):
            return self._staged(_pack_dense(group, factors))
        pairs = [[_readable(cast(Pair, task)) for task in tasks] for tasks in factors]
        if side == "delta":
            return self._staged(pack(pairs, [module.scalings for module in group]))
        index = "AB".index(side)
        dtype = reduce(torch.promote_types, (pair[index].dtype for pair in pairs[0]))
        x = torch.stack([pair[index].to(dtype) for row in pairs for pair in row])
        return self._staged(Dense(x.unflatten(0, (len(pairs), -1))))

    def model_trims(self, plan: Plan, side: str) -> Trims:
        """Thresholds that span the model. All factors of this process's modules are on the device at once."""
        groups = self.groups(plan)
        kept = torch.tensor([[plan.kept_of_model(number, side) for number in range(len(plan.adapters))]])
        places = {module.name: place for place, module in enumerate(plan.modules)}

        def total(counts: Tensor) -> Tensor:
            if plan.ranks.world == 1:
                return counts  # without waiting for the device
            return torch.from_numpy(plan.ranks.sum(counts.cpu().numpy())).to(counts.device)

        try:
            packed = [
                self.pack(
                    plan,
                    [plan.as_merged(module, plan.joined(module)) for module in group],
                    [plan.read(module) for module in group],
                    side,
                )
                for group in groups
            ]
            found = select.model_trims(
                [self._on_device(each) for each in packed],
                kept,
                ties=plan.rule.trim_ties,
                adapters=[group[0].adapters for group in groups],
                order=[places[module.name] for group in groups for module in group],
                modules=len(places),
                total=total,
            )
        except torch.OutOfMemoryError as error:
            raise MergeError(
                f"{self.device}: scope='model' holds the factors of all adapters there, and they do not fit; "
                "wanted a larger device, or backend='torch'"
            ) from error
        return {
            module.name: Trim(*(field[:, i : i + 1] for field in (trim.value, trim.row, trim.column)))
            for group, trim in zip(groups, found, strict=True)
            for i, module in enumerate(group)
        }

    def vote_balance(self, group: Group) -> int:
        source, rule = self._on_device(group.packed), group.plan.rule
        options: dict[str, Any] = {"elect": rule.elect, "vote_weighted": rule.vote_weighted}
        return int(kernels.vote_balance(source, [group.weights], _keep([group], source), **options).item())

    def merge(
        self,
        group: Group,
        *,
        scale: float = 1.0,
        base: Sequence[Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> list[Tensor]:
        """Out of memory on the device: the group is halved, which changes no number."""
        waiting = [group]
        merged: list[Tensor] = []
        while waiting:
            part = waiting.pop()
            try:
                onto = None if base is None else base[len(merged) : len(merged) + len(part.modules)]
                merged += self._merge_onto(onto, dtype, part, scale)
                continue
            except torch.OutOfMemoryError:
                if len(part.modules) == 1:
                    raise
            half = len(part.modules) // 2
            logger.info(
                "%s: out of memory with %d modules of one shape, going on with half", self.device, len(part.modules)
            )
            waiting.append(part.part(part.modules[half:], _modules(part.packed, half, None)))
            waiting.append(part.part(part.modules[:half], _modules(part.packed, 0, half)))
        self.copies.complete()
        return merged

    def merge_together(self, groups: Sequence[Group]) -> list[list[Tensor]]:
        """One launch for all. Out of memory on the device: the plans are halved, then the modules of one."""
        if len(groups) == 1:
            return [self.merge(groups[0])]
        try:
            merged = self._merge(groups, scale=1.0)
        except torch.OutOfMemoryError:
            logger.info("%s: out of memory with %d merges at once, going on with half", self.device, len(groups))
        else:
            self.copies.complete()
            return [list(each.unbind()) for each in merged]
        half = len(groups) // 2
        return self.merge_together(groups[:half]) + self.merge_together(groups[half:])

    def staged(self, tensor: Tensor) -> Tensor:
        return self.copies.staged(tensor)

    def home(self, merged: Tensor) -> Callable[[], Tensor]:
        return self.copies.down(merged)

    def specs(self, groups: Sequence[Group], known: Sequence[Known]) -> Sequence[Group]:
        return groups

    def merge_several(self, packed: Source, specs: Sequence[Group]) -> list[Tensor]:
        return [self.merge(group)[0] for group in specs]

    def working_bytes(self, adapters: int, results: int = 1) -> int:
        """What is copied to the device and back, some groups at a time, is not more than a tile of the CPU's."""
        return working_bytes(adapters, results)

    def add_product(self, A: Tensor, B: Tensor, base: Tensor, dtype: torch.dtype) -> Tensor:
        under = self._stacked([base])
        lora = pack([[(A, B)]], [[1.0]], device=self.device)
        return kernels.merge_deltas(lora, [[1.0]], base=under, out=self._empty(under[None], dtype))[0, 0]

    def _merge_onto(
        self, base: Sequence[Tensor] | None, dtype: torch.dtype, group: Group, scale: float
    ) -> list[Tensor]:
        """`_merge`, in a frame whose memory on the device is free by the time that a group is halved."""
        if base is None:
            return list(self._merge([group], scale=scale)[0].unbind())
        under = self._stacked(base)
        merged = self._merge([group], scale=scale, base=under, out=self._empty(under[None], dtype))
        return list(merged[0].unbind())

    def _stacked(self, base: Sequence[Tensor]) -> Tensor:
        there = self.copies.up(base)
        stacked = there[0][None].contiguous() if len(there) == 1 else torch.stack(there)
        return stacked if stacked.dtype in PACKED else stacked.float()

    def _empty(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(like.shape, dtype=dtype if dtype in PACKED else torch.float32, device=self.device)

    def _merge(self, groups: Sequence[Group], **options: Any) -> Tensor:
        """[plans, modules, M, N] of the same modules in several plans."""
        rule, rules = groups[0].plan.rule, [group.plan.rule for group in groups]
        require(rule, "the Triton backend", combine=("sum", "max", "consensus"), elect=("none", "total", "frequency"))
        require(rule, "the Triton backend", divisor=("count", "weight", "one"))
        source = self._on_device(groups[0].packed)
        return kernels.merge_deltas(
            source,
            [group.weights for group in groups],
            _keep(groups, source),
            elect=rule.elect,
            combine=rule.combine,
            divisor=rule.divisor,
            vote_weighted=rule.vote_weighted,
            mask=[each.mask for each in rules],
            min_tasks=[each.min_tasks for each in rules],
            tied=[group.tied for group in groups],
            **options,
        )

    def _on_device(self, packed: T) -> T:
        """A copy on the device; what is launched next on the current stream waits for it."""
        names = _tensors_of(packed)
        copies = self.copies.up([getattr(packed, name) for name in names])
        return replace(packed, **dict(zip(names, copies, strict=True)))

    def _staged(self, source: T) -> T:
        return replace(source, **{name: self.copies.staged(getattr(source, name)) for name in _tensors_of(source)})


def _tensors_of(source: Source) -> list[str]:
    if isinstance(source, Lora):
        return ["A", "B", "scaling"]
    return ["x"] if source.base is None else ["x", "base"]


def _pack_dense(group: Sequence[ModulePlan], tasks: Sequence[list[Task]]) -> Dense:
    """Whole tasks of modules that full models take part in: x and base as stored, or x - base where factors mix in."""
    shape = (len(group), len(group[0].adapters), group[0].rows, group[0].columns)
    mine = [task for row in tasks for task in row]
    dtypes = {task.x.dtype for task in mine if isinstance(task, Difference)}
    bases = {task.base.dtype for task in mine if isinstance(task, Difference)}
    alike = len(dtypes) == len(bases) == 1 and dtypes | bases <= set(PACKED)
    pure = alike and all(isinstance(task, Difference) for task in mine)
    x = torch.empty(shape, dtype=dtypes.pop() if pure else torch.float32)
    base = torch.empty(shape[0], *shape[2:], dtype=bases.pop()) if pure else None
    for i, (module, row) in enumerate(zip(group, tasks, strict=True)):
        for place, scaling, task in zip(x[i], module.scalings, row, strict=True):
            if not isinstance(task, Difference):
                torch.addmm(place, task[1].float(), task[0].float(), beta=0, alpha=scaling, out=place)
            elif base is not None:
                place.copy_(task.x)
                base[i].copy_(task.base)
            else:
                place.copy_(task.x).sub_(task.base.float())
    return Dense(x, base)


def _kernel_of(group: Group) -> Hashable:
    """What a launch has in common; the rest is numbers that a kernel reads."""
    rule = replace(group.plan.rule, min_k=0, extra_k=0, majority=False, gamma=0.0, mask=0.0, min_tasks=0)
    return rule, kernels.weighing(group.weights, rule.elect, rule.vote_weighted)


def _group_bytes(group: Group) -> int:
    """Of one merge on the device."""
    modules, *shape = group.packed.shape
    return modules * _merging_bytes(group.plan.rule, *shape)


def _merging_bytes(rule: Rule, adapters: int, rows: int, columns: int) -> int:
    """Of the merge of one module: its delta, and where thresholds are searched what that takes."""
    searched = {"magnitude": rule.scope == "tensor", "band": 2}.get(rule.keep, 0)
    return 4 * rows * columns + searched * adapters * search_bytes(rows * columns)


def _keep(groups: Sequence[Group], source: Source) -> Keep:
    """What every task tensor of the groups keeps."""
    keep = groups[0].plan.rule.keep
    if keep not in _KEEPS:
        raise ValueError(f"the Triton backend has no keep {keep!r}")
    return _KEEPS[keep](groups, source)


def _all(groups: Sequence[Group], source: Source) -> Keep:
    return None


def _magnitude(groups: Sequence[Group], source: Source) -> Keep:
    plan = groups[0].plan
    if plan.spans_model:
        return _joined([_joined([group.trims[module.name] for module in group.modules], 1) for group in groups], 0)
    kept = _numbers(groups, source, Rule.kept)
    different, places = torch.unique(kept, dim=0, return_inverse=True)
    shared = len(different) < len(kept)  # plans that differ in their weights have the same thresholds
    launch = launch_of(source, recipes=len(groups))
    found = trims(source, different if shared else kept, ties=plan.rule.trim_ties, launch=launch)
    if not shared:
        return found
    places = on_device(places, source.x.device)
    return Trim(*(field.index_select(0, places) for field in (found.value, found.row, found.column)))


def _joined(trims: Sequence[Trim], dimension: int) -> Trim:
    value, row, column = ([getattr(trim, name) for trim in trims] for name in ("value", "row", "column"))
    return Trim(torch.cat(value, dimension), torch.cat(row, dimension), torch.cat(column, dimension))


def _band(groups: Sequence[Group], source: Source) -> Keep:
    kept, topped = _numbers(groups, source, Rule.kept), _numbers(groups, source, Rule.topped)
    launch = launch_of(source, recipes=len(groups))
    return bands(source, kept, topped, ties=groups[0].plan.rule.trim_ties, launch=launch)


def _numbers(groups: Sequence[Group], source: Source, number: Callable[[Rule, float, int], int]) -> Tensor:
    """number(rule, density, elements) of every task tensor: int64 [plans, modules, adapters]."""
    numel = source.shape[2] * source.shape[3]
    return torch.tensor(
        [
            [[number(group.plan.rule, density, numel) for density in module.densities] for module in group.modules]
            for group in groups
        ]
    )


def _bernoulli(groups: Sequence[Group], source: Source) -> Keep:
    modules = groups[0].modules
    drop = Drop(
        density=torch.tensor([[module.densities for module in group.modules] for group in groups], dtype=torch.float64),
        seeds=[group.plan.recipe.seed for group in groups],
        streams=torch.tensor([stream_id(module.name, groups[0].side) for module in modules]),
        adapters=torch.tensor(modules[0].adapters),
    )
    return replace(drop, factor=select.l1_factors(source, drop)) if groups[0].plan.rule.l1_rescale else drop


_KEEPS: dict[str, Callable[[Sequence[Group], Source], Keep]] = {
    "all": _all,
    "magnitude": _magnitude,
    "band": _band,
    "bernoulli": _bernoulli,
}


def _modules(source: T, start: int, stop: int | None) -> T:
    if isinstance(source, Lora):
        A, B, scaling = (tensor[start:stop] for tensor in (source.A, source.B, source.scaling))
        return replace(source, A=A, B=B, scaling=scaling)
    return replace(source, x=source.x[start:stop], base=None if source.base is None else source.base[start:stop])


def _readable(pair: Pair) -> Pair:
    return pair if all(factor.dtype in PACKED for factor in pair) else (pair[0].float(), pair[1].float())
