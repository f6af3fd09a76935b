"""Kind whole."""

from bench.harness.suite import measured
from bench.harness.workloads import Workload
from bench.kinds.table import KINDS


def test_a_whole_merge_knows_its_energy_and_error(tiny: str) -> None:
    (made,) = measured(Workload("whole", "ties", layers=2, model=tiny), KINDS["whole"], least=1, most=1)
    assert made.peak_mib is not None and made.peak_mib > 50  # an interpreter with torch
    assert made.processor is not None and made.processor > 0
    assert made.kept_energy is not None and 0.2 < made.kept_energy < 1
    assert made.excess is not None and -1e-6 < made.excess <= 1e-3
    assert (made.layers, made.elements) == (2, 2 * (4 * 64 * 64 + 3 * 64 * 96))
