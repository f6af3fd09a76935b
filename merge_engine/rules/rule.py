"""The arithmetic of a merge, as data: keep x elect x combine, and the tables of methods and conventions.

A rule acts on task tensors ``t_i`` (deltas, factors, or finetuned - base) with weights ``w_i``::

    t_i    <- keep(t_i)                             all, the k largest magnitudes, or a random share
    sign   <- elect(t_1, ..., t_n)                  none, sign of the sum, or sign of the sum of signs
    merged <- scale * combine(w_i t_i where sign(t_i) = sign)     sum, or mean over those that agree

Sources: TIES (Yadav et al. 2023, arXiv:2306.01708), DARE (Yu et al. 2023, arXiv:2311.03099).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from merge_engine.errors import RecipeError
from merge_engine.rules.conventions import CONVENTIONS
from merge_engine.rules.methods import METHODS, Divisor, Keep, Scope, TrimTies

T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """keep x elect x combine with every switch set; built by `make_rule`, read by the reference and by both backends.

    divisor: what the combined side is divided by: the number of those that agree, the sum of their weights, or 1.
    """

    keep: Keep
    elect: Literal["none", "total", "frequency"]
    combine: Literal["sum"]
    divisor: Divisor
    vote_weighted: bool
    scope: Scope
    trim_ties: TrimTies
    min_k: int
    extra_k: int
    majority: bool
    l1_rescale: bool

    def kept(self, density: float, numel: int) -> int:
        """k = max(int(density numel), min_k) + extra_k, at most numel: how many elements a trim keeps."""
        if density >= 1:
            return numel
        return min(max(int(density * numel), self.min_k) + self.extra_k, numel)


def make_rule(
    method: str,
    *,
    election: str = "total",
    convention: str = "peft",
    scope: str | None = None,
    trim_ties: str | None = None,
) -> Rule:
    """The rule of a named method under a convention; scope and trim_ties override the convention's own.

    Raises RecipeError for an unknown name, listing the known ones.
    """
    row = _look_up("method", method, METHODS)
    habits = _look_up("convention", convention, CONVENTIONS)
    elected = _look_up("election", election, {"total": "total", "frequency": "frequency"})
    return Rule(
        keep=row.keep,
        elect=elected if row.elects else "none",  # type: ignore[arg-type]
        combine="sum",  # a mean is a sum with a divisor
        divisor=habits.divisor[row.keep] if row.combine == "mean" else "one",
        vote_weighted=habits.vote_weighted,
        scope=_look_up("scope", scope or habits.scope, {"tensor": "tensor", "model": "model"}),
        trim_ties=_look_up("trim_ties", trim_ties or habits.trim_ties, {"exact": "exact", "keep": "keep"}),
        min_k=habits.min_k,
        extra_k=habits.extra_k,
        majority=habits.tied_vote == "majority",
        l1_rescale=habits.l1_rescale,
    )


def require(rule: Rule, who: str, **known: Sequence[str]) -> None:
    """Raise ValueError unless every named field of the rule has one of the values that ``who`` can compute."""
    for field, values in known.items():
        value = getattr(rule, field)
        if value not in values:
            raise ValueError(f"{who} has no {field} {value!r}, only {', '.join(values)}")


def _look_up(what: str, name: str, table: Mapping[str, T]) -> T:
    if not isinstance(name, str) or name not in table:
        raise RecipeError(f"{what}: wanted one of {', '.join(table)}, got {name!r}")
    return table[name]
