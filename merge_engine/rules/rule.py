"""The arithmetic of a merge, as data: keep x elect x combine, and the tables of methods and conventions.

A rule acts on task tensors ``t_i`` (deltas, factors, or finetuned - base) with weights ``w_i``::

    t_i    <- keep(t_i)                             all, the k largest magnitudes, a band, or a random share
    sign   <- elect(t_1, ..., t_n)                  none, sign of the sum, or sign of the sum of signs
    merged <- scale * combine(w_i t_i where sign(t_i) = sign)     sum, or mean over those that agree, max, consensus

Sources: TIES (Yadav et al. 2023, arXiv:2306.01708), DARE (Yu et al. 2023, arXiv:2311.03099), Breadcrumbs (Davari and
Belilovsky 2023, arXiv:2312.06795), the unified task vector of EMR-Merging ("max"; Huang et al. 2024, arXiv:2405.17461),
TALL masks and Consensus merging (Wang et al. 2024, arXiv:2405.07813).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from merge_engine.errors import RecipeError
from merge_engine.rules.conventions import CONVENTIONS
from merge_engine.rules.guesses import did_you_mean
from merge_engine.rules.methods import GAMMA, MASK, METHODS, MIN_TASKS, Divisor, Keep, Scope, TrimTies, looks_at

T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """keep x elect x combine with every switch set; built by `make_rule`, read by the reference and by both backends.

    combine: the sum of the elected side; its element of largest magnitude ("max"); or the sum of all, where enough
        adapters account for it ("consensus", see `reference.consensus`).
    divisor: what the combined side is divided by: the number of those that agree, the sum of their weights, or 1.
    gamma: the share of all elements that a band drops at the top. mask, min_tasks: of a consensus. All three are 0
        where the method does not know them.
    """

    keep: Keep
    elect: Literal["none", "total", "frequency"]
    combine: Literal["sum", "max", "consensus"]
    divisor: Divisor
    vote_weighted: bool
    scope: Scope
    trim_ties: TrimTies
    min_k: int
    extra_k: int
    majority: bool
    l1_rescale: bool
    gamma: float = 0.0
    mask: float = 0.0
    min_tasks: int = 0

    def kept(self, density: float, numel: int) -> int:
        """k = max(int(density numel), min_k) + extra_k, at most numel: how many elements a trim keeps."""
        if density >= 1:
            return numel
        return min(max(int(density * numel), self.min_k) + self.extra_k, numel)

    def topped(self, density: float, numel: int) -> int:
        """How many of the largest magnitudes a band drops: int(gamma numel), or as many as are not to be kept."""
        return min(int(self.gamma * numel), numel - self.kept(density, numel))


def make_rule(
    method: str,
    *,
    election: str = "total",
    convention: str = "peft",
    scope: str | None = None,
    trim_ties: str | None = None,
    gamma: float = GAMMA,
    mask: float = MASK,
    min_tasks: int = MIN_TASKS,
) -> Rule:
    """The rule of a named method under a convention; scope and trim_ties override the convention's own.

    Raises RecipeError for an unknown name, listing the known ones, and for a band that is to span the model.
    """
    row = _look_up("method", method, METHODS)
    habits = _look_up("convention", convention, CONVENTIONS)
    if row.keep == "band":
        if scope == "model":
            raise RecipeError(f"scope: {method} has thresholds for each tensor, wanted tensor, got 'model'")
        scope = "tensor" if scope is None else scope
    kept = habits.trim_ties if trim_ties is None else trim_ties
    elected = _look_up("election", election, {"total": "total", "frequency": "frequency"})
    return Rule(
        keep=row.keep,
        elect=elected if row.elects else "none",  # type: ignore[arg-type]
        combine="sum" if row.combine == "mean" else row.combine,  # a mean is a sum with a divisor
        divisor=habits.divisor[row.keep] if row.combine == "mean" else "one",
        vote_weighted=habits.vote_weighted or row.weighs_vote,
        scope=_look_up("scope", habits.scope if scope is None else scope, {"tensor": "tensor", "model": "model"}),
        trim_ties=_look_up("trim_ties", kept, {"exact": "exact", "keep": "keep"}),
        min_k=habits.min_k,
        extra_k=habits.extra_k,
        majority=habits.tied_vote == "majority",
        l1_rescale=habits.l1_rescale,
        gamma=gamma if looks_at(method, "gamma") else 0.0,
        mask=mask if looks_at(method, "mask") else 0.0,
        min_tasks=min_tasks if looks_at(method, "min_tasks") else 0,
    )


def require(rule: Rule, who: str, **known: Sequence[object]) -> None:
    """Raise ValueError unless every named field of the rule has one of the values that ``who`` can compute."""
    for field, values in known.items():
        value = getattr(rule, field)
        if value not in values:
            raise ValueError(f"{who} has no {field} {value!r}, only {', '.join(map(str, values))}")


def _look_up(what: str, name: str, table: Mapping[str, T]) -> T:
    if not isinstance(name, str) or name not in table:
        raise RecipeError(f"{what}: wanted one of {', '.join(table)}, got {name!r}{did_you_mean(name, table)}")
    return table[name]
