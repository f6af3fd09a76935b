"""What others would take for a whole merge: PEFT from one layer of each shape, kohya's svd_merge from one layer."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from bench.harness.inputs import FLUX, MODELS, TINY_LLAMA
from bench.harness.row import Row

EXTRAPOLATED = "PEFT, extrapolated from one layer of each shape"
SVD_MERGE = "kohya's svd_merge"
OF_ONE_LAYER = f"{SVD_MERGE}, extrapolated from one layer"


def with_extrapolation(rows: Iterable[Row]) -> list[Row]:
    """The rows, and after each of kind `whole` one for PEFT, of kind `image` one for svd_merge: their baselines.

    PEFT's row is the sum over shapes of (number of layers of that shape) * (PEFT's row of kind `layer`): of seconds,
    quartiles and CPU seconds; it has no memory. `source` names the rows that were added up. A whole merge gets none
    unless it is of a TinyLlama, and every shape was measured with the same settings.

    svd_merge's row is its row of kind `svd_merge`, of one layer [m, n] with k = min(m, n), times
    sum(M N min(M, N)) / (m n k) over all layers [M, N]: a singular value decomposition takes time in proportion to
    that. (More is taken where it makes all singular vectors of a layer that is not square, as the script does.)
    """
    ours = [row for row in rows if row.contestant not in (EXTRAPOLATED, OF_ONE_LAYER)]
    layers = {_key(row, row.contestant, row.method, row.rows, row.columns): row for row in ours if row.kind == "layer"}
    found = []
    for row in ours:
        theirs = None
        if row.kind == "whole":
            theirs = _extrapolated(row, layers)
        elif row.kind == "image":
            theirs = _of_one_layer(row, ours)
        if theirs is None:
            found.append(row)
        else:
            found += [replace(row, baseline=theirs.contestant, ratio=theirs.seconds / row.seconds), theirs]
    return found


def _of_one_layer(image: Row, rows: Iterable[Row]) -> Row | None:
    """svd_merge on all layers; None unless one was measured with the same adapters, rank and machine.

    It adds up, whatever the method that it is compared with.
    """
    same = (image.adapters, image.rank, image.device, image.threads)
    part = next(
        (
            row
            for row in rows
            if (row.kind, row.contestant) == ("svd_merge", SVD_MERGE)
            and (row.adapters, row.rank, row.device, row.threads) == same
        ),
        None,
    )
    if part is None or image.elements != image.layers * sum(map(math.prod, MODELS[FLUX].values())):
        return None
    times = image.layers * sum(map(_svd_cost, MODELS[FLUX].values())) / _svd_cost((part.rows, part.columns))
    return replace(
        image,
        contestant=OF_ONE_LAYER,
        baseline=OF_ONE_LAYER,
        ratio=1.0,
        runs=part.runs,
        seconds=times * part.seconds,
        low=times * part.low,
        high=times * part.high,
        processor=None if part.processor is None else times * part.processor,
        peak_mib=None,
        extra_mib=None,
        excess=None,
        kept_energy=None,
        source=f"{times:.1f} x {part.kind}: {part.workload}, {part.contestant}",
    )


def _svd_cost(shape: tuple[int, int]) -> int:
    return math.prod(shape) * min(shape)


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
