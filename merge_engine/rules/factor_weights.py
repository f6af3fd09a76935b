"""What the factors of a delta count where they are merged apart: all A with each other, and all B."""

import math
from collections.abc import Sequence


def factor_weights(strengths: Sequence[float], side: str) -> list[float]:
    """sqrt(|x|) for each strength x = w s of an adapter, weight times scaling; on side "A" with the sign of x.

    So the factors of one adapter multiply out to sign(x) sqrt(|x|) sqrt(|x|) B A = w s B A.
    """
    return [-math.sqrt(-x) if side == "A" and x < 0 else math.sqrt(abs(x)) for x in strengths]
