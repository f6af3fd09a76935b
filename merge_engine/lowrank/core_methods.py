"""Merges that act on singular vectors: one function of a module's cores and the weights for each method.

All work on R x R matrices in float64 and know nothing of the long sides: `Stack.unfold_svd` makes factors
of the result.
The methods merge w_t tau_t. An adapter of weight 0 is left out, of polar factors too, so that results jump where
a weight reaches 0; a negative weight subtracts its adapter. Null directions are never used: see `cores.TOLERANCE`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from merge_engine.lowrank.cores import Cores
from merge_engine.lowrank.gram import karcher, multislerp
from merge_engine.lowrank.small_svd import Svd, svd_of


class MergedCore(NamedTuple):
    """One merged module: its delta is Q_B core Q_A^T, ``core`` [p, q] float64. `Stack.unfold_svd` makes factors of it.

    ``svd``: of the core.
    ``rank``: the numerical rank of the core. An output of a smaller rank loses energy; iso_c and tsv_iso have a flat
    spectrum, so that half the rank loses half of it.
    ``smallest``: how ill-conditioned the merge was. For tsv and tsv_iso the smallest singular value, within the rank,
    of the unit directions [U_1 ... U_T] and [V_1 ... V_T]; for iso_c and actmat that of the matrix which is made
    isotropic or inverted, divided by the largest; None for other methods. Near 0, adapters are nearly parallel, and
    small changes of them, such as rounding, change the result by up to 1 / smallest times as much.
    ``noise``: singular values of the core up to this may be rounding alone.
    """

    core: Tensor
    svd: Svd
    rank: int
    smallest: float | None
    noise: float

    @property
    def norm(self) -> float:
        """|merged delta|_F."""
        return float(torch.linalg.matrix_norm(self.core))


@dataclass(frozen=True)
class CoreMethod:
    """One method: what computes it, and the options it knows with their defaults."""

    function: Callable[..., MergedCore]
    options: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, cores: Cores, weights: Sequence[float], **options: float) -> MergedCore:
        """The merge of the cores; raises ValueError for weights or options that do not fit."""
        if len(weights) != len(cores):
            raise ValueError(f"got {len(weights)} weights, wanted {len(cores)}")
        if not all(map(math.isfinite, weights)):
            raise ValueError("a weight is not finite")
        if unknown := sorted(options.keys() - self.options.keys()):
            raise ValueError(f"got options {unknown}, wanted no others than {sorted(self.options)}")
        return self.function(cores, torch.tensor(weights, dtype=torch.float64), **options)


def tsv(cores: Cores, weights: Tensor) -> MergedCore:
    """polar([U_1 ... U_T]) diag(w_1 S_1, ..., w_T S_T) polar([V_1 ... V_T])^T, tau_t = U_t diag(S_t) V_t^T.

    Adds the adapters after making their directions orthogonal, the two sides apart. Rank <= sum r_t.
    One adapter: that adapter. Orthogonal ones: their sum. n equal ones: that adapter, not n times it.
    Source: TSV-Merge, Gargiulo et al., "Task singular vectors", CVPR 2025; all singular values of each adapter are
    kept, except those that count as zero.
    """
    used = weights != 0
    left, right = cores.polars(used.tolist())
    values = (cores.of_columns(weights) * cores.vectors.s)[cores.of_columns(used)]
    smallest = min(left.smallest, right.smallest)
    core = (left.factor * values) @ right.factor.T
    return _result(cores, core, smallest, cores.noise(weights) / min(smallest, 1.0))


def iso_c(cores: Cores, weights: Tensor) -> MergedCore:
    """mean(S) U V^T of sum_t w_t tau_t = U diag(S) V^T, over its numerical rank: all its directions equally strong.

    Rank <= sum r_t. Source: Marczak et al., "No task left behind: isotropic model merging with common and task-specific
    subspaces", ICML 2025 (2502.04959); there the mean is over min(M, N) values, of null directions also.
    """
    return _isotropic(cores, svd_of(cores.combined(weights)), None, cores.noise(weights))


def tsv_iso(cores: Cores, weights: Tensor) -> MergedCore:
    """`iso_c` of the result of `tsv`: mean(S) U V^T of tsv = U diag(S) V^T.

    Source: the isotropic variant of TSV in Panariello et al., "Accurate and efficient low-rank model merging in core
    space", NeurIPS 2025 (2509.17786).
    """
    merged = tsv(cores, weights)
    return _isotropic(cores, merged.svd, merged.smallest, merged.noise)


def actmat(cores: Cores, weights: Tensor, ridge: float = 1.0) -> MergedCore:
    """(sum_t w_t tau_t G_t) (sum_t |w_t| G_t + mu I)^+ with G_t = tau_t^T tau_t / |tau_t|_F^2.

    G_t stands in for the covariance of the inputs of task t. mu = ``ridge`` * trace(sum_t |w_t| G_t) / K', ridge times
    its mean eigenvalue over the K' that are not zero: that measure of a ridge is this library's and not the paper's.
    ridge >= 0; 0.3 to 1 is right for trained adapters, 0 for orthogonal rows only: without a ridge the result grows
    without bound as the row spaces approach each other. Only ratios of the weights matter. A weight's sign is that of
    the delta: the covariance of -tau_t is G_t.
    Rank <= sum r_t. Source: "actmat", 2604.01329; with unit deltas and no ridge it minimises the objective of WUDI.
    """
    if not (math.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge is {ridge}, wanted a number of at least 0")
    u, s, v = cores.vectors
    shares = cores.of_columns(weights.abs().sqrt())
    unit = s / cores.of_columns(cores.norms)
    # sum |w| G = Y Y^T, and (Z Y^T) (Y Y^T + mu)^+ = Z H diag(y / (y^2 + mu)) W^T by Y = W diag(y) H^T: an SVD, since
    # eigenvalues of Y Y^T would square the condition.
    w, values, h = torch.linalg.svd(v * (shares * unit), full_matrices=False)
    k = cores.counted(values)
    w, values, h = w[:, :k], values[:k], h[:k].T
    mean = float(values.square().mean()) if k else 1.0
    strengths = cores.of_columns(weights.sign()) * shares * unit * s
    core = (u * strengths) @ (h * (values / (values.square() + ridge * mean))) @ w.T
    smallest = float(values[-1] / values[0]) if k else 1.0
    # Without a ridge 1 / y is as large as the inverse of the smallest value; with it, no larger than 1 / sqrt(mu).
    grown = 1 / max(smallest, math.sqrt(ridge * mean) / float(values[0])) if k else 1.0
    return _result(cores, core, smallest, cores.noise(weights.sign()) * max(grown, 1.0))


def _of_gram(coefficients: Callable[[Tensor, Sequence[float]], list[float]]) -> Callable[[Cores, Tensor], MergedCore]:
    def merged(cores: Cores, weights: Tensor) -> MergedCore:
        found = coefficients(cores.gram, weights.tolist())
        return _result(cores, cores.combined(found), None, cores.noise(found))

    merged.__doc__ = coefficients.__doc__
    return merged


def _isotropic(cores: Cores, merged: Svd, smallest: float | None, noise: float) -> MergedCore:
    u, s, vh = merged
    k = cores.counted(s, noise)
    mean = float(s[:k].mean()) if k else 0.0
    if smallest is None:
        smallest = float(s[k - 1] / s[0]) if k else 1.0
    flat = torch.where(torch.arange(len(s)) < k, mean, torch.zeros_like(s))
    return MergedCore(mean * (u[:, :k] @ vh[:k]), Svd(u, flat, vh), k, smallest, noise)


def _result(cores: Cores, core: Tensor, smallest: float | None, noise: float) -> MergedCore:
    svd = svd_of(core)
    k = cores.counted(svd.s, noise)
    if k == 0:
        core, svd = torch.zeros_like(core), svd._replace(s=torch.zeros_like(svd.s))
    return MergedCore(core, svd, k, smallest, noise)


CORE_METHODS: dict[str, CoreMethod] = {
    "tsv": CoreMethod(tsv),
    "iso_c": CoreMethod(iso_c),
    "tsv_iso": CoreMethod(tsv_iso),
    "actmat": CoreMethod(actmat, {"ridge": 1.0}),
    "multislerp": CoreMethod(_of_gram(multislerp)),
    "karcher": CoreMethod(_of_gram(karcher)),
}
