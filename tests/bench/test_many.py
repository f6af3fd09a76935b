"""Kinds many and session."""

import io
import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest

from bench.harness.agreement import Disagreement
from bench.harness.suite import measured
from bench.harness.workloads import Workload
from bench.kinds.many import GRIDS, work_in_this_process
from bench.kinds.table import KINDS


@pytest.fixture
def work(tiny: str) -> Workload:
    return Workload("many", "linear, weights x scale", adapters=8, layers=1, model=tiny)


def test_a_way_reports_from_a_process_of_its_own(work: Workload) -> None:
    (made,) = measured(replace(work, only=("singly",)), KINDS["many"], least=1, most=1)
    assert (made.contestant, made.ratio) == ("singly", 1.0)
    assert made.peak_mib is not None and made.peak_mib > 50  # an interpreter with torch
    assert made.processor is not None and made.processor > 0


@pytest.mark.quick
def test_every_way_gives_the_same_bits(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers run in this process, one after another."""

    def run_worker(way: str, adapters: Sequence[Path], grid: str) -> str:
        with redirect_stdout(io.StringIO()) as printed:
            work_in_this_process(way, json.dumps([str(adapter) for adapter in adapters]), json.dumps(GRIDS[grid]))
        return printed.getvalue()

    monkeypatch.setattr("bench.kinds.many.run_worker", run_worker)
    singly, at_once, session = measured(work, KINDS["many"], least=1, most=1)
    assert [each.contestant for each in (singly, at_once, session)] == ["singly", "merge_many", "Session"]
    assert at_once.ratio == singly.seconds / at_once.seconds
    assert all(each.processor and each.peak_mib for each in (singly, at_once, session))
    for kind in ("many", "session"):
        with pytest.raises(Disagreement, match="different bits"):
            KINDS[kind].check(work, {"singly": "one", "Session": "other"}, "cpu")


@pytest.mark.quick
def test_a_session_counts_the_merges_after_the_first(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [9.0, 1.0, 4.0, 2.0]
    printed = json.dumps([seconds, "digest", 2**20, [2 * each for each in seconds]])
    monkeypatch.setattr("bench.kinds.many.run_worker", lambda way, adapters, grid: printed)
    session = replace(work, kind="session", method="ties, other weights")
    made = measured(session, KINDS["session"], least=1, most=1)
    assert [(each.seconds, each.processor, each.peak_mib) for each in made] == [(2.0, 4.0, 1.0)] * 2
    made = measured(work, KINDS["many"], least=1, most=1)
    assert [(each.seconds, each.processor) for each in made] == [(16.0, 32.0)] * 3
