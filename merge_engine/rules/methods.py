"""The methods of merging, as rows of a table."""

from dataclasses import dataclass
from typing import Literal

Keep = Literal["all", "magnitude", "bernoulli"]
Election = Literal["total", "frequency"]
Scope = Literal["tensor", "model"]
TrimTies = Literal["exact", "keep"]
Divisor = Literal["count", "weight", "one"]


@dataclass(frozen=True)
class Method:
    """One row of the table of methods."""

    keep: Keep
    elects: bool
    averages: bool


METHODS: dict[str, Method] = {
    "linear": Method("all", elects=False, averages=False),
    "cat": Method("all", elects=False, averages=False),
    "magnitude_prune": Method("magnitude", elects=False, averages=False),
    "ties": Method("magnitude", elects=True, averages=True),
    "dare_linear": Method("bernoulli", elects=False, averages=False),
    "dare_ties": Method("bernoulli", elects=True, averages=True),
}
