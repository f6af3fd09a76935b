"""The one door to the two backends: which of them computes, and why."""

import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from merge_engine.errors import RecipeError
from merge_engine.plan import ModulePlan, Plan
from merge_engine.ranks import gpu
from merge_engine.torch_backend import TorchBackend

BACKENDS = ("auto", "triton", "torch")
VARIABLE = "MERGE_ENGINE_BACKEND"


class Backend(Protocol):
    """Who computes: merges the task tensors of one side of a group of modules.

    Both backends give the results of `reference`, and random drops the same masks; in the last bits they differ, since
    their products are summed in another order.
    """

    name: str
    device: torch.device

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

    def vote_balance(self, plan: Plan, group: Sequence[ModulePlan], packed: Any, side: str, trims: Any) -> int:
        """How many columns vote + less how many vote -."""
        ...

    def merge(
        self,
        plan: Plan,
        group: Sequence[ModulePlan],
        packed: Any,
        side: str,
        trims: Any,
        *,
        scale: float,
        tied: int,
    ) -> list[Tensor]:
        """scale * combine(elect(keep(t))) for each module of the group, float32 on the backend's device."""
        ...


class ModelBackend(Backend, Protocol):
    """A backend that also merges into a base model."""

    def merge(
        self,
        plan: Plan,
        group: Sequence[ModulePlan],
        packed: Any,
        side: str,
        trims: Any,
        *,
        scale: float,
        tied: int,
        base: Sequence[Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> list[Tensor]:
        """(base +) scale * combine(elect(keep(t))) for each module of the group, on the backend's device.

        base: on the CPU, one [M, N] of any strides for each module; its memory may be taken for the result. dtype: of
        the result, with a base; float32 without one. Computed in float32 and rounded once.
        """
        ...

    def add_product(self, A: Tensor, B: Tensor, base: Tensor, dtype: torch.dtype) -> Tensor:
        """base + B @ A: [M, N] as in `merge`."""
        ...


def choose(name: str | None = None) -> ModelBackend:
    """The backend of that name: "triton", "torch", or "auto", which takes Triton on a GPU and torch elsewhere.

    None: what the environment variable MERGE_ENGINE_BACKEND says, or "auto". Raises RecipeError for an unknown name,
    and for "triton" where it cannot run, with the reason.
    """
    name = name or os.environ.get(VARIABLE) or "auto"
    if name not in BACKENDS:
        raise RecipeError(f"backend: wanted one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "torch":
        return TorchBackend()
    device, reason = triton_device()
    if device is None or (name == "auto" and device.type == "cpu"):
        if name == "triton":
            raise RecipeError(f"backend: triton cannot run here: {reason}")
        return TorchBackend()
    from merge_engine.triton_backend import TritonBackend

    return TritonBackend(device)


def triton_device() -> tuple[torch.device | None, str]:
    """(where Triton's kernels can run, why): this process's GPU (`ranks.gpu`), the CPU if interpreted, or None."""
    try:
        import triton
    except ImportError as error:
        return None, f"triton cannot be imported ({error})"
    if torch.cuda.is_available():
        device = gpu()
        return device, f"triton {triton.__version__} on {torch.cuda.get_device_name(device)}"
    if triton.knobs.runtime.interpret:
        return torch.device("cpu"), f"triton {triton.__version__} in its interpreter (TRITON_INTERPRET=1), very slow"
    return None, f"triton {triton.__version__} sees no CUDA or ROCm device"


def system() -> str:
    """Which backend "auto" takes here, and why: a few lines for `merge-engine info --system`."""
    device, reason = triton_device()
    chosen = choose()
    asked = os.environ.get(VARIABLE)
    lines = [
        f"torch    {torch.__version__}, {torch.get_num_threads()} threads",
        f"triton   {reason}" if device is not None else f"triton   not used: {reason}",
        f"backend  {chosen.name} on {chosen.device}" + (f" ({VARIABLE}={asked})" if asked else ""),
    ]
    return "\n".join(lines)
