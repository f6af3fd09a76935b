"""`pytest bench`: every contestant of every workload by pytest-benchmark, once the results of a workload agree."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from bench.contestants import KINDS, taking_part
from bench.measure import LEAST, Contestant
from bench.suite import Key, agreed
from bench.workloads import WORKLOADS, Workload


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shrink", type=int, default=1, help="1/N of the rows, columns and layers")
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    parser.addoption("--longest", type=float, default=12.0, help="seconds that one run of a contestant may take")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("device") == "cpu":
        os.environ["MERGE_ENGINE_BACKEND"] = "torch"  # on a machine with a GPU too


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module's KIND says whose workloads its `case` goes through."""
    if "case" not in metafunc.fixturenames:
        return
    option, cases = metafunc.config.getoption, []
    for work in (work for work in WORKLOADS if work.kind in metafunc.module.KINDS):
        for size in (work.shrunk(option("shrink")) if option("shrink") > 1 else work).sizes():
            entries = taking_part(size, option("device"))
            names = tuple(name for name in entries if entries[name].expected(size) <= option("longest"))
            cases += [(replace(size, only=names), name) for name in names]
    metafunc.parametrize("case", cases, ids=[f"{work.kind} {work.name} {name}" for work, name in cases], indirect=True)


@dataclass(frozen=True)
class Case:
    """One contestant whose results agree with the others'."""

    key: Key
    contestant: Contestant
    device: str

    def time(self, benchmark: Any) -> None:
        """By the wall, a run of a process of its own included."""
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
    """The contestants of a workload, compared; of one workload at a time."""
    last: dict[Workload, dict[Key, Contestant]] = {}

    def contestants(work: Workload, device: str) -> dict[Key, Contestant]:
        if work not in last:
            last.clear()
            last[work] = agreed(work, device)[0]
        return last[work]

    return contestants


@pytest.fixture
def case(request: pytest.FixtureRequest, checked: Callable[[Workload, str], dict[Key, Contestant]]) -> Case:
    device = request.config.getoption("device")
    return Case(request.param, checked(request.param[0], device)[request.param], device)
