"""The processes that work on one merge together, as torchrun starts them; usually there is one."""

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch

from merge_engine.errors import OutputError, RecipeError, about

_STARTING = timedelta(minutes=5)  # so long a rank waits for the others to start
_PATIENCE = timedelta(days=7)  # a rank that is done waits so long for the others; one that dies is noticed at once


@dataclass(frozen=True)
class Ranks:
    """This process, and how many there are. `sum` and `wait` must be called by every rank, in the same order."""

    rank: int = 0
    world: int = 1

    def sum(self, counts: np.ndarray) -> np.ndarray:
        """The sum of every rank's int64 array, on every rank."""
        if self.world == 1:
            return counts
        import torch.distributed as dist

        device = gpu() if dist.get_backend() == "nccl" else torch.device("cpu")
        values = torch.from_numpy(np.ascontiguousarray(counts, np.int64)).to(device)
        self._together(dist.all_reduce, values)
        return values.cpu().numpy()

    def wait(self) -> None:
        """Return when every rank has called this."""
        self.sum(np.zeros(1, np.int64))

    def share(self, costs: Sequence[int]) -> range:
        """The indices of this rank's jobs: neighbours, so chosen that all ranks' costs are as even as that allows."""
        ends = np.concatenate([[0], np.cumsum(costs)])
        edges = [ends[-1] * rank / self.world for rank in range(self.world + 1)]
        places = [int(np.abs(ends - edge).argmin()) for edge in edges]
        return range(places[self.rank], places[self.rank + 1])

    def _together(self, operation: Any, *arguments: Any) -> None:
        try:
            operation(*arguments)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise OutputError(f"another rank is gone ({first}); run the same command to go on") from error


ALONE = Ranks()


def join() -> Ranks:
    """Connect the processes that torchrun started (RANK and WORLD_SIZE are set); ALONE where it started none.

    An existing process group is used as it is; else one is made with gloo, which is enough for counts.

    Raises RecipeError as `asked_for`; OutputError where a rank does not start within 5 minutes of this one.
    """
    ranks = asked_for()
    if ranks.world == 1:
        return ALONE
    import torch.distributed as dist

    if not dist.is_initialized():
        with about("ranks"):  # a ValueError comes from an environment that torchrun has not set
            _meet(ranks)
        atexit.register(_leave)
    return ranks


def asked_for() -> Ranks:
    """RANK and WORLD_SIZE of the environment; ALONE where it has no WORLD_SIZE, or 1.

    Raises RecipeError where one is missing beside the other or is no number, or RANK is not below WORLD_SIZE.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    rank = os.environ.get("RANK", "0" if world == "1" else None)
    if rank is None:
        raise RecipeError(f"ranks: WORLD_SIZE is {world} and RANK is not set; start by torchrun, or unset WORLD_SIZE")
    if not (world.isdecimal() and rank.isdecimal() and int(rank) < int(world)):
        raise RecipeError(f"ranks: wanted numbers, RANK below WORLD_SIZE, got RANK {rank!r} and WORLD_SIZE {world!r}")
    return Ranks(int(rank), int(world))


def _meet(ranks: Ranks) -> None:
    """Wait until every rank is there, and make their process group."""
    import torch.distributed as dist

    try:
        found, _, _ = next(dist.rendezvous("env://", timeout=_STARTING))
        store = dist.PrefixStore("merge_engine", found)
        store.set(f"rank {ranks.rank}", "here")
        store.wait([f"rank {rank}" for rank in range(ranks.world)], _STARTING)
    except RuntimeError as error:
        raise OutputError(
            f"ranks: rank {ranks.rank} has waited {_STARTING.total_seconds():g} s, and not all {ranks.world} are there"
        ) from error
    group: dict[str, Any] = {"store": store, "rank": ranks.rank, "world_size": ranks.world, "timeout": _PATIENCE}
    ranks._together(lambda: dist.init_process_group("gloo", **group))


def gpu() -> torch.device:
    """The GPU that this process computes on; it must see at least one.

    The current one (`torch.cuda.set_device`), unless that is the first. Else, under torchrun, the one with the number
    LOCAL_RANK modulo the number of GPUs. Else the first.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", torch.cuda.current_device() or local % torch.cuda.device_count())


def _leave() -> None:
    """Destroy the process group while Python still runs: else its threads abort the process when it ends."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
