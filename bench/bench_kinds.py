"""Every contestant of every workload, timed by pytest-benchmark: `pytest bench`, or one kind: `pytest bench -k select`.

The cases are made in conftest.py from the tables of kinds and workloads: a new kind needs nothing here.
"""

from typing import Any


def test_contestant(case: Any, benchmark: Any) -> None:
    case.time(benchmark)
