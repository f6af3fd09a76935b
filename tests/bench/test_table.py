"""The tables of kinds and workloads."""

import pickle
from dataclasses import replace

import pytest

from bench import report
from bench.harness.suite import agreed, expected, measured
from bench.harness.workloads import WORKLOADS, Workload
from bench.kinds.table import KINDS
from bench.reporting.headlines import HEADLINES

# "elements" and "adapters" have the contestants of "deltas"; the others start processes, and have tests of their own.
IN_THIS_PROCESS = ["select", "deltas", "threads", "parts", "factors", "recompress", "layer"]


@pytest.mark.quick
def test_workloads_have_names_of_their_own_and_contestants() -> None:
    names = [(work.kind, work.name) for work in WORKLOADS]
    assert len(set(names)) == len(names)
    assert all(KINDS[work.kind].taking_part(work, "cpu") for work in WORKLOADS if work.only != ("triton",))
    assert {work.kind for work in WORKLOADS} == set(KINDS)
    known = {(work.kind, size.name) for work in WORKLOADS for size in work.sizes()}
    assert {(headline.kind, headline.workload) for headline in HEADLINES} <= known


@pytest.mark.quick
def test_every_kind_fits_into_ten_minutes() -> None:
    """By the expected costs, and with kinds in order of importance."""
    kinds = [work.kind for work in WORKLOADS]
    last = max(kinds.index(kind) for kind in KINDS)
    needed = sum(expected(work, KINDS[work.kind], "cpu") for work in WORKLOADS[: last + 1])
    assert needed <= 600 - report.ENDING


@pytest.mark.quick
def test_contestants_can_be_sent_to_the_process_that_measures_memory() -> None:
    for kind in KINDS.values():
        for entry in kind.entries.values():
            sent = pickle.loads(pickle.dumps(entry.build))
            assert getattr(sent, "func", sent) is getattr(entry.build, "func", entry.build)


@pytest.mark.parametrize("kind", IN_THIS_PROCESS)
def test_the_first_workload_of_a_kind_agrees_at_a_small_size(kind: str) -> None:
    work = next(work for work in WORKLOADS if work.kind == kind)
    agreed(work.shrunk(32), KINDS[kind], "cpu")


def test_no_contestant_takes_part_that_cannot_run_here_or_was_not_asked_for() -> None:
    work, kind = Workload("deltas", "linear", 48, 80), KINDS["deltas"]
    assert list(kind.taking_part(work, "cpu")) == ["tiled", "PEFT", "reference"]
    assert list(kind.taking_part(work, "cuda")) == ["triton", "PEFT", "reference"]
    asked = ("compiled", "mergekit")
    assert list(kind.taking_part(work, "cpu", asked)) == ["tiled", "PEFT", "reference", "compiled"]
    ties = replace(work, method="ties", only=("tiled",))
    assert list(kind.taking_part(ties, "cpu", asked)) == ["tiled", "compiled", "mergekit"]  # mergekit knows ties only
    assert expected(replace(work, only=("triton",)), kind, "cpu") == 0
    assert measured(replace(work, only=("triton",)), kind) == []
