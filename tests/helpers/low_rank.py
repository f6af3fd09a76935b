"""Matrices of known spectrum, and what every cut to a rank promises: its form, its error, its energy.

U and V are never compared, only products, errors and energies.
"""

import functools

import torch
from torch import Tensor
from xxhash import xxh3_128_digest

from merge_engine.lowrank.small_svd import LowRank

U32 = 2.0**-24
U64 = 2.0**-53
# Rounding B = U S and the orthonormal rows of A to float32 moves the product by |dB A + B dA|_F <=
# |dB|_F |A|_2 + (sum_i s_i^2 |da_i|^2)^(1/2) <= 2 U32 |B A|_F, to first order.
ROUNDING = 2.01 * U32
# What float64 loses in core^2 moves the error by sqrt(2 k |core core^T - its eigenvectors'|): of a few units of U64
# each, for the ranks below, less than this share of |D|_F; and where products cancel, a few units of U64 of these.
SQUARED = 2.0**-25


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_factors(seed: int, m: int, n: int, ranks: list[int], dtype: torch.dtype = torch.float32):
    g = generator(seed)
    As = [torch.randn(r, n, generator=g, dtype=torch.float64).to(dtype) for r in ranks]
    Bs = [torch.randn(m, r, generator=g, dtype=torch.float64).to(dtype) for r in ranks]
    return As, Bs


def summed(As, Bs, weights) -> Tensor:
    return sum(w * (B.double() @ A.double()) for A, B, w in zip(As, Bs, weights, strict=True))


def with_spectrum(m: int, n: int, spectrum: Tensor, seed: int = 0) -> Tensor:
    g = generator(seed)
    k = len(spectrum)
    u = torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64))[0]
    return ((u * spectrum.double()) @ v.T).float()


# Spectra of matrices with so many columns, and rows for an iteration to start from: most are of no use to it.
SIDE = 200
SPECTRA = {
    "flat": torch.ones(SIDE),
    "power": 1 / torch.arange(1.0, SIDE + 1),
    "linear": 1 - torch.arange(SIDE) / SIDE,
    "geometric": torch.logspace(0, -4, SIDE),
    "rank 1": torch.ones(1),
    "rank 7": torch.logspace(0, -2, 7),
    "rank 12, repeated": torch.ones(12),
    "12 repeated above a plateau": torch.cat([torch.ones(12), torch.full((SIDE - 12,), 0.9)]),
    "3 repeated at the cut": torch.cat([torch.ones(11), torch.full((3,), 0.5), torch.full((SIDE - 14,), 0.1)]),
    "noise of a thousandth": torch.cat([torch.logspace(0, -1, 12), torch.full((SIDE - 12,), 1e-4)]),
    "the last one tiny": torch.cat([torch.ones(11), torch.full((1,), 1e-2), torch.full((SIDE - 12,), 1e-3)]),
}
STARTS = {
    "none": torch.empty(0, SIDE),
    "zero": torch.zeros(16, SIDE),
    "one row many times": torch.ones(48, SIDE),
    "random": torch.randn(24, SIDE, generator=generator(8)),
    "whole space and more": torch.randn(2 * SIDE, SIDE, generator=generator(9)),
}


@functools.cache
def ties_delta(m: int, n: int, seed: int = 0, density: float = 0.2) -> tuple[Tensor, Tensor]:
    """Three deltas of rank 16 with half their factors shared, trimmed, elected and averaged; and their stacked A."""
    g = generator(seed)

    def factors() -> tuple[Tensor, Tensor]:
        return torch.randn(m, 16, generator=g) * torch.logspace(0, -1.5, 16), torch.randn(16, n, generator=g)

    shared_B, shared_A = factors()
    total, votes, As = [], [], []
    for _ in range(3):
        B, A = factors()
        As.append((shared_A + A) / 2)
        delta = (shared_B + B) / 2 @ As[-1]
        threshold = delta.abs().flatten().kthvalue(int((1 - density) * delta.numel())).values
        total.append(torch.where(delta.abs() > threshold, delta, 0))
    stacked = torch.stack(total)
    sign = torch.where(stacked.sum(0) >= 0, 1, -1)
    votes = stacked.sign() == sign
    return (stacked * votes).sum(0) / votes.sum(0).clamp(min=1), torch.cat(As)


def orthonormal(m: int, k: int, g: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64))[0]


def graded(seed: int, m: int, n: int, ranks: list[int], exponents: list[float], mixed: bool):
    """Factors in float64 of a matrix with singular values 10**exponents, split by ranks; mixed: none is one's own."""
    g = generator(seed)
    r = sum(ranks)
    s = 10.0 ** torch.tensor([exponents[i % len(exponents)] for i in range(r)], dtype=torch.float64)
    turn = orthonormal(r, r, g) if mixed else torch.eye(r, dtype=torch.float64)
    left = torch.randn(m, r, generator=g, dtype=torch.float64) if m < r else orthonormal(m, r, g)
    right = torch.randn(n, r, generator=g, dtype=torch.float64) if n < r else orthonormal(n, r, g)
    B, A = left * s @ turn, turn.T @ right.T
    return list(A.split(ranks)), list(B.split(ranks, dim=1))


def summands(As, Bs, weights) -> float:
    """sum |w_i| |B_i|_F |A_i|_F"""
    return sum(abs(w) * float(A.norm() * B.norm()) for A, B, w in zip(As, Bs, weights, strict=True))


_squares: dict[tuple[torch.Size, bytes], Tensor] = {}


def squares_of(matrix: Tensor) -> Tensor:
    """The squared singular values in float64; found once, however many tests ask for those of the same matrix."""
    wide = matrix.double().contiguous()
    key = (wide.shape, xxh3_128_digest(wide.numpy()))
    if key not in _squares:
        _squares[key] = torch.linalg.svdvals(wide).square()
    return _squares[key]


def least_error(squares: Tensor, k: int) -> float:
    return float(squares[k:].sum().sqrt())


def error_of(result: LowRank, matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.double() - result.B.double() @ result.A.double()))


def check_form(result: LowRank, m: int, n: int, k: int) -> None:
    A, B, energy = result
    assert A.shape == (k, n) and B.shape == (m, k)
    for factor in (A, B):
        assert factor.dtype == torch.float32 and factor.is_contiguous() and factor.isfinite().all()
        assert factor.untyped_storage().nbytes() == 4 * factor.numel()
    # Rounding moves a product of two unit rows by 2 U32 at most, and of two columns by that share of their lengths.
    assert torch.allclose(A.double() @ A.double().T, torch.eye(k, dtype=torch.float64), rtol=0, atol=2.1 * U32)
    lengths = torch.linalg.vector_norm(B.double(), dim=0)
    assert ((B.double().T @ B.double() - lengths.square().diag()).abs() <= 2.1 * U32 * lengths.outer(lengths)).all()
    assert (lengths.diff() <= 2 * U32 * lengths[:-1]).all()
    assert isinstance(energy, float) and 0 <= energy <= 1


def check_energy(result: LowRank, matrix: Tensor, slack: float) -> None:
    total = matrix.double().square().sum()
    kept = (result.B.double() @ result.A.double()).square().sum() / total if total > 0 else 1.0
    assert abs(result.energy - float(kept)) <= slack


def check_same(got: LowRank, want: LowRank) -> None:
    assert torch.equal(got.A, want.A) and torch.equal(got.B, want.B) and got.energy == want.energy
