"""The result of one contestant on one workload: a row of the report."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Row:
    """One contestant on one workload; the fields are the columns of the CSV file.

    seconds, low, high: median and quartiles of `runs` runs. processor: median of the CPU seconds of all threads.
    peak_mib: peak memory above where the run began, or that of the whole process for the kinds that start one (whole,
        base, whole_models, many, session). extra_mib: peak memory above where the run began, without the result.
    ratio: seconds of the baseline / seconds.
    flops, nbytes: the least that any contestant computes and moves (`Workload`). bandwidth_share, matmul_share: what
        these are per second, as shares of the machine's measured rates.
    excess: error / that of the best approximation - 1. The best is the best cut to the rank, or (kind base) the exact
        sum rounded once.
    kept_energy: the share of the merged deltas' energy that a cut to a rank kept.
    written_mib: what the process gave to a disk to write, median, for the kinds that start one.
    source: the rows that this one is computed from, if it was not measured.
    """

    OF_WORKLOAD: ClassVar = ("method", "rows", "columns", "layers", "adapters", "rank", "density", "dtype", "elements")

    kind: str
    workload: str
    contestant: str
    method: str
    rows: int
    columns: int
    layers: int
    adapters: int
    rank: int
    density: float
    dtype: str
    elements: int
    device: str
    threads: int
    runs: int
    seconds: float
    low: float
    high: float
    processor: float | None = None
    peak_mib: float | None = None
    extra_mib: float | None = None
    baseline: str = ""
    ratio: float | None = None
    flops: int | None = None
    nbytes: int | None = None
    bandwidth_share: float | None = None
    matmul_share: float | None = None
    excess: float | None = None
    kept_energy: float | None = None
    written_mib: float | None = None
    source: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What makes it the same row as one of an earlier report."""
        return self.kind, self.workload, self.contestant, self.device
