"""Memory and time of runs in processes of their own."""

import sys
from dataclasses import replace

import pytest

from bench.harness.processes import peak_memory, whole_process
from bench.harness.workloads import Workload
from bench.kinds.table import KINDS

ENTRIES = KINDS["deltas"].entries


@pytest.mark.quick
def test_cpu_time_of_a_process_includes_its_children() -> None:
    """The process and its child take 0.2 seconds of CPU each."""
    spin = "import time\nwhile time.process_time() < 0.2: pass"
    both = f"import subprocess, sys\n{spin}\nsubprocess.run([sys.executable, '-S', '-c', {spin!r}])"
    sample = whole_process([sys.executable, "-S", "-c", both])
    assert sample.processor is not None and sample.processor >= 0.4
    with pytest.raises(RuntimeError, match="nonsense"):
        whole_process([sys.executable, "-S", "-c", "import nonsense"])


def test_peak_memory_counts_the_run_alone(importable: None) -> None:
    """It counts neither what the build holds, nor the peak of the warm-up, which is four times as large here."""
    work = Workload("deltas", "linear", 1024, 1024)
    peak = peak_memory(ENTRIES["PEFT"].build, (replace(work, rows=4096), "cpu"), (work, "cpu"))
    # Three deltas of 4 MiB are there at once as such, stacked, and weighted; the result is one more.
    assert peak.peak_mib is not None and peak.extra_mib is not None
    assert 36 <= peak.peak_mib <= 72  # four times as much for the warm-up
    assert peak.peak_mib - peak.extra_mib == pytest.approx(4.0)


def test_the_error_of_a_run_in_another_process_is_raised_here(importable: None) -> None:
    small = Workload("deltas", "ties", 48, 80)
    with pytest.raises(RuntimeError, match="nonsense"):
        peak_memory(ENTRIES["tiled"].build, (small, "cpu"), (replace(small, method="nonsense"), "cpu"))
