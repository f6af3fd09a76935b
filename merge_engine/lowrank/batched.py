"""Merged deltas of a group of modules, cut to a rank all at once: as few operators for many as for one.

`krylov.from_matrix` launches some hundred small operators a module, and waits for a GPU after each of its steps; here
a group is one batch. Vectors are rows throughout.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from merge_engine.lowrank.batched_qr import gaussians, nearly_orthonormal_rows, orthonormal_rows
from merge_engine.lowrank.small_svd import ROUNDED, LowRank, asks_for_all, check_request

PART_BYTES = 1 << 31  # of what is worked on at a time, in float64
# From rank n / 12 on, or for a space of more than n / 4, the n eigenvectors of the Gram matrix are found sooner.
_DENSE_FRACTION, _WIDEST_FRACTION = 12, 4
# Each row of the start gets Gaussian noise of this share of its length: no direction stays unseen, however useless the
# start is, and rows that depended on each other no longer do.
_NOISE_IN_START = 2.0**-3
_STEPS = 3, 2  # of all modules; and of those that are not done by then, after so many filters
_FILTERS = 2
# An excess of less than this share of |D|_F^2 is not looked for: rounding factors to float32 adds (2 * 2**-24)^2.
_NOISE = 2.0**-46
_TINY = 1e-290
_LARGEST = torch.finfo(torch.float32).max ** 2


class Cuts(NamedTuple):
    """B A of each of G modules, on the CPU: ``A`` [G, k, N] and ``B`` [G, M, k] in float32.

    By module, ``energies``: the share of |D|_F^2 that B A keeps, and ``ranks``: how many rows of A and columns of B
    belong to it; 0 where no factors were found.
    """

    A: Tensor
    B: Tensor
    energies: list[float]
    ranks: list[int]

    def of(self, i: int) -> LowRank | None:
        """The factors of one module, in memory of their own; None where none were found."""
        k = self.ranks[i]
        if k == 0:
            return None
        A, B = self.A[i, :k].clone(), self.B[i, :, :k].clone(memory_format=torch.contiguous_format)
        return LowRank(A, B, self.energies[i])


class _Request(NamedTuple):
    """k: how many vectors are looked for. enough: whether they are all that may be asked for, whatever they keep."""

    k: int
    enough: bool
    energy: float | None
    tolerance: float


class _Spaces(NamedTuple):
    """D ~ U^T C X: ``left`` U [G, w, M] and ``right`` X [G, w, N] have orthonormal rows, ``core`` C is [G, w, w].

    grams: of the two half steps before C, each [G, w, w], whose k largest eigenvalues are the captured energy; none
    where U or X are known to hold the leading vectors.
    """

    left: Tensor
    right: Tensor
    core: Tensor
    grams: tuple[Tensor, ...] = ()


class _Decision(NamedTuple):
    """C = u diag(s) vh of every module, on the host, and what follows: see `Cuts`. more: modules worth more steps."""

    u: Tensor
    s: Tensor
    vh: Tensor
    energies: list[float]
    ranks: list[int]
    more: list[int]


class _Part(NamedTuple):
    """The results of some modules: [B^T | A] [G, k, M + N] in float32, on their device."""

    both: Tensor
    energies: list[float]
    ranks: list[int]


def cut_matrices(
    matrices: Tensor, start: Tensor, rank: int, energy: float | None = None, tolerance: float = 1e-5
) -> Cuts:
    """B A of each D of ``matrices`` [G, M, N] float32, as good as `krylov.from_matrix` promises, where it is found.

    ``start`` [G, p, N], of any float dtype and any p: rows that D is near to being made of. ``rank``, ``energy`` and
    ``tolerance`` mean what they mean there. Not found, and left to `krylov.from_matrix`: a D whose excess is still
    estimated at more than ``tolerance`` after the last step, that needs more than max(p, 16) vectors for ``energy``,
    or that is not finite or has a norm that overflows float32.

    Method: subspace iteration of fixed width w = 2 k + 24, U = orth(X D^T), X = orth(U D), by Cholesky QR
    (`batched_qr`), from the rows of ``start``, or w random sums of them, with noise. The Gram matrix of each half step
    says how much energy it captures. After 3 steps the host looks at the last three half steps. Modules that are not
    done go on by X = orth(T_3(2 D^T D / b - 1) X) twice, with Chebyshev's polynomial T_3 and sqrt(b) the smallest
    singular value found, which is no larger than the k-th of D, and by 2 steps as before. D is near U^T C X,
    C = U D X^T, and C is decomposed on the host: many small matrices take a GPU longer. From rank min(M, N) / 12 on,
    or where w > min(M, N) / 4, X or U are the eigenvectors of the smaller Gram matrix instead.

    All in float64, rounded once to float32. Products in float32 would be of 10 bits on a GPU wherever a program allows
    TF32, and no operator can ask for more. The host waits for a GPU at each of the two decisions, and for the result.
    BLAS may sum a batch of another size in another order, on a GPU and on some CPUs: the results of a module in
    different groups agree to rounding, or to the tolerance where that tips a decision.
    Memory beyond ``matrices``: a float64 copy and 8 w (M + N) numbers a module, or for the Gram matrix
    4 min(M, N)^2 + 4 k (M + N), in float64, for so many modules at a time that it is at most `PART_BYTES`, or for one.

    Sources: Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 2011; Zhou, Saad, Tiago and
    Chelikowsky, "Self-consistent-field calculations using Chebyshev-filtered subspace iteration", J. Comput. Phys.
    2006; why few steps do: Musco and Musco, "Randomized block Krylov methods", NeurIPS 2015.
    Raises ValueError for shapes, dtypes or a request that do not fit.
    """
    if matrices.ndim != 3 or 0 in matrices.shape or matrices.dtype != torch.float32:
        raise ValueError(f"matrices is {list(matrices.shape)} {matrices.dtype}, wanted [G, M, N] float32, none empty")
    if start.ndim != 3 or (start.shape[0], start.shape[2]) != (matrices.shape[0], matrices.shape[2]):
        raise ValueError(f"start is {list(start.shape)}, wanted [{matrices.shape[0]}, p, {matrices.shape[2]}]")
    check_request(rank, energy)
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}, wanted more than 0")
    (m, n), least = matrices.shape[1:], min(matrices.shape[1:])
    rank = min(rank, least)
    k = rank if energy is None else min(rank, max(start.shape[1], 16))
    width = 2 * k + 24
    if k * _DENSE_FRACTION > least or width * _WIDEST_FRACTION > least:
        request = _Request(rank, True, energy, tolerance)
        each = m * n + 4 * least * least + 4 * rank * (m + n)
        parts = [_by_gram(part, request) for part in matrices.split(_at_a_time(each))]
    else:
        request = _Request(k, k == rank, energy, tolerance)
        size = _at_a_time(m * n + 8 * width * (m + n))
        pairs = zip(matrices.split(size), start.split(size), strict=True)
        parts = [_iterated(part, rows, width, request) for part, rows in pairs]
    B, A = torch.cat([part.both for part in parts]).cpu().split([m, n], dim=2)
    energies, ranks = [x for part in parts for x in part.energies], [x for part in parts for x in part.ranks]
    return Cuts(A, B.mT, energies, ranks)


def _at_a_time(numbers: int) -> int:
    """How many modules are worked on at a time, where each takes so many numbers in float64."""
    return max(1, PART_BYTES // (8 * numbers))


def _iterated(matrices: Tensor, start: Tensor, width: int, request: _Request) -> _Part:
    """By subspace iteration."""
    wide = matrices.double()
    norms = torch.linalg.vector_norm(wide, dim=(1, 2))
    fillers = gaussians(width, wide.shape[1], wide.device), gaussians(width, wide.shape[2], wide.device)
    spaces = _steps(wide, _first_rows(start.to(wide), width), _STEPS[0], fillers)
    decision = _decide(spaces, norms, request)
    part, more = _factors(spaces, decision, request.k), decision.more
    if not more:
        return part
    rows = torch.bmm(decision.vh.to(wide.device), spaces.right)  # in descending order of their singular values
    bounds = decision.s[:, -1:, None].square().to(wide.device)
    chosen = torch.tensor(more).to(wide.device)
    if len(more) < len(matrices):
        del wide, spaces
        matrices, rows, norms, bounds = (x.index_select(0, chosen) for x in (matrices, rows, norms, bounds))
        wide = matrices.double()
    for _ in range(_FILTERS):
        rows = orthonormal_rows(_filtered(wide, rows, bounds), fillers[1]).rows
    spaces = _steps(wide, rows, _STEPS[1], fillers)
    decision = _decide(spaces, norms, request)
    late = _factors(spaces, decision, request.k)
    part.both.index_copy_(0, chosen, late.both)
    for i, share, rank in zip(more, late.energies, late.ranks, strict=True):
        part.energies[i], part.ranks[i] = share, rank
    return part


def _first_rows(start: Tensor, width: int) -> Tensor:
    """Rows [G, w, N] near those of ``start`` [G, p, N], or random sums of them, filled up by noise."""
    p, n = start.shape[1:]
    lengths = torch.linalg.vector_norm(start, dim=2, keepdim=True)
    rows = start / lengths.clamp(min=_TINY)
    if p > width:
        rows = gaussians(width, p, start.device, 1) @ rows
    else:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, width - p))
    return torch.add(rows, gaussians(width, n, start.device, 2), alpha=_NOISE_IN_START)


def _steps(wide: Tensor, rows: Tensor, count: int, fillers: tuple[Tensor, Tensor]) -> _Spaces:
    """So many steps, two at least, from ``rows`` [G, w, N]. Only the last two make orthonormal rows, of which the
    captured energy is known."""
    flipped = wide.mT
    for _ in range(count - 2):
        left = nearly_orthonormal_rows(torch.bmm(rows, flipped)).rows
        rows = nearly_orthonormal_rows(torch.bmm(left, wide)).rows
    grams = []
    for _ in range(2):
        left, gram = orthonormal_rows(torch.bmm(rows, flipped), fillers[0])
        products = torch.bmm(left, wide)
        rows, next_gram = orthonormal_rows(products, fillers[1])
        grams += [gram, next_gram]
    return _Spaces(left, rows, torch.bmm(products, rows.mT), (grams[1], grams[2]))


def _filtered(wide: Tensor, rows: Tensor, bounds: Tensor) -> Tensor:
    """T_3(2 D^T D / b - 1) of rows [G, w, N] for b = ``bounds`` [G, 1, 1]: shares of singular vectors of up to sqrt(b)
    do not grow, and all others as much as a polynomial of degree 3 can make them."""
    flipped, scale = wide.mT, 2 / bounds
    first = torch.baddbmm(rows, torch.bmm(rows, flipped) * scale, wide, beta=-1)
    second = torch.baddbmm(torch.add(rows, first, alpha=2), torch.bmm(first, flipped) * (2 * scale), wide, beta=-1)
    return torch.baddbmm(torch.add(first, second, alpha=2), torch.bmm(second, flipped) * (2 * scale), wide, beta=-1)


def _by_gram(matrices: Tensor, request: _Request) -> _Part:
    """By the eigenvectors of D^T D, or of D D^T where that is smaller."""
    wide = matrices.double()
    norms = torch.linalg.vector_norm(wide, dim=(1, 2))
    flat = wide.shape[1] < wide.shape[2]
    tall = wide.mT if flat else wide
    gram = torch.where(norms.isfinite().view(-1, 1, 1), torch.bmm(tall.mT, tall), 0.0)
    rows = torch.linalg.eigh(gram).eigenvectors.mT[:, -request.k :]
    products = torch.bmm(rows, tall.mT)
    others = orthonormal_rows(products, gaussians(request.k, tall.shape[1], wide.device)).rows
    core = torch.bmm(products, others.mT)  # rows tall^T ~ core others
    spaces = _Spaces(rows, others, core) if flat else _Spaces(others, rows, core.mT)
    return _factors(spaces, _decide(spaces, norms, request), request.k)


def _decide(spaces: _Spaces, norms: Tensor, request: _Request) -> _Decision:
    """The leading vectors of every module and how many of them it gets, on the host. norms: |D|_F [G]."""
    g, width = spaces.core.shape[:2]
    matrices = [part.flatten(1) for part in (*spaces.grams, spaces.core)]
    numbers = torch.cat([*matrices, norms.unsqueeze(1)], dim=1).cpu()  # waits for the device
    sums = numbers.sum(1).tolist()  # not finite if any number is not
    *grams, core, norms = torch.nan_to_num(numbers, 0.0, 0.0, 0.0).split([width * width] * len(matrices) + [1], dim=1)
    u, s, vh = torch.linalg.svd(core.view(g, width, width))
    captured = [_largest(gram.view(g, width, width), request.k).tolist() for gram in grams]
    totals, squares = norms.square().flatten().tolist(), s.square().tolist()
    found = [
        _chosen([each[i] for each in captured], squares[i], totals[i], request) if math.isfinite(sums[i]) else _NONE
        for i in range(g)
    ]
    energies, ranks = [choice.energy for choice in found], [choice.rank for choice in found]
    return _Decision(u, s, vh, energies, ranks, [i for i, choice in enumerate(found) if choice.more])


def _largest(grams: Tensor, k: int) -> Tensor:
    """The sum of the k largest eigenvalues of each matrix."""
    values = torch.linalg.eigvalsh(grams)
    return values.narrow(1, values.shape[1] - k, k).sum(1)


class _Choice(NamedTuple):
    rank: int
    energy: float
    more: bool


_NONE = _Choice(0, 0.0, False)


def _chosen(before: list[float], squares: list[float], total: float, request: _Request) -> _Choice:
    """The rank of one module, and what it keeps; whether it is worth more steps. squares: of singular values of C.

    before: what the two half steps before C captured.
    """
    if total >= _LARGEST:
        return _NONE
    captured = list(accumulate(squares[: request.k]))
    shares = [min(each / total, 1.0) if total > 0 else 1.0 for each in captured]
    rank = request.k
    if asks_for_all(request.energy):
        whole = max(1, sum(each > ROUNDED**2 * total for each in squares[: request.k]))
        if whole < request.k:
            rank, shares[whole - 1] = whole, 1.0
        elif not request.enough:
            return _NONE
    elif request.energy is not None:
        if not request.enough and shares[-1] < request.energy:
            return _NONE
        rank = min(rank, 1 + sum(share < request.energy for share in shares))
    left_out = max(request.tolerance * (total - captured[-1]), _NOISE * total)
    if before and _excess((*before, captured[-1]), total) > left_out:
        return _Choice(0, 0.0, True)
    return _Choice(rank, shares[rank - 1], False)


def _excess(captured: Sequence[float], total: float) -> float:
    """The energy that more half steps would still capture, from that of the last three: gain * q / (1 - q).

    The gains of a subspace iteration are a sum of geometric series, and their ratio grows towards that of the slowest:
    q is the square root of the last ratio, which is larger. A gain that is rounding has no successors.
    """
    gain, before = captured[2] - captured[1], captured[1] - captured[0]
    if gain <= _NOISE * total:
        return 0.0
    if gain >= before:
        return math.inf
    q = math.sqrt(gain / before)
    return gain * q / (1 - q)


def _factors(spaces: _Spaces, decision: _Decision, k: int) -> _Part:
    """B^T = diag(s) u^T U and A = vh X, of the k leading vectors of every module, rounded."""
    of_left = (decision.u.narrow(2, 0, k) * decision.s.narrow(1, 0, k).unsqueeze(1)).mT
    of_left, of_right = torch.stack([of_left, decision.vh.narrow(1, 0, k)]).to(spaces.core.device).unbind()
    both = torch.cat([torch.bmm(of_left, spaces.left), torch.bmm(of_right, spaces.right)], dim=2)
    return _Part(both.float(), decision.energies, decision.ranks)
