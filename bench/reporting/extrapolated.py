"""What PEFT would take for a whole merge, from its times on one layer of each shape."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from bench.harness.inputs import TINY_LLAMA
from bench.harness.row import Row

EXTRAPOLATED = "PEFT, extrapolated from one layer of each shape"


def with_extrapolation(rows: Iterable[Row]) -> list[Row]:
    """The rows, and after each row of kind `whole` one for PEFT, which becomes its baseline.

    PEFT's row is the sum over shapes of (number of layers of that shape) * (PEFT's row of kind `layer`): of seconds,
    quartiles and CPU seconds; it has no memory. `source` names the rows that were added up. A whole merge gets none
    unless it is of a TinyLlama, and every shape was measured with the same settings.
    """
    ours = [row for row in rows if row.contestant != EXTRAPOLATED]
    layers = {_key(row, row.contestant, row.method, row.rows, row.columns): row for row in ours if row.kind == "layer"}
    found = []
    for row in ours:
        theirs = _extrapolated(row, layers) if row.kind == "whole" else None
        if theirs is None:
            found.append(row)
        else:
            found += [replace(row, baseline=EXTRAPOLATED, ratio=theirs.seconds / row.seconds), theirs]
    return found


def _key(row: Row, contestant: str, method: str, rows: int, columns: int) -> tuple[Any, ...]:
    """Identifies a row of kind `layer`: what is given, and the other settings and the machine as in `row`."""
    return contestant, method, rows, columns, row.adapters, row.rank, row.density, row.dtype, row.device, row.threads


def _extrapolated(whole: Row, layers: Mapping[tuple[Any, ...], Row]) -> Row | None:
    counts = Counter(TINY_LLAMA.values())
    keys = {shape: _key(whole, "PEFT", f"{whole.method}_svd", *shape) for shape in sorted(counts)}
    is_tiny_llama = whole.elements == whole.layers * sum(map(math.prod, TINY_LLAMA.values()))
    if not is_tiny_llama or not set(keys.values()) <= layers.keys():
        return None
    parts = [(whole.layers * counts[shape], layers[key]) for shape, key in keys.items()]

    def total(name: str) -> float:
        return sum(count * getattr(part, name) for count, part in parts)

    return replace(
        whole,
        contestant=EXTRAPOLATED,
        baseline=EXTRAPOLATED,
        ratio=1.0,
        runs=min(part.runs for _, part in parts),
        seconds=total("seconds"),
        low=total("low"),
        high=total("high"),
        processor=None if any(part.processor is None for _, part in parts) else total("processor"),
        peak_mib=None,
        extra_mib=None,
        excess=None,
        kept_energy=None,
        source=" + ".join(f"{count} x {part.kind}: {part.workload}, {part.contestant}" for count, part in parts),
    )
