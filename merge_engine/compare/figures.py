"""The figures of a comparison: their formulas, and how they become text, notes and JSON."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from itertools import combinations
from operator import add
from typing import Any, NamedTuple

import numpy as np

from merge_engine.errors import some

SHOWN = 10  # adapters, pairs and modules in the table for a terminal
LONGER, PARALLEL, OPPOSED = 2.0, 0.9, -0.1  # a ratio of norms and cosines beyond which a note is written
CAVEAT = (
    "These figures describe weights, not behaviour: a conflict means that two adapters pull an element in opposite "
    "directions, not that either task needs that element. Only an evaluation shows what a merge does."
)


@dataclass(frozen=True, eq=False)
class Figures:
    """The figures of one module, or of several together: sums, which add up over modules, and ratios of these.

    Arrays are by adapter [n] or by pair [n, n], in the order of the comparison. Delta_i = s_i B_i A_i. K_i is the set
    of elements of Delta_i that a trim keeps (the k = int(density M N) largest magnitudes of a module, of equal ones
    those with the lowest flat index) and that are not 0. For a pair, only modules that both adapters have count.

    elements: M N. modules: how many each adapter has [n]. ranks: sum of the effective ranks [n].
    inner: <Delta_i, Delta_j>. squares: [i, j] = |Delta_i|_F^2 where adapter j is too. kept_squares: |Delta_i|^2 over
    K_i [n]. kept: [i, j] = |K_i| where j is too. shared: |K_i & K_j|. opposed: how many of these differ in sign.
    contested: elements in two or more K_i. conflicting: how many of these have both signs.
    """

    elements: int
    modules: np.ndarray
    ranks: np.ndarray
    inner: np.ndarray
    squares: np.ndarray
    kept_squares: np.ndarray
    kept: np.ndarray
    shared: np.ndarray
    opposed: np.ndarray
    contested: int
    conflicting: int

    def __add__(self, other: "Figures") -> "Figures":
        return Figures(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    @property
    def norms(self) -> np.ndarray:
        """|Delta_i|_F over all its modules [n], NaN for an adapter without these modules."""
        return np.where(self.modules > 0, np.sqrt(self.squares.diagonal()), np.nan)

    @property
    def effective_ranks(self) -> np.ndarray:
        """exp(-sum_k p_k ln p_k), p = sigma / sum(sigma), of the singular values sigma of Delta_i [n]; 0 if it is zero.

        Over several modules, the mean. Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
        """
        return _ratio(self.ranks, self.modules)

    @property
    def kept_energy(self) -> np.ndarray:
        """|Delta_i|^2 over K_i / |Delta_i|_F^2 [n]: the share of the squared norm that a trim keeps."""
        return np.minimum(_ratio(self.kept_squares, self.squares.diagonal()), 1.0)

    @property
    def cosine(self) -> np.ndarray:
        """<Delta_i, Delta_j> / (|Delta_i|_F |Delta_j|_F) [n, n], NaN where a delta is 0."""
        return _ratio(self.inner, np.sqrt(self.squares * self.squares.T)).clip(-1, 1)

    @property
    def conflict(self) -> np.ndarray:
        """#{e in K_i & K_j : sign Delta_i(e) != sign Delta_j(e)} / |K_i & K_j| [n, n], NaN where nothing is shared."""
        return _ratio(self.opposed, self.shared)

    @property
    def overlap(self) -> np.ndarray:
        """|K_i & K_j| / |K_i | K_j| [n, n] (Jaccard), NaN where nothing is kept."""
        return _ratio(self.shared, self.kept + self.kept.T - self.shared)

    @property
    def conflict_rate(self) -> float:
        """#{e : c(e) >= 2 and both signs occur} / #{e : c(e) >= 2}, c(e) = #{i : e in K_i}; NaN if no c(e) >= 2."""
        return self.conflicting / self.contested if self.contested else math.nan

    @property
    def contested_share(self) -> float:
        """#{e : c(e) >= 2} / M N."""
        return self.contested / self.elements

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: None where a figure is not defined."""
        return {
            "elements": self.elements,
            "contested": self.contested,
            "conflicting": self.conflicting,
            "conflict_rate": _plain(self.conflict_rate),
            "norms": _plain(self.norms),
            "effective_ranks": _plain(self.effective_ranks),
            "kept": self.shared.diagonal().tolist(),
            "kept_energy": _plain(self.kept_energy),
            "cosine": _plain(self.cosine),
            "conflict": _plain(self.conflict),
            "overlap": _plain(self.overlap),
            "shared": self.shared.tolist(),
            "opposed": self.opposed.tolist(),
        }


class Pair(NamedTuple):
    """Two adapters by number, and their figures."""

    one: int
    other: int
    cosine: float
    conflict: float
    overlap: float


@dataclass(frozen=True, eq=False)
class Interference:
    """The comparison of adapters, in each module and overall.

    adapters: their names, made unique. sources: the folders or hub ids that were given. shapes: of the deltas, by
    module. modules: in name order.
    """

    adapters: tuple[str, ...]
    sources: tuple[str, ...]
    density: Any
    shapes: dict[str, tuple[int, int]]
    modules: dict[str, Figures]
    overall: Figures

    def __repr__(self) -> str:
        what = f"{some(len(self.adapters), 'adapter')}, {some(len(self.modules), 'module')}, density {self.density}"
        return f"Interference({what}: {self.summary()})"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; arrays are in the order of ``adapters``, and None stands for an undefined figure."""
        return {
            "adapters": list(self.adapters),
            "sources": list(self.sources),
            "density": self.density,
            "overall": self.overall.as_dict(),
            "modules": {
                name: {"shape": list(self.shapes[name]), **figures.as_dict()} for name, figures in self.modules.items()
            },
        }

    def pairs(self) -> list[Pair]:
        """The pairs of adapters with a module in common, most conflicting first."""
        cosine, conflict, overlap = self.overall.cosine, self.overall.conflict, self.overall.overlap
        met = [
            Pair(i, j, float(cosine[i, j]), float(conflict[i, j]), float(overlap[i, j]))
            for i, j in combinations(range(len(self.adapters)), 2)
            if self.overall.squares[i, j] > 0 or self.overall.squares[j, i] > 0
        ]
        return sorted(met, key=lambda pair: _falling(pair.conflict))

    def ranked(self) -> list[tuple[str, Figures]]:
        """The modules by name, the highest conflict rate first."""
        return sorted(self.modules.items(), key=lambda item: _falling(item[1].conflict_rate))

    def expected(self) -> str:
        """The figures that unrelated deltas would have, in a sentence."""
        known = isinstance(self.density, int | float) and self.density > 0
        overlap = f", overlap {percent(min(self.density, 1) / (2 - min(self.density, 1)))}" if known else ""
        return (
            f"Two unrelated random deltas: cosine 0, conflict 50.0 %{overlap}; more adapters conflict in more elements."
        )

    def notes(self) -> list[str]:
        """Sentences about figures that stand out."""
        notes, names, norms = [], self.adapters, self.overall.norms
        pairs = [pair for pair in self.pairs() if not math.isnan(pair.cosine)]
        zero = [name for name, norm in zip(names, norms, strict=True) if norm == 0]
        if zero:
            notes.append(f"The delta of {', '.join(zero)} is zero: merging it changes nothing.")
        if not pairs:
            notes.append("No two adapters change the same module: nothing can conflict.")
            return notes
        long, short = int(np.argmax(norms)), int(np.argmin(np.where(norms > 0, norms, np.inf)))
        if norms[long] >= LONGER * norms[short]:
            notes.append(
                f"The delta of {names[long]} has {norms[long] / norms[short]:.1f} times the norm of that of "
                f"{names[short]}, and counts that much more in a sum and in an election by total. "
                "Weights can change that."
            )
        near, far = max(pairs, key=lambda pair: pair.cosine), min(pairs, key=lambda pair: pair.cosine)
        if near.cosine >= PARALLEL:
            notes.append(
                f"{names[near.one]} and {names[near.other]} point the same way (cosine {near.cosine:.3f}): the norm of "
                "their sum is almost the sum of their norms, so a scale below 1 may be right."
            )
        if far.cosine <= OPPOSED:
            notes.append(
                f"{names[far.one]} and {names[far.other]} point apart (cosine {far.cosine:.3f}): "
                "they partly cancel in a sum. Evaluate both tasks after a merge."
            )
        return notes

    def table(self) -> str:
        """A short text for a terminal: adapters; then pairs and modules, most conflicting first."""
        overall, shown = self.overall, self.ranked()[:SHOWN]
        pairs = self.pairs()
        counted = f"{len(self.adapters)} adapters, {some(len(self.modules), 'module')}, density {self.density}"
        blocks = [
            f"{counted}: {self.summary()}",
            _columns(
                [_of("adapter", len(self.adapters)), "modules", "norm", "effective rank", "energy kept by the trim"],
                [
                    [name, str(count), figure(norm, ".4g"), figure(rank, ".1f"), percent(energy)]
                    for name, count, norm, rank, energy in zip(
                        self.adapters,
                        overall.modules,
                        *(overall.norms, overall.effective_ranks, overall.kept_energy),
                        strict=True,
                    )
                ][:SHOWN],
            ),
            _columns(
                [_of("pair", len(pairs)), "conflict", "overlap", "cosine"],
                [
                    [
                        f"{self.adapters[pair.one]}, {self.adapters[pair.other]}",
                        *(percent(pair.conflict), percent(pair.overlap), figure(pair.cosine, ".3f")),
                    ]
                    for pair in pairs[:SHOWN]
                ],
            ),
            _columns(
                [_of("module", len(self.modules)), "conflict", "contested", "lowest cosine"],
                [
                    [
                        name,
                        *(percent(each.conflict_rate), percent(each.contested_share)),
                        figure(min(upper(each.cosine), default=math.nan), ".3f"),
                    ]
                    for name, each in shown
                ],
            ),
            "\n".join([*self.notes(), self.expected(), CAVEAT]),
        ]
        return "\n\n".join(blocks)

    def summary(self) -> str:
        """The overall conflict in a sentence."""
        overall = self.overall
        if not overall.contested:
            return "no element is kept by two or more"
        return (
            f"{percent(overall.contested_share)} of the elements are kept by two or more, "
            f"and {percent(overall.conflict_rate)} of these in both signs"
        )


def together(figures: Iterable[Figures]) -> Figures:
    """The figures of several modules together."""
    return reduce(add, figures)


def upper(matrix: np.ndarray) -> list[float]:
    """The defined values of a figure by pair [n, n], each pair once."""
    values = matrix[np.triu_indices(len(matrix), 1)]
    return values[~np.isnan(values)].tolist()


def figure(value: float, how: str) -> str:
    """A number as text; a dash if it is undefined."""
    if math.isnan(value):
        return "-"
    text = format(value, how)
    return text if float(text) else text.removeprefix("-")


def percent(share: float) -> str:
    return figure(100 * share, ".1f") + ("" if math.isnan(share) else " %")


def _of(what: str, count: int) -> str:
    return what if count <= SHOWN else f"{what} (the first {SHOWN} of {count})"


def _columns(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in columns: the first column aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in [names, *rows]
    )


def _ratio(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """one / other in float64, NaN where other is 0."""
    return np.divide(one, other, out=np.full(np.shape(one), np.nan), where=np.asarray(other) != 0)


def _falling(value: float) -> float:
    """A key that sorts the largest first, and NaN last."""
    return math.inf if math.isnan(value) else -value


def _plain(values: Any) -> Any:
    """Lists of numbers, None for NaN."""
    if isinstance(values, np.ndarray):
        return [_plain(value) for value in values]
    return None if math.isnan(values) else float(values)
