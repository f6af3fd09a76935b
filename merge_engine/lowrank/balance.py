"""Balancing around a merge: shared directions are damped before it, the result gets the adapters' norm after it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from merge_engine.lowrank.cores import Cores
from merge_engine.lowrank.stack import Stack


def pico_strengths(cores: Cores) -> Tensor:
    """alpha_j = 1 / (1 + (T - 1) e_j) [K], e_j = sigma_j^2 / sum sigma^2 of [tau_1 | ... | tau_T].

    In [1 / T, 1]: 1 for one adapter, and the less the more of all energy lies in direction j of `Cores.left_basis`.
    T counts all adapters of the module, zero ones also.
    """
    values = cores.left_basis.values
    shares = (values / values.max()).square() if len(values) else values
    return 1 / (1 + (len(cores) - 1) * shares / shares.sum())


def pico(stack: Stack, cores: Cores, Bs: Sequence[Tensor]) -> list[Tensor]:
    """B_t + U ((alpha - 1) * (U^T B_t)) [M, r_t] for each adapter: tau_t <- (I + U diag(alpha - 1) U^T) tau_t.

    Directions that adapters share are damped. Any rule can merge the new factors; `auto_scale` restores the norm.
    ``Bs`` are those that ``stack`` holds; U and alpha as in `pico_strengths`. No parameters. O(M R^2).
    Computed in float64, rounded once, to float32 or the dtype of B_t if that is wider.

    Source: "Pico", 2604.16826, where the spectrum is that of [B_1 | ... | B_T], without scalings: that of the deltas
    does not depend on how they are split into factors. The norms of single adapters are not restored.
    """
    left, ranks = stack.triangles[0].cpu(), stack.ranks
    if [B.shape[1] for B in Bs] != ranks:
        raise ValueError(f"B of ranks {[B.shape[1] for B in Bs]}, wanted {ranks} as stacked")
    changes = stack.columns(_change(cores, left)).split(ranks, dim=1)
    return [
        (B.double() + change.to(B.device)).to(torch.promote_types(B.dtype, torch.float32))
        for B, change in zip(Bs, changes, strict=True)
    ]


def balanced(cores: Cores) -> Cores:
    """The cores of what `pico` makes, in the same stack's bases: for methods on cores nothing is stacked anew."""
    return cores.with_left(cores.left + _change(cores, cores.left))


def _change(cores: Cores, block: Tensor) -> Tensor:
    """U_core ((alpha - 1) * (U_core^T block)) [p, k]."""
    basis = cores.left_basis.vectors
    return basis @ ((pico_strengths(cores) - 1)[:, None] * (basis.T @ block))
