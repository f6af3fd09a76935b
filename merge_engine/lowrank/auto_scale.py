"""scale="auto": the merged delta gets the norm that the adapters' deltas have on average."""

import math
from collections.abc import Sequence


def auto_scale(norms: Sequence[float], merged_norm: float, gain: float = 1.0) -> float:
    """lambda = gain * mean_t |tau_t| / |merged|: the merged delta gets the adapters' mean norm; 1 where merged is 0.

    ``norms``: of the adapters that have the module, whatever their weights. With it a rule's own scale cancels, and of
    weights only ratios matter. Raises ValueError for norms that are none, and a scale that leaves float64.
    """
    if not norms:
        raise ValueError("no norms: wanted those of the merged adapters")
    if not all(math.isfinite(norm) and norm >= 0 for norm in [*norms, merged_norm]):
        raise ValueError(f"norms {list(norms)} and {merged_norm}, wanted finite ones of at least 0")
    if not math.isfinite(gain):
        raise ValueError(f"gain is {gain}, wanted a finite number")
    if merged_norm == 0:
        return 1.0
    found = gain * (math.fsum(norms) / len(norms)) / merged_norm
    if not math.isfinite(found):
        raise ValueError(f"|merged| is {merged_norm:.1e}: no finite scale gives it the norm of the adapters")
    return found
