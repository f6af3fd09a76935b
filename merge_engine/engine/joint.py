"""Task tensors that depend on all adapters of a module: balanced deltas, and deltas in the spaces that all share."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from threading import RLock
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from merge_engine.errors import about
from merge_engine.formats.adapter import Adapter
from merge_engine.lowrank.balance import pico
from merge_engine.lowrank.bases import core_factors, knots_factors, lift_core, lift_knots
from merge_engine.lowrank.cores import Cores, norms_of
from merge_engine.lowrank.small_svd import LowRank
from merge_engine.lowrank.stack import Stack
from merge_engine.runtime.threads import threads

_FEW = 4  # modules that are kept where each is read once


class Space(NamedTuple):
    """The common spaces of a module's deltas: what is merged there is lifted back to [M, N].

    left [K] and right [K'] or [1]: the signs of the basis vectors. A singular vector may have either sign, and a tied
    vote elects +: so U and V point to where the sums u^T (sum_t tau_t) 1 and 1^T (sum_t tau_t) v are positive.
    nearness: the smallest singular value of the adapters' stacked unit rows, see `lowrank.bases.Nearness`.
    """

    kind: str  # "knots" or "core"
    stack: Stack
    cores: Cores
    left: Tensor
    right: Tensor
    nearness: float

    def lift(self, merged: Tensor, rank: int, energy: float | None) -> LowRank:
        """U P, or U P V^T, on the CPU: see `lowrank.bases`."""
        signed = merged * self.left[:, None] * self.right
        return (lift_knots if self.kind == "knots" else lift_core)(self.stack, self.cores, signed, rank, energy)


class Joined(NamedTuple):
    """One module as it is merged. In a space the scalings are folded into B; else they are the adapters' own.

    factors: (A, B) of each adapter that has the module, in order. norms: |tau_t|_F as the adapters have them.
    """

    factors: list[tuple[Tensor, Tensor]]
    norms: tuple[float, ...]
    space: Space | None

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, columns] of the task tensors."""
        A, B = self.factors[0]
        return len(B), A.shape[1]

    @property
    def nbytes(self) -> int:
        tensors = sum(A.nbytes + B.nbytes for A, B in self.factors)
        return tensors + (0 if self.space is None else self.space.stack.nbytes + self.space.cores.nbytes)


class Keeper(Protocol):
    """Makes the value of a key, or knows it."""

    def __call__(self, key: Hashable, make: Callable[[], Joined]) -> Joined: ...


class Joint:
    """The modules of some adapters, each joined when it is asked for. Safe from threads.

    balance: None or "pico". space: None, "knots" or "core". keep: where joined modules are kept; by default the last
    few are.
    """

    def __init__(
        self, adapters: Sequence[Adapter], balance: str | None, space: str | None, keep: Keeper | None = None
    ) -> None:
        self.adapters, self.balance, self.space = adapters, balance, space
        self._keep = keep or LastFew(_FEW)
        self._shapes: dict[str, tuple[int, int]] = {}

    def module(self, name: str) -> Joined:
        """One module, from the factors of all adapters that have it."""
        with threads(1), about(name):  # a BLAS gives other last bits on several
            joined = self._keep(name, lambda: self._joined(name))
        self._shapes[name] = joined.shape
        return joined

    def shape(self, name: str) -> tuple[int, int]:
        """[K, N] or [K, K'] of the module's task tensors; what has been joined once is not joined again for it."""
        return self._shapes[name] if name in self._shapes else self.module(name).shape

    def _joined(self, name: str) -> Joined:
        having = [adapter for adapter in self.adapters if name in adapter.modules]
        pairs = [adapter.factors(name) for adapter in having]
        scalings = [adapter.modules[name].scaling for adapter in having]
        As, Bs = [A.float() for A, _ in pairs], [B.float() for _, B in pairs]
        norms = tuple(norms_of(As, Bs, scalings))
        if self.balance is not None:
            unbalanced = Stack(As, Bs)
            Bs = pico(unbalanced, Cores(unbalanced, scalings), Bs)
        if self.space is None:
            return Joined(list(zip(As, Bs, strict=True)), norms, None)
        stack = Stack(As, Bs)
        cores = Cores(stack, scalings)
        rows, columns = knots_factors(cores, As) if self.space == "knots" else core_factors(cores)
        left, right = _signs([B.double() @ A.double().sum(1) for A, B in zip(As, columns, strict=True)]), torch.ones(1)
        if self.space == "core":
            sums = zip(rows, scalings, Bs, strict=True)
            right = _signs([s * (B.double().sum(0) @ A.double()) for A, s, B in sums])
            rows = [A * right for A in rows]
        factors = [(A, left[:, None] * B) for A, B in zip(rows, columns, strict=True)]
        return Joined(factors, norms, Space(self.space, stack, cores, left, right, _nearness(cores)))


def _signs(sums: Sequence[Tensor]) -> Tensor:
    return torch.where(torch.stack(list(sums)).sum(0) < 0, -1.0, 1.0)


def _nearness(cores: Cores) -> float:
    """`lowrank.bases.nearness` of the rows, without the polar factors, which take as long as the spaces themselves."""
    rows = cores.vectors.v
    if rows.shape[1] == 0:
        return 1.0
    return 0.0 if rows.shape[1] > len(rows) else float(torch.linalg.svdvals(rows)[-1])


class LastFew:
    """Keeps the modules that were asked for last; all of them if `most` is None."""

    def __init__(self, most: int | None) -> None:
        self.most = most
        self._known: OrderedDict[Hashable, Joined] = OrderedDict()
        self._lock = RLock()

    def __call__(self, key: Hashable, make: Callable[[], Joined]) -> Joined:
        with self._lock:
            if key not in self._known:
                self._known[key] = make()
            self._known.move_to_end(key)
            while self.most is not None and len(self._known) > self.most:
                self._known.popitem(last=False)
            return self._known[key]
