"""What a kind of benchmark is: who takes part, how their results are checked, and what is measured of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.harness.measure import LEAST, Contestant
from bench.harness.workloads import Workload

Build = Callable[[Workload, str], Contestant]  # (workload, device) -> a contestant that is ready to run
Results = Mapping[str, Any]  # by contestant
Check = Callable[[Workload, Results, str], Mapping[str, float] | None]


@dataclass(frozen=True)
class Entry:
    """One contestant of a kind, and the first guess of its time.

    build: a function of a module, or a partial of one, since it is sent to another process to measure memory there.
    ns, seconds: a run is expected to take `seconds` + `ns` nanoseconds for each element and adapter (on two CPU cores).
    share: {method: factor on ns} where it is not 1.
    on_request: it takes part only if its name is asked for.
    methods: those that it can do; empty: all.
    """

    build: Build
    ns: float = 0.0
    seconds: float = 0.0
    share: Mapping[str, float] = field(default_factory=dict)
    on_request: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    methods: tuple[str, ...] = ()

    def expected(self, work: Workload) -> float:
        """Seconds of one run."""
        return self.seconds + 1e-9 * self.ns * self.share.get(work.method, 1.0) * work.elements * work.adapters


@dataclass(frozen=True)
class Kind:
    """One kind of benchmark.

    check: (workload, results, device): raises Disagreement unless the results of the contestants agree. Where there is
        a best approximation, it returns how much larger than its error the error of each contestant is (0: equal).
    checking: nanoseconds that the check takes for each element and adapter.
    baseline: ratios are to the first of these that takes part.
    forks: memory is measured in a forked process, once for each contestant.
    has_rates: the least bytes and flops of the work are known, and so its shares of the machine's best rates.
    least: rounds.
    """

    entries: Mapping[str, Entry]
    check: Check
    checking: float = 80.0
    baseline: tuple[str, ...] = ("PEFT", "reference")
    forks: bool = True
    has_rates: bool = True
    least: int = LEAST

    def taking_part(self, work: Workload, device: str, asked: tuple[str, ...] = ()) -> dict[str, Entry]:
        """The contestants of a workload that can run here, and are wanted: named by the workload, or asked for."""
        return {
            name: entry
            for name, entry in self.entries.items()
            if device in entry.devices
            and (name in asked if entry.on_request else not work.only or name in work.only)
            and (not entry.methods or work.method in entry.methods)
        }
