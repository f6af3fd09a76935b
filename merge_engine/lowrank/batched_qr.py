"""Orthonormal rows of many blocks at once, by Cholesky factors of their Gram matrices: products and small solves only.

A GPU runs Householder QR block by block, and products and Cholesky factors of all blocks in one call each.

Sources: Yamazaki, Tomov and Dongarra, "Mixed-precision Cholesky QR factorization", SISC 2015; Yamamoto et al.,
"Roundoff error analysis of the CholeskyQR2 algorithm", ETNA 2015; Fukaya et al., "Shifted Cholesky QR for computing the
QR factorization of ill-conditioned matrices", SISC 2020.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

_UNIT = 2.0**-53  # the unit roundoff of float64
_SEED = 0x62715  # of no one else: rows that are to be filled in must not depend on what is there
_TINY = 1e-290  # under every square that counts: the smallest float32 is 1e-45
# The first factor leaves a row that is a sum of rows before it with a length of about the root of the shift, some 1e-5,
# and one that keeps a share of 1e-8 apart from them with a length of more than this.
_DEPENDENT = 2.0**-10


class Orthonormal(NamedTuple):
    """``rows`` Q [G, p, n], and of what they were made of the inner products P P^T [G, p, p]."""

    rows: Tensor
    gram: Tensor


def orthonormal_rows(block: Tensor, filler: Tensor) -> Orthonormal:
    """Q [G, p, n] with Q Q^T = I and P = (P Q^T) Q, of G blocks P = ``block`` [G, p, n], p <= n, in float64.

    A row of P that is a sum of rows before it, or zero, is replaced by that row of ``filler`` [p, n] (`gaussians`),
    made orthogonal to the rest: Householder's Q has rows there that only rounding decides. A row of which less than
    2**-10 sqrt(s), some 1e-8, is apart from the rows before it loses that share. |Q Q^T - I| is some units of
    2**-53, or up to s where P is so nearly singular.
    A block that is not finite gives NaN, and touches no other.

    Method, shifted CholeskyQR3: P_1 = L_1^-1 P, L_1 L_1^T = P P^T + s diag(P P^T); P_2 = L_2^-1 P_1 alike;
    Q = L_3^-1 P_2, L_3 L_3^T = P_2 P_2^T. The shift s = 2**-53 p (n + p + 1) exceeds what rounding does to
    P P^T and to its factor, measured row by row, so that no factor fails.
    """
    rows, gram = nearly_orthonormal_rows(block)
    lengths = torch.linalg.vector_norm(rows, dim=2, keepdim=True)
    again = nearly_orthonormal_rows(torch.where(lengths < _DEPENDENT, filler, rows)).rows
    return Orthonormal(_divided(again, _gram(again)), gram)


def nearly_orthonormal_rows(block: Tensor) -> Orthonormal:
    """P_1 of `orthonormal_rows`: it spans what P does and is better conditioned; dependent rows are nearly zero."""
    gram, n = _gram(block), block.shape[2]
    p = gram.shape[1]
    shifted = torch.addcmul(gram, gram, _identity(p, gram.device), value=_UNIT * p * (n + p + 1))
    return Orthonormal(_divided(block, shifted), gram)


def gaussians(p: int, n: int, device: torch.device, number: int = 0) -> Tensor:
    """Gaussian rows [p, n] of a length of about 1, in float64: the same at every call on a device, others by number."""
    generator = torch.Generator(device).manual_seed(_SEED + number)
    return torch.randn(p, n, generator=generator, dtype=torch.float64, device=device).mul_(n**-0.5)


@functools.lru_cache(maxsize=32)
def _identity(p: int, device: torch.device) -> Tensor:
    return torch.eye(p, dtype=torch.float64, device=device)


def _gram(rows: Tensor) -> Tensor:
    """rows rows^T [G, p, p], with a diagonal that is never 0."""
    return torch.baddbmm(_identity(rows.shape[1], rows.device), rows, rows.mT, beta=_TINY)


def _divided(rows: Tensor, gram: Tensor) -> Tensor:
    """L^-1 rows, L L^T = gram."""
    factor = torch.linalg.cholesky_ex(gram).L  # unlike `cholesky`, it does not wait to hear whether it failed
    return torch.linalg.solve_triangular(factor, rows, upper=False)
