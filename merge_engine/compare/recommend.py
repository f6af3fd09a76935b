"""What to try first with some adapters, and why: sentences that quote the figures of a comparison, and commands."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from merge_engine.compare.figures import Interference, Pair, figure, percent
from merge_engine.compare.interference import interference
from merge_engine.formats.adapter import Adapter
from merge_engine.rules.recipe import DEFAULT_DENSITY, Density

SAME, AKIN, APART, LONGER = 0.95, 0.5, -0.1, 2.0  # cosines, and a ratio of norms, from which a sentence is written
CLASHING = 0.55  # share of opposite signs; of unrelated deltas it is 0.5
_NAMED = 5  # pairs that are named
UNMEASURED = (
    "These sentences are about weights; nothing was evaluated. Score each merge on your own task: "
    "merge-engine search does it with --evaluate."
)


@dataclass(frozen=True)
class Suggestion:
    """A merge to try. recipe: its fields. command: the same for a shell. why: a sentence with the figures."""

    recipe: dict[str, Any]
    command: str
    why: str


@dataclass(frozen=True)
class Recommendation:
    """findings: sentences on the adapters. suggestions: two or three merges, the first one to try first."""

    findings: list[str]
    suggestions: list[Suggestion]

    def text(self) -> str:
        """For a terminal."""
        lines = [*self.findings, "", "Try first:"]
        for number, each in enumerate(self.suggestions, 1):
            lines += [f"{number}. {each.command}", f"   {each.why}"]
        return "\n".join([*lines, "", UNMEASURED])

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "note": UNMEASURED}


def recommend(
    adapters: Sequence[str | Path | Adapter], *, density: Density = DEFAULT_DENSITY, progress: bool | None = None
) -> Recommendation:
    """What to try first: from norms, cosines, sign conflicts and ranks; nothing is evaluated.

    The arguments and errors are those of `interference`.
    """
    return recommendation_of(interference(adapters, density=density, progress=progress))


def recommendation_of(result: Interference) -> Recommendation:
    """The recommendation of a comparison that was made."""
    pairs = [pair for pair in result.pairs() if not math.isnan(pair.cosine)]
    return Recommendation(_findings(result, pairs), _suggestions(result, pairs))


def _findings(result: Interference, pairs: Sequence[Pair]) -> list[str]:
    overall, names = result.overall, result.adapters
    norms = [(norm, name) for norm, name in zip(overall.norms, names, strict=True) if norm > 0]
    found = [
        f"{name} changes nothing: its delta is zero. Leave it out."
        for norm, name in zip(overall.norms, names, strict=True)
        if norm == 0
    ]
    if not pairs:
        return [*found, "No two adapters change the same module: nothing can conflict, and a sum keeps each as it is."]
    found += [
        f"{_both(result, pair)} are nearly the same (cosine {pair.cosine:.3f}): leave one out, or halve both weights."
        for pair in _most(pairs, SAME, above=True)
    ]
    found += [
        f"{_both(result, pair)} pull apart (cosine {pair.cosine:.3f}, {percent(pair.conflict)} of what both keep has "
        "opposite signs): evaluate both tasks after every merge."
        for pair in _most(pairs, APART, above=False)
    ]
    longest, shortest = max(norms), min(norms)
    if longest[0] >= LONGER * shortest[0]:
        found.append(
            f"{longest[1]} has {longest[0] / shortest[0]:.1f} times the norm of {shortest[1]} "
            f"({longest[0]:.3g} and {shortest[0]:.3g}): with equal weights it decides most of a sum."
        )
    low, high = (figure(end(pair.cosine for pair in pairs), ".3f") for end in (min, max))
    many = f"Cosines of the {len(pairs)} pairs are {low} to {high}"
    cosines = many if len(pairs) > 1 else f"The cosine of the pair is {low}"
    found.append(f"{cosines} (0: unrelated); {result.summary()}.")
    ranks = [rank for rank in overall.effective_ranks if not math.isnan(rank)]
    found.append(
        f"Effective ranks are {min(ranks):.1f} to {max(ranks):.1f}; a merge of all needs up to {sum(ranks):.0f}."
    )
    return found


def _suggestions(result: Interference, pairs: Sequence[Pair]) -> list[Suggestion]:
    def tried(why: str, **recipe: Any) -> Suggestion:
        options = [text for name, value in recipe.items() for text in _option(name, value)]
        words = ["merge-engine", "merge", *result.sources, "-o", "merged", *options]
        return Suggestion(recipe, shlex.join(words), why)

    mean = math.fsum(pair.cosine for pair in pairs) / len(pairs) if pairs else 0.0
    of_pairs = f"the mean cosine of the pairs is {figure(mean, '.3f')}"
    sum_of_all = tried(
        f"The baseline to beat: the sum, as large as one adapter is on average ({of_pairs}).",
        method="linear",
        scale="auto",
    )
    if mean >= AKIN:
        return [
            sum_of_all,
            tried(
                f"{_capital(of_pairs)}: they agree, so a plain mean may be all it takes.",
                method="linear",
                scale=_round(1 / len(result.adapters)),
            ),
        ]
    orthogonal = tried(
        f"It makes the adapters' directions orthogonal before it adds them; {of_pairs}.", method="tsv", scale="auto"
    )
    norms = [float(norm) for norm in result.overall.norms]
    rate = result.overall.conflict_rate
    if min(norms) > 0 and max(norms) >= LONGER * min(norms):
        middle = sorted(norms)[len(norms) // 2]
        third = tried(
            f"Weights that make the norms equal; they are {min(norms):.3g} to {max(norms):.3g} now.",
            method="linear", scale="auto", weights=[_round(middle / norm) for norm in norms],
        )  # fmt: skip
    elif not math.isnan(rate) and any(pair.conflict >= CLASHING for pair in pairs):
        worst = max(pair.conflict for pair in pairs if not math.isnan(pair.conflict))
        third = tried(
            f"It elects one sign for each element; up to {percent(worst)} of what a pair keeps has opposite signs.",
            method="ties", density=0.2, scale="auto",
        )  # fmt: skip
    else:
        third = tried(
            "Least squares over the directions that each adapter uses; it was the best untuned method on the bundled "
            "adapters.", method="actmat", scale="auto",
        )  # fmt: skip
    return [sum_of_all, orthogonal, third]


def _most(pairs: Sequence[Pair], limit: float, *, above: bool) -> list[Pair]:
    sign = 1 if above else -1
    chosen = [pair for pair in pairs if sign * pair.cosine >= sign * limit]
    return sorted(chosen, key=lambda pair: -sign * pair.cosine)[:_NAMED]


def _both(result: Interference, pair: Pair) -> str:
    return f"{result.adapters[pair.one]} and {result.adapters[pair.other]}"


def _option(name: str, value: Any) -> list[str]:
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


def _round(value: float) -> float:
    return float(f"{value:.3g}")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
