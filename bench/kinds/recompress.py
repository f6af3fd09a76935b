"""Kind recompress: merges cut to a rank in a PEFT model of two layers: the drop-in against PEFT."""

from functools import partial
from typing import Any

from bench.harness.kind import Entry, Kind
from bench.harness.peft_models import layers_of
from bench.harness.workloads import Workload
from bench.kinds.factors import check, combine


def _model_of(work: Workload, device: str) -> Any:
    """2048 x 2048 and 2048 x 5632, unless shrunk."""
    return layers_of(((work.rows, work.columns), (work.rows, work.columns * 11 // 4)), device)


KIND = Kind(
    {  # for each element of the first layer, the only one that the workload counts
        "drop-in": Entry(partial(combine, "drop-in", _model_of), ns=30),
        "PEFT": Entry(partial(combine, "PEFT", _model_of), ns=900),
    },
    partial(check, _model_of),
    checking=150,
    has_rates=False,
)
