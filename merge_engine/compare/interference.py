"""How adapters conflict, before a merge: norms, cosines, sign conflicts, overlap and effective ranks of their deltas.

Norms, cosines and ranks are computed from the factors alone, in float64. Conflicts and overlap are those of the trimmed
deltas: they are counted tile by tile on the CPU, and no whole delta is ever in memory.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from merge_engine.compare.figures import Figures, Interference, together
from merge_engine.cpu.overlap import count_overlap
from merge_engine.cpu.source import Product
from merge_engine.engine.backend import Group
from merge_engine.engine.cpu_thresholds import find_keeps
from merge_engine.engine.plan import Factors, ModulePlan, Plan, make_plan
from merge_engine.errors import RecipeError
from merge_engine.formats.adapter import Adapter
from merge_engine.formats.open import open_adapters
from merge_engine.lowrank.small_svd import rounding
from merge_engine.rules.recipe import DEFAULT_DENSITY, Density, Recipe
from merge_engine.runtime.progress import Bar
from merge_engine.runtime.threads import ahead


def interference(
    adapters: Sequence[str | Path | Adapter],
    *,
    density: Density = DEFAULT_DENSITY,
    progress: bool | None = None,
) -> Interference:
    """Norms, cosines, sign conflicts, overlap and effective ranks of the deltas s_i B_i A_i, before a merge.

    adapters: folders or hub ids (``user/repo``) of LoRA adapters as PEFT writes them, two or more.
    density: share that a trim keeps, as in `Recipe`: one number, one for each adapter, or a table by module.
    progress: a bar on standard error; None shows it on a terminal only.

    `Figures` has the formulas. From the factors alone, in float64: each Delta = U S V^T by a QR of A and of B and an
    SVD of the small core, and <Delta_i, Delta_j> = sum_kl S_i,k S_j,l (U_i^T U_j)_kl (V_i^T V_j)_kl. This equals
    tr((A_j A_i^T)(B_i^T B_j)), but its error is a few roundings of |Delta_i| |Delta_j|, and that of the trace is a few
    roundings of |A_i| |B_i| |A_j| |B_j|. Singular values that float64 cannot tell from 0 count as 0.
    Counted on the float32 deltas that the CPU backend merges: kept elements and their signs, as ``ties`` sees them.

    Raises MergeError for adapters that could not be merged either, or for fewer than two.
    """
    recipe = Recipe(method="ties", density=density)
    opened = open_adapters(adapters)
    if len(opened) < 2:
        raise RecipeError(f"adapters: wanted at least two to compare, got {len(opened)}")
    plan = make_plan(opened, recipe)
    modules = dict(_compared(plan, progress))
    return Interference(
        adapters=_made_unique([adapter.name for adapter in opened]),
        sources=tuple(adapter.source for adapter in opened),
        density=recipe.as_dict()["density"],
        shapes={module.name: (module.rows, module.columns) for module in plan.modules},
        modules=modules,
        overall=together(modules.values()),
    )


def _compared(plan: Plan, progress: bool | None) -> Iterator[tuple[str, Figures]]:
    """Every module with its figures; the next module is read in the background."""
    total = sum(module.cost for module in plan.modules)
    with Bar(total, len(plan.modules), progress) as bar:
        for module, factors in ahead(lambda module: (module, plan.read(module)), plan.modules):
            yield module.name, _compare(plan, module, factors)
            bar.finished(module.cost)


def _compare(plan: Plan, module: ModulePlan, factors: Factors) -> Figures:
    """The figures of one module; factors: of the adapters that have it."""
    spectra = [_spectrum(A, B, scaling) for (A, B), scaling in zip(factors, module.scalings, strict=True)]
    sources = [Product(A, B, scaling) for (A, B), scaling in zip(factors, module.scalings, strict=True)]
    (keeps,) = find_keeps([Group(plan, [module], "delta", sources, {})], [{} for _ in sources])
    counts = count_overlap(sources, keeps)
    squares = np.array([float(spectrum.values.square().sum()) for spectrum in spectra])
    here = np.zeros(len(plan.adapters), np.int64)
    here[list(module.adapters)] = 1

    def placed(values: np.ndarray) -> np.ndarray:
        """[m] or [m, m] by the adapters that have the module -> [n] or [n, n] by all adapters, 0 for the others."""
        out = np.zeros((len(here),) * values.ndim, values.dtype)
        out[np.ix_(*[module.adapters] * values.ndim)] = values
        return out

    return Figures(
        elements=module.rows * module.columns,
        modules=here,
        ranks=placed(np.array([_effective_rank(spectrum.values) for spectrum in spectra])),
        inner=placed(_inner(spectra)),
        squares=placed(squares)[:, None] * here,
        kept_squares=placed(counts.kept_squares),
        kept=placed(counts.shared.diagonal())[:, None] * here,
        shared=placed(counts.shared),
        opposed=placed(counts.opposed),
        contested=counts.contested,
        conflicting=counts.conflicting,
    )


class _Spectrum(NamedTuple):
    """Delta = left @ diag(values) @ right.T: left [M, p] and right [N, p] with orthonormal columns, float64."""

    left: Tensor
    values: Tensor
    right: Tensor


def _spectrum(A: Tensor, B: Tensor, scaling: float) -> _Spectrum:
    """The singular value decomposition of scaling * B @ A, by QR of its factors; values below the noise count as 0."""
    A, B = A.double().T, B.double() * scaling
    (q_left, left), (q_right, right) = torch.linalg.qr(B), torch.linalg.qr(A)
    u, values, vh = torch.linalg.svd(left @ right.T, full_matrices=False)
    size = float(torch.linalg.vector_norm(B, dim=0) @ torch.linalg.vector_norm(A, dim=0))
    noise = rounding(A.shape[1]) * size
    return _Spectrum(q_left @ u, torch.where(values > noise, values, 0.0), q_right @ vh.T)


def _inner(spectra: Sequence[_Spectrum]) -> np.ndarray:
    """<Delta_i, Delta_j> [m, m]."""
    starts = np.cumsum([0, *(len(spectrum.values) for spectrum in spectra[:-1])])
    scaled = torch.cat([spectrum.left * spectrum.values for spectrum in spectra], dim=1)
    right = torch.cat([spectrum.right for spectrum in spectra], dim=1)
    rows = []
    for spectrum in spectra:  # one at a time: all together would take [sum r, sum r]
        products = ((spectrum.left * spectrum.values).T @ scaled) * (spectrum.right.T @ right)
        rows.append(np.add.reduceat(products.sum(0).numpy(), starts))
    return np.stack(rows)


def _effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values as shares of their sum; 0 where all are 0."""
    shares = values[values > 0] / values.sum()
    return math.exp(-float((shares * shares.log()).sum())) if len(shares) else 0.0


def _made_unique(names: Sequence[str]) -> tuple[str, ...]:
    """The names, with a number after each one that occurred before: a, a -> a, a (2)."""
    unique: list[str] = []
    for name in names:
        number, candidate = 1, name
        while candidate in unique:
            number += 1
            candidate = f"{name} ({number})"
        unique.append(candidate)
    return tuple(unique)
