"""Clocks and rounds, on a clock that the test moves."""

import time

import pytest

from bench.harness import measure
from bench.harness.measure import Contestant, Sample, interleaved, spread

pytestmark = pytest.mark.quick


def test_spread_is_the_median_and_the_quartiles() -> None:
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == (3.0, 2.0, 4.0, 5)
    assert spread([7.0]) == (7.0, 7.0, 7.0, 1)


def test_contestants_take_turns_and_a_slow_first_run_counts_as_a_round() -> None:
    order: list[str] = []

    class OneSecond(measure.Clock):
        def sample(self, contestant: Contestant) -> Sample:
            return Sample(1.0, contestant.run())

    contestants = {name: Contestant(lambda name=name: order.append(name)) for name in "ab"}
    first = {"a": Sample(0.1, None), "b": Sample(2 * measure.SLOW, None)}
    taken = interleaved(contestants, OneSecond(), seconds=0, first=first, least=3, most=9)
    assert "".join(order) == "aabab"
    assert [sample.seconds for sample in taken["b"]] == [2 * measure.SLOW, 1.0, 1.0]
    assert all(sample.result is None for samples in taken.values() for sample in samples)
    order.clear()
    interleaved(contestants, OneSecond(), seconds=10.5, least=1, most=9)
    assert "".join(order) == "ab" * 5  # a sixth round would end after 12 seconds


def test_rounds_of_processes_start_with_the_first_run_and_end_by_wall_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may report less than it took: here 1 of 20 seconds."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def run() -> Sample:
        now[0] += 20.0
        return Sample(1.0, None)

    contestants = {name: Contestant(run, own_clock=True) for name in "ab"}
    first = {"a": Sample(0.5, None), "b": Sample(0.1, None)}
    taken = interleaved(contestants, measure.Clock(), seconds=50.0, first=first, least=1, most=9)
    assert [sample.seconds for sample in taken["a"]] == [0.5, 1.0]
    assert len(taken["b"]) == 2


def test_the_clock_does_not_count_what_makes_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: 2 * now[0])

    def takes(seconds: float) -> None:
        now[0] += seconds

    sample = measure.Clock().sample(Contestant(lambda: takes(3.0) or "done", ready=lambda: takes(100.0)))
    assert sample == Sample(3.0, "done", processor=6.0)
