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
from merge_engine.lowrank.small_svd import Svd, leading_svd

# Squares of singular values are right to 2**-52 or so of the largest square: a value of this share of the largest is
# known from its square to some 2**-20 of itself.
_CERTAIN = 2.0**-16
_CONDITION = 2.0**12  # a linear system of this condition is solved to 2**-40 or so


class Merge(NamedTuple):
    """What a method makes of a module's cores: ``core`` [p, q]; ``smallest`` and ``noise`` as in `MergedCore`."""

    core: Tensor
    smallest: float | None
    noise: float


class MergedCore(NamedTuple):
    """One merged module: its delta is Q_B core Q_A^T. `Stack.unfold_svd` makes factors of it.

    ``svd``: of the core. All singular values, and as many vectors as were asked for.
    ``rank``: the numerical rank of the core. An output of a smaller rank loses energy; iso_c and tsv_iso have a flat
    spectrum, so that half the rank loses half of it.
    ``smallest``: of tsv and tsv_iso the smallest singular value, within the rank, of the unit directions
    [U_1 ... U_T] and [V_1 ... V_T] of the adapters that are used; of actmat that of the latter; of iso_c that of the
    sum, divided by the largest; None of other methods. Near 0, adapters are nearly parallel, and small changes of them,
    such as rounding, may change the result by up to 1 / smallest times as much. For actmat with a small ridge it may be
    more, where weights or singular values differ much.
    ``noise``: singular values of the core up to this may be rounding alone.
    """

    svd: Svd
    rank: int
    smallest: float | None
    noise: float

    @property
    def core(self) -> Tensor:
        """The core [p, q] in float64, as far as its singular vectors were asked for."""
        u, s, vh = self.svd
        return (u * s[: len(vh)]) @ vh

    @property
    def norm(self) -> float:
        """|merged delta|_F."""
        return float(torch.linalg.vector_norm(self.svd.s))


@dataclass(frozen=True)
class CoreMethod:
    """One method: what computes it, and the options it knows with their defaults.

    ``flat``: whether each singular value of the result is replaced by their mean, over its numerical rank.
    """

    function: Callable[..., Merge]
    options: Mapping[str, float] = field(default_factory=dict)
    flat: bool = False

    def __call__(self, cores: Cores, weights: Sequence[float], rank: int | None = None, **options: float) -> MergedCore:
        """The merge of the cores, to be cut to ``rank`` or less; None: to any rank, which takes longer.

        Raises ValueError for weights or options that do not fit.
        """
        if len(weights) != len(cores):
            raise ValueError(f"got {len(weights)} weights, wanted {len(cores)}")
        if not all(map(math.isfinite, weights)):
            raise ValueError("a weight is not finite")
        if unknown := sorted(options.keys() - self.options.keys()):
            raise ValueError(f"got options {unknown}, wanted no others than {sorted(self.options)}")
        core, smallest, noise = self.function(cores, torch.tensor(weights, dtype=torch.float64), **options)
        svd, k = self._decomposed(cores, core, noise, rank)
        if k == 0:
            svd = svd._replace(s=torch.zeros_like(svd.s))
        if self.flat:
            if smallest is None:
                smallest = float(svd.s[k - 1] / svd.s[0]) if k else 1.0
            svd = _flat(svd, k)
        return MergedCore(svd, k, smallest, noise)

    def _decomposed(self, cores: Cores, core: Tensor, noise: float, rank: int | None) -> tuple[Svd, int]:
        """The decomposition of a core, its leading vectors only where that is good enough, and its numerical rank.

        They come from eigenvalues, which are the squares of singular values. A cut keeps as much energy by them as by
        the exact ones. But a value near the limit might be counted wrongly; and where all directions are made equally
        strong, the last ones kept must be right each, while they can be seen only where their squares are apart.
        """
        svd = leading_svd(core, rank)
        k = cores.counted(svd.s, noise)
        kept = k if rank is None else min(k, rank)
        good = svd.tells(k, cores.limit(svd.s, noise)) and (not self.flat or kept == 0 or svd.separates(kept))
        if not good:
            svd = leading_svd(core, None)
            k = cores.counted(svd.s, noise)
        return svd, k


def tsv(cores: Cores, weights: Tensor) -> Merge:
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
    return Merge(core, smallest, cores.noise(weights) / min(smallest, 1.0))


def iso_c(cores: Cores, weights: Tensor) -> Merge:
    """mean(S) U V^T of sum_t w_t tau_t = U diag(S) V^T, over its numerical rank: all its directions equally strong.

    This function makes the sum; `CoreMethod` puts the mean in.
    Rank <= sum r_t. Source: Marczak et al., "No task left behind: isotropic model merging with common and task-specific
    subspaces", ICML 2025 (2502.04959); there the mean is over min(M, N) values, of null directions also.
    """
    return Merge(cores.combined(weights), None, cores.noise(weights))


def tsv_iso(cores: Cores, weights: Tensor) -> Merge:
    """mean(S) U V^T of the result of `tsv`, U diag(S) V^T, as in `iso_c`: `CoreMethod` puts the mean in.

    Source: the isotropic variant of TSV in Panariello et al., "Accurate and efficient low-rank model merging in core
    space", NeurIPS 2025 (2509.17786).
    """
    return tsv(cores, weights)


def actmat(cores: Cores, weights: Tensor, ridge: float = 1.0) -> Merge:
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
    u, s, _ = cores.vectors
    # sum |w| G = Y Y^T, Y = V diag(scales), and the numerator is left Y^T.
    shares = weights.abs() / (float(weights.abs().max()) or 1.0)  # whose squares do not overflow
    scales = cores.of_columns(shares.sqrt() / cores.norms) * s
    left = u * (cores.of_columns(weights.sign()) * scales * s)
    apart = cores.row_values((weights != 0).tolist())
    core, growth = _by_products(cores, left, scales, ridge, apart) or _by_svd(cores, left, scales, ridge)
    k = cores.counted(apart)
    return Merge(core, float(apart[k - 1]) if k else 1.0, cores.noise(weights.sign()) * growth)


def _by_svd(cores: Cores, left: Tensor, scales: Tensor, ridge: float) -> tuple[Tensor, float]:
    """left H diag(y / (y^2 + mu)) W^T by Y = W diag(y) H^T, and by how much rounding may grow.

    An SVD, since eigenvalues of Y Y^T would square the condition.
    """
    w, values, h = torch.linalg.svd(cores.vectors.v * scales, full_matrices=False)
    k = cores.counted(values)
    w, values, h = w[:, :k], values[:k], h[:k].T
    if k == 0:
        return left @ h @ w.T, 1.0
    mu = ridge * float(values.square().mean())
    core = left @ (h * (values / (values.square() + mu))) @ w.T
    return core, _growth(float(values[-1]), float(values[0]), mu)


def _growth(least: float, largest: float, mu: float) -> float:
    """How large 1 / y may become, as a multiple of 1 / largest: 1 / least, and with a ridge at most 1 / sqrt(mu)."""
    return max(largest / max(least, math.sqrt(mu)), 1.0)


def _by_products(
    cores: Cores, left: Tensor, scales: Tensor, ridge: float, apart: Tensor
) -> tuple[Tensor, float] | None:
    """`_by_svd` as left (Y^T Y + mu I)^-1 Y^T, in half the time. None where that is not as good.

    apart: the singular values of V. Wanted: a numerical rank of all columns that is certain from squares, and a matrix
    whose inverse loses little. Mostly bounds of the singular values of Y tell that, and its own need not be found.
    """
    if ridge == 0 or len(scales) == 0 or len(apart) < len(scales):
        return None
    products = cores.row_products * scales.outer(scales)
    mu = ridge * float(products.diag().mean())
    least, largest = float(apart[-1] * scales.min()), float(apart[0] * scales.max())
    if not _is_sure(cores, least, largest, mu):
        squares = torch.linalg.eigvalsh(products)
        least, largest = math.sqrt(max(float(squares[0]), 0.0)), math.sqrt(float(squares[-1]))
        if not _is_sure(cores, least, largest, mu):
            return None
    factor = torch.linalg.cholesky(products.diagonal_scatter(products.diag() + mu))
    core = torch.cholesky_solve(left.T, factor).T @ (cores.vectors.v * scales).T
    return core, _growth(least, largest, mu)


def _is_sure(cores: Cores, least: float, largest: float, mu: float) -> bool:
    certain = least > max(cores.tolerance, _CERTAIN) * largest
    return certain and largest**2 + mu <= _CONDITION * (least**2 + mu)


def _of_gram(coefficients: Callable[[Tensor, Sequence[float]], list[float]]) -> Callable[[Cores, Tensor], Merge]:
    def merged(cores: Cores, weights: Tensor) -> Merge:
        found = coefficients(cores.gram, weights.tolist())
        return Merge(cores.combined(found), None, cores.noise(found))

    merged.__doc__ = coefficients.__doc__
    return merged


def _flat(svd: Svd, k: int) -> Svd:
    """The mean of the first k singular values in place of each of them, and 0 of the others."""
    flat = torch.zeros_like(svd.s)
    flat[:k] = svd.s[:k].mean()
    return svd._replace(s=flat)


CORE_METHODS: dict[str, CoreMethod] = {
    "tsv": CoreMethod(tsv),
    "iso_c": CoreMethod(iso_c, flat=True),
    "tsv_iso": CoreMethod(tsv_iso, flat=True),
    "actmat": CoreMethod(actmat, {"ridge": 1.0}),
    "multislerp": CoreMethod(_of_gram(multislerp)),
    "karcher": CoreMethod(_of_gram(karcher)),
}
