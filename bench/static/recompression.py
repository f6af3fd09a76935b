"""What cutting merged modules to a rank should cost on a GPU: an estimate by arithmetic, nothing was run on one.

Device: float64 operations at the published peak, or bytes at the published bandwidth, whichever takes longer, and what
`lowrank.batched` and `lowrank.batched_stack` launch. The iteration is assumed to take all its steps, as it does for
deltas of which most elements were dropped: trimmed ones of a flat spectrum take a quarter of its products. Host: the
small decompositions, on one core.
"""

from typing import NamedTuple

from bench.static.gpus import Gpu
from merge_engine.lowrank.batched import PART_BYTES
from merge_engine.lowrank.batched_stack import Stacks

# Assumed; operators are counted in tests/bench/test_static_recompression.py.
OPERATOR_SECONDS = 5e-6  # one of the framework's
OPERATORS = 350  # at most, to cut the merged deltas of a part of a group
SUM_OPERATORS = 95  # at most, for sums; and on the host for each module
SUM_OPERATORS_A_MODULE = 57
DECISIONS = 2  # by the host, in an iteration
PRODUCTS = 3 * 2 + 2 * 6 + 2 * 2  # with the merged delta: of three steps, two filters and two steps
ORTHONORMAL = 4, 6  # how often vectors of length m, and of length n, are made orthonormal
SVD_SECONDS = 1.7e-9  # times w^3: an SVD and two lists of eigenvalues of [w, w] on a core of a Xeon, w = 120 and 152
HOST_FLOPS = 1e10  # of a core, in float64
EIGEN_LAUNCHES = 8  # a row of a matrix whose eigenvectors are found: rows follow one another, and so do matrices
LINK = 25e9  # byte/s between host and device: PCIe 4 with 16 lanes


class Work(NamedTuple):
    """Of one module: float64 operations and bytes on the device, and how many float64 numbers it takes there.

    eigen: rows of the matrix whose eigenvectors the device finds, 0 if none. host: seconds of one core.
    """

    flops: float
    nbytes: float
    numbers: int
    eigen: int
    host: float


class Seconds(NamedTuple):
    """device: on the GPU, with launches and the copy of the results. host: on one core."""

    device: float
    host: float


def of_matrix(m: int, n: int, rank: int) -> Work:
    """A merged delta [m, n], cut by `lowrank.batched.cut_matrices`."""
    least, most, both, width = min(m, n), max(m, n), m + n, 2 * rank + 24
    norm = 2 * rank**2 * both / HOST_FLOPS  # `lowrank.small_svd.product_norm`
    if rank * 12 > least or width * 4 > least:
        products = 2 * least * least * most + 2 * rank * m * n + 2 * rank * rank * (most + both)
        numbers = m * n + 4 * least * least + 4 * rank * both
        flops = products + _orthonormal(rank, most)
        return Work(flops, (4 + 4 * 8) * m * n, numbers, least, SVD_SECONDS * rank**3 + norm)
    vectors = 3 * width**2 * both + sum(
        times * _orthonormal(width, size) for times, size in zip(ORTHONORMAL, (m, n), strict=True)
    )
    vectors += 3 * 2 * width**2 * n + 2 * 2 * rank * width * both
    # The float64 copy is written, and read for the norm and by each product; vectors where they become orthonormal.
    nbytes = 12 * m * n + (1 + PRODUCTS) * 8 * m * n + 8 * width * both * 3 * (PRODUCTS + 12)
    host = DECISIONS * SVD_SECONDS * width**3 + norm
    return Work(2 * PRODUCTS * width * m * n + vectors, nbytes, m * n + 8 * width * both, 0, host)


def of_sum(m: int, n: int, ranks: int, rank: int) -> Work:
    """A sum of products of stacked factors of ``ranks`` rows, by `lowrank.batched_stack.Stacks`."""
    both = m + n
    flops = _orthonormal(ranks, both) + 6 * ranks**2 * both + 2 * rank * ranks * both
    host = SUM_OPERATORS_A_MODULE * OPERATOR_SECONDS
    return Work(flops, 8 * ranks * both * 20, Stacks.nbytes(ranks, m, n) // 8, 0, host)


def _orthonormal(p: int, n: int) -> float:
    """`lowrank.batched_qr.orthonormal_rows` of [p, n]: three Gram matrices and three triangular solves."""
    return 3 * (2 * p * p * n + p * p * n)


def seconds(gpu: Gpu, m: int, n: int, modules: int, ranks: int, rank: int, *, summed: bool) -> Seconds:
    """All modules of a shape. ranks: the sum of the adapters'. summed: products are, and no merged delta is made."""
    rank = min(rank, m, n)
    work = of_sum(m, n, ranks, rank) if summed else of_matrix(m, n, rank)
    parts = -(-modules // max(1, PART_BYTES // (8 * work.numbers)))
    each = max(work.flops / gpu.float64, work.nbytes / gpu.bandwidth)
    each += work.eigen * EIGEN_LAUNCHES * OPERATOR_SECONDS + 4 * rank * (m + n) / LINK
    launches = parts * (SUM_OPERATORS if summed else OPERATORS) * OPERATOR_SECONDS
    return Seconds(modules * each + launches, modules * work.host)
