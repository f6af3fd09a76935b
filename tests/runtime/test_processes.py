"""How several processes share work."""

import numpy as np
import pytest
import torch
from pretended_gpus import pretend_gpus

from merge_engine.runtime.processes import Ranks


def test_ranks_share_by_cost():
    costs = [5, 1, 1, 1, 8, 1, 1]
    shares = [Ranks(rank, 3).share(costs) for rank in range(3)]
    assert [i for share in shares for i in share] == list(range(7))
    assert max(sum(costs[i] for i in share) for share in shares) <= 10


@pytest.mark.parametrize(("group", "want"), [("nccl", "cuda:3"), ("gloo", "cpu"), ("cpu:gloo,cuda:nccl", "cpu")])
def test_counts_are_summed_where_the_process_group_can(monkeypatch, group, want):
    pretend_gpus(monkeypatch, 4, 0, 3)
    moved = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: moved.append(device) or tensor)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: group)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts: counts.mul_(2))  # two that count alike
    assert Ranks(1, 2).sum(np.array([1, 2**40])).tolist() == [2, 2**41]
    assert moved == [torch.device(want)]
