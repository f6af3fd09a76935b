"""How several processes share work."""

import socket
from datetime import timedelta

import numpy as np
import pytest
import torch
from pretended_gpus import pretend_gpus

from merge_engine.errors import OutputError, RecipeError
from merge_engine.runtime import processes
from merge_engine.runtime.processes import ALONE, Ranks, join


def test_ranks_share_by_cost():
    costs = [5, 1, 1, 1, 8, 1, 1]
    shares = [Ranks(rank, 3).share(costs) for rank in range(3)]
    assert [i for share in shares for i in share] == list(range(7))
    assert max(sum(costs[i] for i in share) for share in shares) <= 10
    assert Ranks(0, 2).share([1] * 8 + [8]) == range(8)
    assert Ranks(1, 2).share([9, 10]) == range(1, 2)


@pytest.mark.parametrize(("group", "want"), [("nccl", "cuda:3"), ("gloo", "cpu"), ("cpu:gloo,cuda:nccl", "cpu")])
def test_counts_are_summed_where_the_process_group_can(monkeypatch, group, want):
    pretend_gpus(monkeypatch, 4, 0, 3)
    moved = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: moved.append(device) or tensor)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: group)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts: counts.mul_(2))  # two that count alike
    assert Ranks(1, 2).sum(np.array([1, 2**40])).tolist() == [2, 2**41]
    assert moved == [torch.device(want)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK is not set; start by torchrun, or unset WORLD_SIZE"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "RANK below WORLD_SIZE, got RANK '0' and WORLD_SIZE 'two'"),
        ({"WORLD_SIZE": "2", "RANK": ""}, "RANK below WORLD_SIZE, got RANK '' and WORLD_SIZE '2'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK below WORLD_SIZE, got RANK '2' and WORLD_SIZE '2'"),
    ],
)
def test_an_environment_without_sense_is_refused(monkeypatch, given, message):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert join() == ALONE
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=message):
        join()


def test_a_rank_does_not_wait_for_ever_for_the_others(monkeypatch):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(processes, "_STARTING", timedelta(seconds=1))
    with pytest.raises(OutputError, match="rank 0 has waited 1 s, and not all 2 are there"):
        join()
