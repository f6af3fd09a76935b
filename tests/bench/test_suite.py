"""One workload from its check to its rows."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from bench.harness import measure, suite
from bench.harness.agreement import Disagreement
from bench.harness.machine import Limits
from bench.harness.measure import Contestant, Sample
from bench.harness.suite import measured
from bench.harness.workloads import Workload
from bench.kinds.table import KINDS

DELTAS = KINDS["deltas"]
SMALL = Workload("deltas", "ties", 48, 80)


def test_a_workload_gives_tidy_rows() -> None:
    limits = Limits(bandwidth=1e9, matmul=1e10)
    work = replace(SMALL, vary=("rows", (16, 32)))
    rows = measured(work, DELTAS, limits=limits, seconds=0.0, memory=False)
    names = ["tiled", "PEFT", "reference"]
    assert [(each.workload, each.contestant) for each in rows] == [
        (f"ties 3x r16 {size}x80 d0.2 fp32", name) for size in (16, 32) for name in names
    ]
    for each in rows:
        rival = next(other for other in rows if (other.workload, other.contestant) == (each.workload, "PEFT"))
        assert each.ratio == rival.seconds / each.seconds
        assert each.flops == 2 * 16 * each.rows * 80 * 3
        assert each.nbytes == 4 * each.rows * 80 + 4 * 3 * 16 * (each.rows + 80)
        assert each.matmul_share == pytest.approx(each.flops / each.seconds / 1e10)
        assert each.bandwidth_share == pytest.approx(each.nbytes / each.seconds / 1e9)
        assert each.low <= each.seconds <= each.high


def test_nothing_is_timed_if_results_disagree() -> None:
    zeros = replace(
        DELTAS.entries["PEFT"], build=lambda work, device: Contestant(lambda: torch.zeros(work.rows, work.columns))
    )
    wrong = replace(DELTAS, entries={**DELTAS.entries, "PEFT": zeros})
    with (
        mock.patch.object(measure, "interleaved", side_effect=AssertionError("timed")),
        pytest.raises(Disagreement, match="PEFT is wrong"),
    ):
        measured(SMALL, wrong, memory=False)


@pytest.mark.quick
def test_the_peak_of_several_samples_is_the_largest() -> None:
    """On a GPU every sample has its peak, and no process is forked."""
    samples = [Sample(1.0, None, 9.0, 4.0), Sample(1.0, None, 8.0, 5.0)]
    assert suite._peak(SMALL, "triton", DELTAS, "cuda", samples, forks=True) == (9.0, 5.0)
    whole = [Sample(1.0, None, 9.0), Sample(1.0, None, 10.0)]
    assert suite._peak(SMALL, "merge-engine", DELTAS, "cpu", whole, forks=False) == (10.0, None)
    assert suite._peak(SMALL, "1 thread", DELTAS, "cpu", [Sample(1.0, None)], forks=False) == (None, None)
