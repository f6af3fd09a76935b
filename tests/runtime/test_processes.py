"""How several processes share work."""


def test_ranks_share_by_cost():
    from merge_engine.runtime.processes import Ranks

    costs = [5, 1, 1, 1, 8, 1, 1]
    shares = [Ranks(rank, 3).share(costs) for rank in range(3)]
    assert [i for share in shares for i in share] == list(range(7))
    assert max(sum(costs[i] for i in share) for share in shares) <= 10
