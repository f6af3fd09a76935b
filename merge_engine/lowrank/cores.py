"""The small cores of a module's adapters, and what merges of any weights need from them. Computed once and kept."""

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from merge_engine.lowrank.small_svd import product_norm, rounding
from merge_engine.lowrank.stacked_rows import owners
from merge_engine.runtime.finite import finite

T = TypeVar("T")
# A singular value of up to this share of the largest counts as zero. Rounding the factors of a delta to float32 moves
# it by up to 2 * 2**-24 |B| |A|, and |B| |A| is a few times |B A|, hence a factor of 8 over that: a weaker direction
# may be nothing but rounding. The singular vectors that are kept are right to about 2**-32 in float64.
TOLERANCE = 2.0**-20


class Stacked(Protocol):
    """What cores are made of: a `Stack`, or one module of `batched_stack.Stacks`."""

    @property
    def ranks(self) -> list[int]:
        """r_t of each adapter."""
        ...

    @property
    def triangles(self) -> tuple[Tensor, Tensor]:
        """R_B [p, R] and R_A [q, R], see `Stack.triangles`; any matrices with B = Q_B R_B and A^T = Q_A R_A do."""
        ...

    @property
    def sizes(self) -> Tensor:
        """|B[:, j]| |A[j]| of each stacked column and row [R]."""
        ...


class Thin(NamedTuple):
    """U [p, k] S [k] V [q, k] of a core C = U diag(S) V^T, of its numerical rank k, in descending order."""

    u: Tensor
    s: Tensor
    v: Tensor


class Polar(NamedTuple):
    """``factor`` [p, n] = W H^T, the polar factor of a matrix W diag(values) H^T that has unit columns.

    ``values`` [min(p, n)] are all singular values of the matrix, descending. Only the first ``rank`` of them, its
    numerical rank, have their vectors in the factor, which is a partial isometry.
    """

    factor: Tensor
    values: Tensor
    rank: int

    @property
    def smallest(self) -> float:
        """The smallest singular value within the rank, or 1 at rank 0. Input errors grow by its inverse."""
        return float(self.values[self.rank - 1]) if self.rank else 1.0


class Basis(NamedTuple):
    """``vectors`` [p, K], orthonormal columns, and ``values`` [K], their singular values, descending."""

    vectors: Tensor
    values: Tensor


class Cores:
    """C_t = s_t R_B[:, t] R_A[:, t]^T [p, q], of adapters tau_t = s_t B_t A_t = Q_B C_t Q_A^T: everything in float64.

    ``stack`` holds the factors as they are, without ``scalings`` s_t; R_B [p, R] and R_A [q, R] are its triangles,
    p = min(M, R), q = min(N, R), R = sum r_t. Ranks r_t may differ and be 0, adapters be zero or equal.
    The cores lie on the CPU, whose LAPACK is faster than a GPU's for matrices of this size. Properties are computed by
    the first thread that asks, once. Nothing of the long sides is kept: `nbytes` is 8 R (4 p + 4 q + R) and a little.

    Singular values up to ``tolerance`` times the largest, or up to what float64 loses in B_t A_t, count as zero, and
    their vectors are never used. Raises ValueError for scalings that do not fit or are not finite.
    """

    def __init__(self, stack: Stacked, scalings: Sequence[float], tolerance: float = TOLERANCE) -> None:
        if len(scalings) != len(stack.ranks):
            raise ValueError(f"got {len(scalings)} scalings, wanted {len(stack.ranks)}")
        self.ranks, self.tolerance = list(stack.ranks), tolerance
        self._owners = owners(self.ranks)
        left, right = (triangle.cpu() for triangle in stack.triangles)
        scales = torch.tensor(scalings, dtype=torch.float64)
        self.left, self.right = left * self._by_column(scales), right
        sizes = [float(part.sum()) for part in stack.sizes.cpu().split(self.ranks)]
        self.sizes = scales.abs() * torch.tensor(sizes, dtype=torch.float64)  # |s_t| sum_j |B_t[:, j]| |A_t[j]|
        if not (finite(self.sizes) and finite(self.left)):
            raise ValueError("a scaling is not finite, or a delta leaves float64")
        self._known: dict[str, Any] = {}
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def shape(self) -> tuple[int, int]:
        """[p, q] of every core."""
        return len(self.left), len(self.right)

    @property
    def nbytes(self) -> int:
        """Bytes that this object takes at most, once every property has been computed.

        Four pairs of [p, R] and [q, R], one [R, R], and what is smaller.
        """
        p, q = self.shape
        columns, adapters = sum(self.ranks), len(self.ranks)
        return 8 * ((4 * (p + q) + columns + 8) * columns + adapters * (adapters + 2))

    def factors(self, t: int) -> tuple[Tensor, Tensor]:
        """L [p, r_t] and F [q, r_t] with C_t = L F^T."""
        start = sum(self.ranks[:t])
        return self.left[:, start : start + self.ranks[t]], self.right[:, start : start + self.ranks[t]]

    def with_left(self, left: Tensor) -> "Cores":
        """The cores left[:, t] R_A[:, t]^T, for deltas that a linear map of norm 1 or less made from these."""
        if left.shape != self.left.shape:
            raise ValueError(f"left is {list(left.shape)}, wanted {list(self.left.shape)}")
        other = copy.copy(self)
        other.left, other._known, other._lock = left, {}, threading.RLock()
        return other

    def combined(self, coefficients: Sequence[float] | Tensor) -> Tensor:
        """sum_t c_t C_t [p, q]."""
        return (self.left * self._by_column(torch.as_tensor(coefficients, dtype=torch.float64))) @ self.right.T

    def noise(self, coefficients: Sequence[float] | Tensor) -> float:
        """The largest singular value of sum_t c_t C_t that may be rounding alone."""
        return rounding(len(self.left.T)) * float(
            (torch.as_tensor(coefficients, dtype=torch.float64).abs() * self.sizes).sum()
        )

    @property
    def svds(self) -> list[Thin]:
        """The singular value decompositions of the cores, of their numerical ranks: k_t = 0 of a zero adapter."""
        return self._once("svds", lambda: [self._thin(t) for t in range(len(self))])

    @property
    def vectors(self) -> Thin:
        """U = [U_1 ... U_T] [p, n], S [n], V = [V_1 ... V_T] [q, n] of `svds` side by side, n = sum k_t."""
        return self._once("vectors", self._vectors)

    @property
    def norms(self) -> Tensor:
        """|tau_t|_F [T]."""
        return self._once("norms", lambda: torch.stack([torch.linalg.vector_norm(svd.s) for svd in self.svds]))

    @property
    def row_products(self) -> Tensor:
        """V^T V [n, n] of `vectors`."""
        return self._once("row products", lambda: self.vectors.v.T @ self.vectors.v)

    @property
    def gram(self) -> Tensor:
        """G[i, j] = <tau_i, tau_j> [T, T]."""
        return self._once("gram", self._gram)

    @property
    def left_basis(self) -> Basis:
        """Left singular vectors and values of [C_1 | ... | C_T], as many as its numerical rank K."""
        return self._once("left basis", lambda: self._basis(self.vectors.u))

    @property
    def right_basis(self) -> Basis:
        """Right singular vectors and values of the stacked rows [C_1; ...; C_T], as many as its numerical rank K'."""
        return self._once("right basis", lambda: self._basis(self.vectors.v))

    def polars(self, used: Sequence[bool]) -> tuple[Polar, Polar]:
        """Polar factors of [U_t] [p, n] and [V_t] [q, n] over the adapters that are ``used``.

        They are kept if all adapters are used (zero ones do not matter), else computed anew.
        """
        if self._all_count(used):
            return self._once("polars", lambda: (self._polar(self.vectors.u), self._polar(self.vectors.v)))
        columns = self.of_columns(torch.tensor(used))
        return self._polar(self.vectors.u[:, columns]), self._polar(self.vectors.v[:, columns])

    def row_values(self, used: Sequence[bool]) -> Tensor:
        """The singular values of [V_t] [q, n] over the adapters that are ``used``, descending; kept as `polars` are."""
        if self._all_count(used):
            return self._once("row values", lambda: torch.linalg.svdvals(self.vectors.v))
        return torch.linalg.svdvals(self.vectors.v[:, self.of_columns(torch.tensor(used))])

    def _all_count(self, used: Sequence[bool]) -> bool:
        """Whether all adapters are used, but for zero ones."""
        return all(chosen or not len(svd.s) for chosen, svd in zip(used, self.svds, strict=True))

    def of_columns(self, values: Tensor) -> Tensor:
        """values [T] of adapters, for each column [n] of `vectors`."""
        return values[self._once("owners", lambda: owners([len(svd.s) for svd in self.svds]))]

    def counted(self, values: Tensor, noise: float = 0.0) -> int:
        """The numerical rank: how many of these singular values, in descending order, do not count as zero."""
        return int((values > self.limit(values, noise)).sum())

    def limit(self, values: Tensor, noise: float = 0.0) -> float:
        """Singular values up to this count as zero beside others, in descending order."""
        return max(self.tolerance * float(values[0]), noise) if len(values) else noise

    def _by_column(self, values: Tensor) -> Tensor:
        return values[self._owners]

    def _once(self, name: str, make: Callable[[], T]) -> T:
        with self._lock:
            if name not in self._known:
                self._known[name] = make()
            found: T = self._known[name]
            return found

    def _thin(self, t: int) -> Thin:
        (q_left, r_left), (q_right, r_right) = (torch.linalg.qr(side) for side in self.factors(t))
        u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
        k = self.counted(s, rounding(len(self.left.T)) * float(self.sizes[t]))
        return Thin(q_left @ u[:, :k], s[:k].clone(), q_right @ vh[:k].T)

    def _vectors(self) -> Thin:
        u, s, v = zip(*self.svds, strict=True)
        joined = Thin(torch.cat(u, dim=1), torch.cat(s), torch.cat(v, dim=1))
        counts = [len(values) for values in s]
        # Each adapter's are views of those of all, so that both take the memory of one.
        parts = zip(*(part.split(counts, dim=-1) for part in joined), strict=True)
        self._known["svds"] = [Thin(*part) for part in parts]
        return joined

    def _gram(self) -> Tensor:
        u, s, _ = self.vectors
        products = (u.T @ u) * self.row_products * s.outer(s)
        member = self.of_columns(torch.arange(len(self)))
        rows = torch.zeros(len(self), len(s), dtype=torch.float64).index_add_(0, member, products)
        return torch.zeros(len(self), len(self), dtype=torch.float64).index_add_(1, member, rows)

    def _basis(self, vectors: Tensor) -> Basis:
        # [C_1 | ... | C_T] = [U_1 S_1 ... U_T S_T] times orthonormal rows.
        u, s, _ = torch.linalg.svd(vectors * self.vectors.s, full_matrices=False)
        k = self.counted(s)
        return Basis(u[:, :k].clone(), s[:k].clone())

    def _polar(self, vectors: Tensor) -> Polar:
        u, s, vh = torch.linalg.svd(vectors, full_matrices=False)
        k = self.counted(s)
        return Polar(u[:, :k] @ vh[:k], s, k)


def norms_of(As: Sequence[Tensor], Bs: Sequence[Tensor], scalings: Sequence[float]) -> list[float]:
    """|s_t B_t A_t|_F of each adapter, in float64, without a QR: A_t [r_t, N], B_t [M, r_t]; see `product_norm`."""
    return [abs(s) * product_norm(A, B) for A, B, s in zip(As, Bs, scalings, strict=True)]


def gram_of(As: Sequence[Tensor], Bs: Sequence[Tensor], scalings: Sequence[float]) -> Tensor:
    """G[i, j] = <tau_i, tau_j> = s_i s_j sum((A_i A_j^T) * (B_i^T B_j)) [T, T], float64, on the CPU, without a QR.

    A_t [r_t, N], B_t [M, r_t]. Off by some 2**-51 (|s_i B_i| |A_i|) (|s_j B_j| |A_j|). 2 (M + N) R^2 flops.
    """
    ranks = [len(A) for A in As]
    rows = torch.cat([A.double() for A in As])
    columns = torch.cat([B.double() * s for B, s in zip(Bs, scalings, strict=True)], dim=1)
    products = ((rows @ rows.T) * (columns.T @ columns)).cpu()
    blocks = [block.split(ranks, dim=1) for block in products.split(ranks)]
    return torch.tensor([[float(block.sum()) for block in line] for line in blocks], dtype=torch.float64)
