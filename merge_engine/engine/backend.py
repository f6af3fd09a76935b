"""What a backend must do: merge the task tensors of a group of modules. The engine knows no more of one."""

from collections.abc import Callable, Hashable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from merge_engine.engine.plan import ModulePlan, Plan

Known = MutableMapping[Hashable, Any]


@dataclass(frozen=True, eq=False)
class Group:
    """Modules that are merged at once, seen from one side.

    packed: their task tensors, as `Backend.pack` made them. side: "delta", "A" or "B".
    trims: thresholds that span the model, as `Backend.model_trims` found them.
    tied: the side (+1, -1) that a column with a vote of 0 elects.
    """

    plan: Plan
    modules: Sequence[ModulePlan]
    side: str
    packed: Any
    trims: Any
    tied: int = 1

    def part(self, modules: Sequence[ModulePlan], packed: Any) -> "Group":
        """Some of the modules, with their task tensors."""
        return replace(self, modules=modules, packed=packed)

    @property
    def weights(self) -> list[float]:
        """What each task tensor counts; the same in all modules of the group."""
        return self.modules[0].weights_of(self.side)


class Backend(Protocol):
    """Who computes: merges the task tensors of one side of a group of modules.

    Both backends give the results of `rules.reference`, and random drops the same masks; in the last bits they differ,
    since their products are summed in another order.
    merges_several: whether plans over the same adapters are best merged module by module, by `merge_several`; else they
    are group by group, by `merge_together`.
    cuts_groups: whether the results of a group are best cut to a rank all at once, by `cut_group`.
    """

    name: str
    device: torch.device
    merges_several: bool
    cuts_groups: bool

    @property
    def identity(self) -> str:
        """What a result depends on to the last bit: the name, and with what it computes."""
        ...

    def groups(self, plan: Plan) -> list[list[ModulePlan]]:
        """All modules of the plan that are this process's, in groups that are merged at once.

        Modules of a group have the same adapters, with the same weights. No result depends on how they are grouped.
        """
        ...

    def pack(self, plan: Plan, group: Sequence[ModulePlan], factors: Sequence[list[Any]], side: str) -> Any:
        """The task tensors of a group, ready for `merge`; called by the thread that reads."""
        ...

    def model_trims(self, plan: Plan, side: str) -> Any:
        """The thresholds of all adapters in this process's modules, where they span the model; every rank calls it."""
        ...

    def vote_balance(self, group: Group) -> int:
        """How many columns vote + less how many vote -."""
        ...

    def merge(
        self,
        group: Group,
        *,
        scale: float = 1.0,
        base: Sequence[Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> list[Tensor]:
        """(base +) scale * combine(elect(keep(t))) for each module of the group, on the backend's device.

        base: on the CPU, one [M, N] of any strides for each module; its memory may be taken for the result. dtype: of
        the result, with a base; float32 without one. Computed in float32 and rounded once.
        """
        ...

    def parts(self, merges: Sequence[Sequence[Group]]) -> list[list[int]]:
        """The numbers of merges, in parts that `merge_together` is to take; memory bounds them.

        merges: the same modules in several plans; of each plan all sides.
        """
        ...

    def merge_together(self, groups: Sequence[Group]) -> list[list[Tensor]]:
        """`merge` of each group, with its bits: one side of the same modules in the plans of a part."""
        ...

    def staged(self, tensor: Tensor) -> Tensor:
        """A base as `merge` and `add_product` read it soonest, on the CPU; called by the thread that reads."""
        ...

    def home(self, merged: Tensor) -> Callable[[], Tensor]:
        """Start to copy a result to the CPU. What is returned waits for the copy, on any thread, and gives it."""
        ...

    def add_product(self, A: Tensor, B: Tensor, base: Tensor, dtype: torch.dtype) -> Tensor:
        """base + B @ A: [M, N] as in `merge`."""
        ...

    def specs(self, groups: Sequence[Group], known: Sequence[Known]) -> Sequence[Hashable]:
        """What `merge_several` is to do for each group; equal specifications have the same result.

        groups: one module of the same adapters, in several plans. known: for each adapter, what was found before of its
        task tensor here (thresholds, drops); what is found now is added.
        """
        ...

    def merge_several(self, packed: Any, specs: Sequence[Any]) -> list[Tensor]:
        """The merged task tensor [M, N] of one module for each specification, with the bits of `merge`."""
        ...

    def working_bytes(self, adapters: int, results: int = 1) -> int:
        """Host memory that merging a module of so many adapters into so many results takes beside them."""
        ...
