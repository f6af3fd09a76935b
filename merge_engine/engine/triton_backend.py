"""Merges by the fused Triton kernels: one launch for a group of modules of one shape, on a GPU or interpreted."""

import logging
from collections.abc import Callable, Sequence
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
from merge_engine.kernels.source import Dense, Drop, Keep, Lora, Pair, Source, Trim, pack
from merge_engine.kernels.trims import bands, trims
from merge_engine.models.finetuned import Difference, Finetuned
from merge_engine.rules.philox import stream_id
from merge_engine.rules.rule import require

logger = logging.getLogger(__name__)
GROUP_BYTES = 1 << 30  # of merged deltas in one launch, on a GPU
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
    merges_several = False  # plans one after the other: a launch takes many modules of one plan

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
            budget = HOST_GROUP_BYTES if self.device.type == "cpu" else GROUP_BYTES
            first = modules[0]
            dense = any(isinstance(plan.adapters[number], Finetuned) for number in first.adapters)
            held = len(first.adapters) if dense else 1  # whole matrices, not factors, of every input
            size = max(1, budget // (4 * first.rows * first.columns * held))
            groups += [modules[start : start + size] for start in range(0, len(modules), size)]
        return groups

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
        return int(kernels.vote_balance(source, [group.weights], _keep(group, source), **options).item())

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
            return self._merge(group, scale=scale)
        under = self._stacked(base)
        return self._merge(group, scale=scale, base=under, out=self._empty(under[None], dtype))

    def _stacked(self, base: Sequence[Tensor]) -> Tensor:
        there = self.copies.up(base)
        stacked = there[0][None].contiguous() if len(there) == 1 else torch.stack(there)
        return stacked if stacked.dtype in PACKED else stacked.float()

    def _empty(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(like.shape, dtype=dtype if dtype in PACKED else torch.float32, device=self.device)

    def _merge(self, group: Group, **options: Any) -> list[Tensor]:
        rule = group.plan.rule
        require(rule, "the Triton backend", combine=("sum", "max", "consensus"), elect=("none", "total", "frequency"))
        require(rule, "the Triton backend", divisor=("count", "weight", "one"))
        source = self._on_device(group.packed)
        merged = kernels.merge_deltas(
            source,
            [group.weights],
            _keep(group, source),
            elect=rule.elect,
            combine=rule.combine,
            divisor=rule.divisor,
            vote_weighted=rule.vote_weighted,
            mask=rule.mask,
            min_tasks=rule.min_tasks,
            tied=group.tied,
            **options,
        )
        return list(merged[0].unbind())

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


def _keep(group: Group, source: Source) -> Keep:
    """What every task tensor of the group keeps."""
    keep = group.plan.rule.keep
    if keep not in _KEEPS:
        raise ValueError(f"the Triton backend has no keep {keep!r}")
    return _KEEPS[keep](group, source)


def _all(group: Group, source: Source) -> Keep:
    return None


def _magnitude(group: Group, source: Source) -> Keep:
    rule = group.plan.rule
    if group.plan.spans_model:
        found = [group.trims[module.name] for module in group.modules]
        value, row, column = ([getattr(trim, name) for trim in found] for name in ("value", "row", "column"))
        return Trim(torch.cat(value, 1), torch.cat(row, 1), torch.cat(column, 1))
    return trims(source, _numbers(group, source, rule.kept), ties=rule.trim_ties)


def _band(group: Group, source: Source) -> Keep:
    rule = group.plan.rule
    kept, topped = _numbers(group, source, rule.kept), _numbers(group, source, rule.topped)
    return bands(source, kept, topped, ties=rule.trim_ties)


def _numbers(group: Group, source: Source, number: Callable[[float, int], int]) -> Tensor:
    """number(density, elements) of every task tensor: int64 [1, modules, adapters]."""
    numel = source.shape[2] * source.shape[3]
    return torch.tensor([[[number(density, numel) for density in module.densities] for module in group.modules]])


def _bernoulli(group: Group, source: Source) -> Keep:
    plan, modules = group.plan, group.modules
    drop = Drop(
        density=torch.tensor([[module.densities for module in modules]], dtype=torch.float64),
        seeds=[plan.recipe.seed],
        streams=torch.tensor([stream_id(module.name, group.side) for module in modules]),
        adapters=torch.tensor(modules[0].adapters),
    )
    return replace(drop, factor=select.l1_factors(source, drop)) if plan.rule.l1_rescale else drop


_KEEPS: dict[str, Callable[[Group, Source], Keep]] = {
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
