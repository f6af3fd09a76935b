"""Kind svd_merge: one layer as `svd_merge_lora.py` of kohya's sd-scripts merges it, and the same cut from the factors.

That script adds up the dense deltas in float32, takes the whole singular value decomposition, cuts it to the rank, and
clamps both factors at the 0.99 quantile of their elements. This is written from its description. The clamp changes the
result, so the cut before it is what is compared.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from bench.harness.agreement import Disagreement
from bench.harness.kind import Entry, Kind, Results
from bench.harness.measure import Contestant
from bench.harness.workloads import Task, Workload
from merge_engine.lowrank.stack import Stack

LARGEST_EXCESS = 1e-3  # of the error over that of the best cut
QUANTILE, MOST = 0.99, 2**24  # torch.quantile takes no more elements than that
SCALING = 0.5  # alpha / r


def _kohya(work: Workload, device: str) -> Contestant:
    pairs = Task(work).pairs

    def run() -> tuple[Tensor, Tensor]:
        merged = torch.zeros(work.rows, work.columns)
        for A, B in pairs:
            merged = merged + SCALING * (B.float() @ A.float())
        U, S, Vh = torch.linalg.svd(merged)  # with all singular vectors, as there
        up, down = U[:, : work.rank] @ torch.diag(S[: work.rank]), Vh[: work.rank]
        highest = torch.quantile(torch.cat([up.flatten(), down.flatten()])[:MOST], QUANTILE)
        up.clamp(-highest, highest)
        down.clamp(-highest, highest)
        return down, up

    return Contestant(run)


def _from_factors(work: Workload, device: str) -> Contestant:
    pairs = Task(work).pairs

    def run() -> tuple[Tensor, Tensor]:
        stack = Stack([A.float() for A, _ in pairs], [B.float() for _, B in pairs])
        A, B, _ = stack.cut([SCALING] * len(pairs), work.rank)
        return A, B

    return Contestant(run)


def _check(work: Workload, results: Results, device: str) -> Mapping[str, float]:
    """|D - B A| / |D - the best cut of D| - 1; D = sum s B A, whose singular values are those of a small core."""
    pairs = Task(work).pairs
    exact = sum(SCALING * (B.double() @ A.double()) for A, B in pairs)
    left, right = torch.cat([B.double() for _, B in pairs], 1), torch.cat([A.double() for A, _ in pairs])
    core = SCALING * torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right.T, mode="r").R.T
    best = torch.linalg.svdvals(core)[work.rank :].norm()
    excess = {name: float((exact - B.double() @ A.double()).norm() / best) - 1 for name, (A, B) in results.items()}
    if not max(excess.values()) <= LARGEST_EXCESS:
        raise Disagreement(f"{work.name}: an error is larger than that of the best cut, by {max(excess.values()):.1e}")
    return excess


KIND = Kind(
    {"merge-engine": Entry(_from_factors, ns=2), "kohya's svd_merge": Entry(_kohya, ns=700)},
    _check,
    checking=40,
    baseline=("kohya's svd_merge",),
    forks=False,
    has_rates=False,
    least=1,
)
