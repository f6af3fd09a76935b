"""Kind session: what one more merge costs when only the weights change: by `merge`, and in a `Session`."""

import statistics
from functools import partial

from bench.harness.kind import Entry, Kind
from bench.harness.workloads import SEARCHED
from bench.kinds.many import by_way, check


def _later(seconds: list[float]) -> float:
    """The median merge after the first."""
    return statistics.median(seconds[1:])


CHEAP = {f"{method}, other weights": 0.1 for method in SEARCHED}
KIND = Kind(
    {
        "singly": Entry(partial(by_way, "singly", _later), ns=18, seconds=4, share=CHEAP, devices=("cpu",)),
        "Session": Entry(partial(by_way, "Session", _later), ns=10, seconds=4, share=CHEAP, devices=("cpu",)),
    },
    check,
    checking=0,
    baseline=("singly",),
    forks=False,
    has_rates=False,
    least=1,  # of 4 merges, or 10
)
