"""Merges by the fused Triton kernels: one launch for a group of modules of one shape, on a GPU or interpreted."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from merge_engine import rng
from merge_engine.errors import MergeError, RecipeError
from merge_engine.finetuned import Difference, Finetuned
from merge_engine.kernels import merge as kernels
from merge_engine.kernels import select
from merge_engine.kernels.source import Dense, Drop, Keep, Lora, Source, Trim, pack
from merge_engine.plan import Factors, ModulePlan, Plan, Task

logger = logging.getLogger(__name__)

GROUP_BYTES = 1 << 30  # of merged deltas in one launch, on a GPU
HOST_GROUP_BYTES = 1 << 24  # and in the interpreter
PACKED = (torch.float32, torch.float16, torch.bfloat16)  # what the kernels read as it is; the rest is widened

T = TypeVar("T", Lora, Dense)


class TritonBackend:
    """See `ops.Backend`. device: where the kernels run, the CPU if they are interpreted.

    Factors are packed in pinned memory by the reading thread and copied on a stream of their own, so that one group's
    copies overlap with the launches of the group before it. Nothing here waits for the device but a vote's count.
    """

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def groups(self, plan: Plan) -> list[list[ModulePlan]]:
        """Modules that one launch can take: of one shape, and in factor space of one rank and one set of scalings."""
        alike: dict[Any, list[ModulePlan]] = {}
        for module in plan.mine:
            dense = tuple(number for number in module.adapters if isinstance(plan.adapters[number], Finetuned))
            key: tuple[Any, ...] = (module.rows, module.columns, module.adapters if dense else ())
            if plan.recipe.space == "factors":
                rank = plan.adapters[module.adapters[0]].modules[module.name].rank
                key += (rank, module.adapters, module.scalings)
            alike.setdefault(key, []).append(module)
        groups = []
        for key, modules in alike.items():
            budget = HOST_GROUP_BYTES if self.device.type == "cpu" else GROUP_BYTES
            held = len(key[2]) or 1  # whole matrices, not factors, of every input
            size = max(1, budget // (4 * modules[0].rows * modules[0].columns * held))
            groups += [modules[start : start + size] for start in range(0, len(modules), size)]
        return groups

    def pack(self, plan: Plan, group: Sequence[ModulePlan], factors: Sequence[list[Task]], side: str) -> Source:
        """Slabs of the group in host memory, pinned if they go to a GPU; zeros where an adapter lacks a module."""
        numbers = _numbers(plan, group)
        if any(isinstance(task, Difference) for task in factors[0]):
            return self._moved(_pack_dense(group, numbers, factors), pin=True)
        factors = cast(list[list[Any]], factors)
        found = [dict(zip(m.adapters, pairs, strict=True)) for m, pairs in zip(group, factors, strict=True)]
        if side == "delta":
            scalings = [dict(zip(module.adapters, module.scalings, strict=True)) for module in group]
            lora = pack(
                [[_readable(pairs.get(number)) for number in numbers] for pairs in found],
                [[row.get(number, 1.0) for number in numbers] for row in scalings],
            )
            return self._moved(lora, pin=True)
        index = "AB".index(side)
        shape = factors[0][0][index].shape
        x = torch.zeros(len(group), len(numbers), *shape, dtype=_common_dtype(factors, index))
        for i, pairs in enumerate(found):
            for j, number in enumerate(numbers):
                if number in pairs:
                    x[i, j].copy_(pairs[number][index])
        return self._moved(Dense(x), pin=True)

    def model_trims(self, plan: Plan, side: str) -> dict[str, Trim]:
        """Thresholds that span the model, by the first module of each group. All factors are on the device at once."""
        if plan.ranks.world > 1:
            raise RecipeError("scope: model over several ranks is not supported by triton; backend='torch' does it")
        groups = self.groups(plan)
        kept = torch.tensor([[plan.kept_of_model(number, side) for number in range(len(plan.adapters))]])
        order = [plan.modules.index(module) for group in groups for module in group]
        try:
            packed = [self.pack(plan, group, [plan.read(module) for module in group], side) for group in groups]
            sources = [self._on_device(each) for each in packed]
            trims = select.model_trims(sources, kept, ties=plan.rule.trim_ties, order=order)
        except torch.OutOfMemoryError as error:
            raise MergeError(
                f"{self.device}: scope='model' holds the factors of all adapters there, and they do not fit; "
                "wanted a larger device, or backend='torch'"
            ) from error
        return {group[0].name: trim for group, trim in zip(groups, trims, strict=True)}

    def vote_balance(self, plan: Plan, group: Sequence[ModulePlan], packed: Source, side: str, trims: Any) -> int:
        source, numbers = self._on_device(packed), _numbers(plan, group)
        keep = _keep(plan, group, numbers, source, side, trims.get(group[0].name))
        options: dict[str, Any] = {"elect": plan.rule.elect, "vote_weighted": plan.rule.vote_weighted}
        return int(kernels.vote_balance(source, [_weights(group, numbers, side)], keep, **options).item())

    def merge(
        self,
        plan: Plan,
        group: Sequence[ModulePlan],
        packed: Source,
        side: str,
        trims: Any,
        *,
        scale: float,
        tied: int,
        base: Sequence[Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> list[Tensor]:
        """Out of memory on the device: the group is halved, which changes no number."""
        numbers = _numbers(plan, group)
        waiting = [(group, packed, trims.get(group[0].name))]
        merged: list[Tensor] = []
        while waiting:
            part, slabs, trim = waiting.pop()
            try:
                under = None if base is None else self._stacked(base[len(merged) : len(merged) + len(part)])
                out = {} if under is None else {"base": under, "out": self._empty(under[None], dtype)}
                merged += self._merge(plan, part, numbers, slabs, side, trim, scale=scale, tied=tied, **out)
                continue
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
            half = len(part) // 2
            logger.info("%s: out of memory with %d modules of one shape, going on with half", self.device, len(part))
            waiting.append((part[half:], _modules(slabs, half, None), _modules_of_trim(trim, half, None)))
            waiting.append((part[:half], _modules(slabs, 0, half), _modules_of_trim(trim, 0, half)))
        return merged

    def add_product(self, A: Tensor, B: Tensor, base: Tensor, dtype: torch.dtype) -> Tensor:
        under = self._stacked([base])
        lora = pack([[(A, B)]], [[1.0]], device=self.device)
        return kernels.merge_deltas(lora, [[1.0]], base=under, out=self._empty(under[None], dtype))[0, 0]

    def _stacked(self, base: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack(list(base)).to(self.device)
        return stacked if stacked.dtype in PACKED else stacked.float()

    def _empty(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(like.shape, dtype=dtype if dtype in PACKED else torch.float32, device=self.device)

    def _merge(
        self,
        plan: Plan,
        group: Sequence[ModulePlan],
        numbers: Sequence[int],
        packed: Source,
        side: str,
        trim: Trim | None,
        **options: Any,
    ) -> list[Tensor]:
        source = self._on_device(packed)
        merged = kernels.merge_deltas(
            source,
            [_weights(group, numbers, side)],
            _keep(plan, group, numbers, source, side, trim),
            elect=plan.rule.elect,
            divisor=plan.rule.divisor,
            vote_weighted=plan.rule.vote_weighted,
            **options,
        )
        return list(merged[0].unbind())

    def _on_device(self, packed: Source) -> Source:
        """A copy on the device, made on the copy stream; what is launched next on the current stream waits for it."""
        if self.copies is None:
            return packed
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.copies):
            source = self._moved(packed)
        current.wait_stream(self.copies)
        parts = (source.A, source.B, source.scaling) if isinstance(source, Lora) else (source.x, source.base)
        for tensor in parts:
            if tensor is not None:
                tensor.record_stream(current)
        return source

    def _moved(self, source: T, *, pin: bool = False) -> T:
        if self.copies is None:
            return source

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory() if pin else tensor.to(self.device, non_blocking=True)

        if isinstance(source, Lora):
            return replace(source, A=move(source.A), B=move(source.B), scaling=move(source.scaling))
        return replace(source, x=move(source.x), base=None if source.base is None else move(source.base))


def _pack_dense(group: Sequence[ModulePlan], numbers: Sequence[int], tasks: Sequence[list[Task]]) -> Dense:
    """Whole tasks of modules that full models take part in: x and base as stored, or x - base where factors mix in."""
    shape = (len(group), len(numbers), group[0].rows, group[0].columns)
    mine = [task for row in tasks for task in row]
    dtypes = {task.x.dtype for task in mine if isinstance(task, Difference)}
    bases = {task.base.dtype for task in mine if isinstance(task, Difference)}
    alike = len(dtypes) == len(bases) == 1 and dtypes | bases <= set(PACKED)
    pure = alike and all(isinstance(task, Difference) for task in mine) and len(mine) == shape[0] * shape[1]
    x = torch.zeros(shape, dtype=dtypes.pop() if pure else torch.float32)
    base = torch.zeros(shape[0], *shape[2:], dtype=bases.pop()) if pure else None
    for i, (module, row) in enumerate(zip(group, tasks, strict=True)):
        for number, scaling, task in zip(module.adapters, module.scalings, row, strict=True):
            place = x[i, numbers.index(number)]
            if not isinstance(task, Difference):
                torch.addmm(place, task[1].float(), task[0].float(), beta=0, alpha=scaling, out=place)
            elif base is not None:
                place.copy_(task.x)
                base[i].copy_(task.base)
            else:
                place.copy_(task.x).sub_(task.base.float())
    return Dense(x, base)


def _numbers(plan: Plan, group: Sequence[ModulePlan]) -> list[int]:
    """The adapters that a group's slabs have a place for; thresholds that span the model want all of them."""
    if plan.spans_model:
        return list(range(len(plan.adapters)))
    return sorted({number for module in group for number in module.adapters})


def _weights(group: Sequence[ModulePlan], numbers: Sequence[int], side: str) -> list[float]:
    """One weight an adapter; that of an adapter which no module has does not count."""
    known = {
        number: weight
        for module in group
        for number, weight in zip(module.adapters, module.weights_of(side), strict=True)
    }
    return [known.get(number, 1.0) for number in numbers]


def _keep(
    plan: Plan, group: Sequence[ModulePlan], numbers: Sequence[int], source: Source, side: str, trim: Trim | None
) -> Keep:
    rule = plan.rule
    if rule.keep == "all":
        return None
    if plan.spans_model:
        return trim
    densities = [dict(zip(module.adapters, module.densities, strict=True)) for module in group]
    if rule.keep == "magnitude":
        numel = source.shape[2] * source.shape[3]
        kept = [[rule.kept(row[number], numel) if number in row else 0 for number in numbers] for row in densities]
        return select.trims(source, torch.tensor([kept]), ties=rule.trim_ties)
    drop = Drop(
        density=torch.tensor(
            [[[row.get(number, 1.0) for number in numbers] for row in densities]], dtype=torch.float64
        ),
        seeds=[plan.recipe.seed],
        streams=torch.tensor([rng.stream_id(module.name, side) for module in group]),
        adapters=torch.tensor(numbers),
    )
    return replace(drop, factor=select.l1_factors(source, drop)) if rule.l1_rescale else drop


def _modules(source: T, start: int, stop: int | None) -> T:
    if isinstance(source, Lora):
        A, B, scaling = (tensor[start:stop] for tensor in (source.A, source.B, source.scaling))
        return replace(source, A=A, B=B, scaling=scaling)
    return replace(source, x=source.x[start:stop], base=None if source.base is None else source.base[start:stop])


def _modules_of_trim(trim: Trim | None, start: int, stop: int | None) -> Trim | None:
    if trim is None:
        return None
    return Trim(*(tensor[:, start:stop] for tensor in (trim.value, trim.row, trim.column)))


def _readable(pair: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    if pair is None or all(factor.dtype in PACKED for factor in pair):
        return pair
    return pair[0].float(), pair[1].float()


def _common_dtype(factors: Sequence[Factors], index: int) -> torch.dtype:
    found = {pair[index].dtype for pairs in factors for pair in pairs}
    return found.pop() if len(found) == 1 and found <= set(PACKED) else torch.float32
