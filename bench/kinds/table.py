"""The kinds of benchmark by name.

A new kind is a file beside this one, a line here, and its lines in `harness.workloads.WORKLOADS`. "elements" and
"adapters" are "deltas" of several sizes, whose times are fitted by a line.
"""

from bench.harness.kind import Kind
from bench.kinds import (
    base,
    deltas,
    factors,
    image,
    layer,
    many,
    parts,
    ranks,
    recompress,
    select,
    session,
    svd_merge,
    threads,
    trial,
    whole,
    whole_models,
)

KINDS: dict[str, Kind] = {
    "select": select.KIND,
    "deltas": deltas.KIND,
    "threads": threads.KIND,
    "parts": parts.KIND,
    "elements": deltas.KIND,
    "adapters": deltas.KIND,
    "factors": factors.KIND,
    "recompress": recompress.KIND,
    "layer": layer.KIND,
    "whole": whole.KIND,
    "image": image.KIND,
    "svd_merge": svd_merge.KIND,
    "base": base.KIND,
    "whole_models": whole_models.KIND,
    "ranks": ranks.KIND,
    "many": many.KIND,
    "session": session.KIND,
    "trial": trial.KIND,
}
