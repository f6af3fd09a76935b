"""Kind ranks."""

import os
import time

import pytest

from bench.harness.agreement import Disagreement
from bench.harness.workloads import Workload
from bench.kinds.ranks import digest
from bench.kinds.table import KINDS


def test_ranks_must_write_the_same_bytes(tiny: str) -> None:
    work, kind = Workload("ranks", "dare_ties", layers=1, model=tiny), KINDS["ranks"]
    begun = time.perf_counter()
    sample = kind.entries["2 ranks"].build(work, "cpu").run()
    assert 0 <= sample.seconds < time.perf_counter() - begun  # as the merge reports, which is a part of the whole
    output, first = sample.result
    assert sorted(file.name for file in output.parent.iterdir()) == ["a", "b", "base", "c", output.name]
    kind.check(work, {"1 rank": sample.result, "2 ranks": sample.result}, "cpu")

    with (output / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    other = digest(output)
    assert other != first
    with pytest.raises(Disagreement, match="different bytes"):
        kind.check(work, {"1 rank": sample.result, "2 ranks": (output, other)}, "cpu")
