"""`pytest bench`: times every contestant of a workload by pytest-benchmark, after their results were found to agree.

`pytest bench -k quick` is a short tour: the smallest workload of each kind in QUICK.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from bench.harness.measure import LEAST, Contestant
from bench.harness.suite import Key, agreed
from bench.harness.workloads import WORKLOADS, Workload
from bench.kinds.table import KINDS
from bench.reporting.headlines import OURS

QUICK = ("deltas", "select")  # kinds that the tour has
LONGEST_QUICK = 3.0  # seconds of one run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shrink", type=int, default=1, help="1/N of the rows, columns and layers")
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    parser.addoption("--longest", type=float, default=12.0, help="leave out contestants whose run takes more seconds")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("device") == "cpu":
        os.environ["MERGE_ENGINE_BACKEND"] = "torch"  # even if there is a GPU


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One `case` for each contestant of each workload."""
    if "case" not in metafunc.fixturenames:
        return
    option, cases = metafunc.config.getoption, []
    for work in WORKLOADS:
        for size in (work.shrunk(option("shrink")) if option("shrink") > 1 else work).sizes():
            entries = KINDS[size.kind].taking_part(size, option("device"))
            names = tuple(name for name in entries if entries[name].expected(size) <= option("longest"))
            cases += [(replace(size, only=names), name) for name in names]
    least: dict[str, Workload] = {}
    for work, _ in cases:
        least[work.kind] = min(least.get(work.kind, work), work, key=lambda each: each.elements * each.adapters)
    metafunc.parametrize("case", [_param(work, name, least) for work, name in cases], indirect=True)


def _param(work: Workload, name: str, least: dict[str, Workload]) -> Any:
    """One contestant as a parameter: who it is, and whether the tour has it."""
    who = f"{name} (ours)" if name in OURS else name
    short = KINDS[work.kind].entries[name].expected(work) <= LONGEST_QUICK
    quick = work.kind in QUICK and least[work.kind].name == work.name and short
    return pytest.param((work, name), id=f"{work.kind}: {work.name}: {who}", marks=[pytest.mark.quick] * quick)


@dataclass(frozen=True)
class Case:
    """One contestant, whose result agrees with those of the others."""

    key: Key
    contestant: Contestant
    device: str

    def time(self, benchmark: Any) -> None:
        """Time it by the wall clock; for a contestant that starts a process, the whole process."""
        work, name = self.key
        benchmark.group = f"{work.kind}: {work.name}"
        benchmark.extra_info |= {"contestant": name, "flops": work.flops, "bytes": work.nbytes}
        run, ready = self.contestant.run, self.contestant.ready

        def finished() -> None:
            run()
            if self.device == "cuda":
                torch.cuda.synchronize()

        rounds = KINDS[work.kind].least
        benchmark.pedantic(finished, setup=ready, rounds=rounds, warmup_rounds=int(rounds == LEAST))


@pytest.fixture(scope="session")
def checked() -> Callable[[Workload, str], dict[Key, Contestant]]:
    """(workload, device) -> its contestants, compared once; those of the latest workload are kept."""
    last: dict[Workload, dict[Key, Contestant]] = {}

    def contestants(work: Workload, device: str) -> dict[Key, Contestant]:
        if work not in last:
            last.clear()
            last[work] = agreed(work, KINDS[work.kind], device)[0]
        return last[work]

    return contestants


@pytest.fixture
def case(request: pytest.FixtureRequest, checked: Callable[[Workload, str], dict[Key, Contestant]]) -> Case:
    device = request.config.getoption("device")
    return Case(request.param, checked(request.param[0], device)[request.param], device)
