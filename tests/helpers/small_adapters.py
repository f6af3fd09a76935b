"""Small adapters of all kinds for tests of merging methods, and strategies that draw them."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st

WEIGHTS = [1.0, 0.5, 0.3, 3.7, -1.0, -0.4, 0.0]


class Adapters(NamedTuple):
    """Factors A [r_t, N] and B [M, r_t], scalings and weights."""

    As: list
    Bs: list
    scalings: list
    weights: list

    @property
    def deltas(self):
        """s B A [M, N] of each, in float64."""
        return [s * (B.double() @ A.double()) for A, B, s in zip(self.As, self.Bs, self.scalings, strict=True)]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def drawn(seed, m, n, ranks, weights=None, scalings=None, dtype=torch.float32):
    g = generator(seed)
    As = [torch.randn(r, n, generator=g, dtype=torch.float64).to(dtype) for r in ranks]
    Bs = [torch.randn(m, r, generator=g, dtype=torch.float64).to(dtype) for r in ranks]
    scalings = scalings or [(0.5, 2.0, 1.0)[t % 3] for t in range(len(ranks))]
    return Adapters(As, Bs, scalings, weights or [1.0] * len(ranks))


def orthonormal(seed, m, k):
    return torch.linalg.qr(torch.randn(m, k, generator=generator(seed), dtype=torch.float64))[0]


@st.composite
def adapters(draw, kinds=("apart", "shared A", "repeated", "with a zero one"), weights=WEIGHTS):
    """1 to 5 adapters of ranks 1 to 9 and sides 1 to 40, so that ranks may exceed a side or their sum both."""
    m, n = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    ranks = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    kind = draw(st.sampled_from(kinds))
    if kind in ("shared A", "repeated"):
        ranks = [ranks[0]] * len(ranks)
    made = drawn(
        draw(st.integers(0, 10**6)),
        *(m, n, ranks),
        draw(st.lists(st.sampled_from(weights), min_size=len(ranks), max_size=len(ranks))),
        draw(st.lists(st.sampled_from([0.25, 1.0, 2.0]), min_size=len(ranks), max_size=len(ranks))),
        dtype,
    )
    if kind == "shared A":
        return made._replace(As=[made.As[0]] * len(ranks))
    if kind == "repeated":
        return made._replace(As=[made.As[0], *made.As[:-1]], Bs=[made.Bs[0], *made.Bs[:-1]])
    if kind == "with a zero one":
        made.Bs[draw(st.integers(0, len(ranks) - 1))].zero_()
    return made
