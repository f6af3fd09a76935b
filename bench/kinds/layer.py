"""Kind layer: the same as recompress, on one layer of each shape of TinyLlama.

PEFT's time for a whole model is the sum of these: see `reporting.extrapolated`.
"""

from functools import partial
from typing import Any

from bench.harness.kind import Entry, Kind
from bench.harness.peft_models import layers_of
from bench.harness.workloads import Workload
from bench.kinds.factors import check, combine


def _model_of(work: Workload, device: str) -> Any:
    return layers_of(((work.rows, work.columns),), device)


KIND = Kind(
    {
        "drop-in": Entry(partial(combine, "drop-in", _model_of), ns=8),
        "PEFT": Entry(partial(combine, "PEFT", _model_of), ns=200),
    },
    partial(check, _model_of),
    checking=40,
    has_rates=False,
    least=1,
)
