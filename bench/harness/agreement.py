"""Whether the results of contestants are right: each against the same merge in float64, a block of rows at a time.

A contestant computes in float32, and rounds the deltas that it stores to `unit`. So it may see a magnitude on the other
side of the threshold, or a vote with the other sign, if the exact value is closer to it than the rounding error. Such
elements are undecided, and are left out; all others must be within the error bound. In float32 fewer than one element
in ten thousand is undecided; the check fails if more than a tenth is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.harness.inputs import SCALING
from bench.harness.workloads import Task
from merge_engine.rules.rule import Rule, make_rule

BLOCK_ELEMENTS = 1 << 23  # of all adapters together
U32 = 2.0**-24  # unit roundoff of float32
DECIDED = 0.9  # the least share of elements that must be decided


class Disagreement(AssertionError):
    """The result of a contestant is not the merge that the workload asks for."""


@dataclass(frozen=True)
class Arithmetic:
    """How a contestant computes: by whose convention, and the unit roundoff of stored deltas and of the result."""

    convention: str = "peft"
    unit: float = U32
    unit_out: float = U32


class Exact(NamedTuple):
    """Rows of the merged delta in float64, the largest error that a result may have, and which elements are decided."""

    merged: Tensor
    tolerance: Tensor
    decided: Tensor


def check_merge(results: Mapping[str, Tensor], task: Task, arithmetic: Mapping[str, Arithmetic] | None = None) -> None:
    """Raise Disagreement unless every result [M, N] is the merge of the workload.

    arithmetic: {name: how that contestant computes} where it is not `Arithmetic()`.
    """
    work = task.workload
    of = {name: (arithmetic or {}).get(name, Arithmetic()) for name in results}
    thresholds = _thresholds(task) if task.rule.keep == "magnitude" else [0.0] * work.adapters
    step = max(1, BLOCK_ELEMENTS // (work.columns * work.adapters))
    decided, off, worst = dict.fromkeys(of, 0), dict.fromkeys(of, 0), dict.fromkeys(of, 0.0)
    for top in range(0, work.rows, step):
        rows = range(top, min(top + step, work.rows))
        exact = {each: _exact(task, each, thresholds, rows) for each in set(of.values())}
        for name, result in results.items():
            truth = exact[of[name]]
            error = (result[rows.start : rows.stop].double().cpu() - truth.merged).abs()
            wrong = truth.decided & ~(error <= truth.tolerance)
            decided[name] += int(truth.decided.sum())
            off[name] += int(wrong.sum())
            if bool(wrong.any()):
                worst[name] = max(worst[name], float(error[wrong].nan_to_num(torch.inf).max()))
    for name in results:
        if off[name]:
            raise Disagreement(f"{work.name}: {name} is wrong in {off[name]} elements, by up to {worst[name]:.2g}")
        if decided[name] < DECIDED * work.elements:
            raise Disagreement(f"{work.name}: only {decided[name]} of {work.elements} elements of {name} are decided")


def check_kth(value: float, task: Task, name: str) -> None:
    """Raise Disagreement unless value is the k-th largest magnitude of the workload's first delta."""
    magnitudes, slack = _magnitudes(task, 0)
    slack += U32 * value
    above, upto = int((magnitudes > value + slack).sum()), int((magnitudes >= value - slack).sum())
    if not above < task.kept <= upto:
        raise Disagreement(
            f"{task.workload.name}: {name} found {value} as the magnitude number {task.kept}, but {above} are larger, "
            f"and only {upto} are as large or larger"
        )


def _thresholds(task: Task) -> list[float]:
    """For each delta, the middle between the smallest magnitude that is kept and the largest that is not."""
    numel, kept, found = task.workload.elements, task.kept, []
    for adapter in range(task.workload.adapters):
        magnitudes, _ = _magnitudes(task, adapter)
        edges = np.partition(magnitudes, [max(numel - kept - 1, 0), min(numel - kept, numel - 1)])
        last = float(edges[numel - kept]) if kept else np.inf
        found.append((last + float(edges[numel - kept - 1])) / 2 if kept < numel else -1.0)
    return found


def _magnitudes(task: Task, adapter: int) -> tuple[np.ndarray, float]:
    """|t| of one delta, rounded to float32 [M N], and the largest error of float32 arithmetic."""
    work = task.workload
    out, slack, step = torch.empty(work.rows, work.columns), 0.0, max(1, BLOCK_ELEMENTS // work.columns)
    for top in range(0, work.rows, step):
        rows = range(top, min(top + step, work.rows))
        t, error = _delta(task, adapter, rows)
        out[top : rows.stop] = t.abs()
        slack = max(slack, float(error.max()))
    return out.flatten().numpy(), slack


def _delta(task: Task, adapter: int, rows: range) -> tuple[Tensor, Tensor]:
    """t = s B A in float64, and (r + 2) u s |B| |A|: the error bound of products and sums in float32."""
    A, B = (factor.double().cpu() for factor in task.pairs[adapter])
    B = B[rows.start : rows.stop]
    return SCALING * (B @ A), (len(A) + 2) * U32 * SCALING * (B.abs() @ A.abs())


def _exact(task: Task, arithmetic: Arithmetic, thresholds: Sequence[float], rows: range) -> Exact:
    """combine(w_i keep(t_i)) in float64, with its error bound."""
    work, rule = task.workload, make_rule(task.workload.method, convention=arithmetic.convention)
    kept, errors, decided = _kept(task, rule, arithmetic.unit, thresholds, rows)
    agreeing = [torch.ones_like(decided)] * work.adapters
    if rule.elect != "none":
        agreeing, sure = _elected(kept, errors, [w if rule.vote_weighted else 1.0 for w in task.weights])
        decided &= sure
    count = torch.ones_like(kept[0])
    if rule.divisor != "one":
        shares = task.weights if rule.divisor == "weight" else [1.0] * work.adapters
        count = sum(share * agrees.double() for share, agrees in zip(shares, agreeing, strict=True))
        count = torch.where(count == 0, 1.0, count)
    terms = [weight * t * agrees for weight, t, agrees in zip(task.weights, kept, agreeing, strict=True)]
    merged = sum(terms) / count
    errors = [abs(weight) * e * agrees for weight, e, agrees in zip(task.weights, errors, agreeing, strict=True)]
    rounding = (work.adapters + 3) * U32 * sum(term.abs() for term in terms)
    return Exact(merged, (sum(errors) + rounding) / count.abs() + arithmetic.unit_out * merged.abs(), decided)


def _kept(
    task: Task, rule: Rule, unit: float, thresholds: Sequence[float], rows: range
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(keep(t_i), their error bounds, where it is decided whether an element is kept)."""
    work = task.workload
    kept, errors = [], []
    decided = torch.ones(len(rows), work.columns, dtype=torch.bool)
    for adapter, threshold in enumerate(thresholds):
        t, error = _delta(task, adapter, rows)
        slack = float(error.max()) + 2 * unit * threshold  # the threshold is as uncertain as the elements near it
        error = error + unit * t.abs()
        if rule.keep == "magnitude":
            decided &= (t.abs() - threshold).abs() > error + slack
            keep = t.abs() > threshold
        elif rule.keep == "bernoulli":
            keep = task.mask(adapter, rows).cpu()
        else:
            keep = torch.ones_like(decided)
        gain = 1 / work.density if rule.keep == "bernoulli" else 1.0
        kept.append(t * keep * gain)
        errors.append((error + 2 * unit * t.abs()) * keep * gain)  # drop and rescale round twice more
    return kept, errors, decided


def _elected(kept: list[Tensor], errors: list[Tensor], ballots: list[float]) -> tuple[list[Tensor], Tensor]:
    """(which elements of each delta have the elected sign, where that is decided)."""
    vote = sum(ballot * t for ballot, t in zip(ballots, kept, strict=True))
    doubt = sum(abs(ballot) * error for ballot, error in zip(ballots, errors, strict=True))
    decided = (vote.abs() > doubt) | (doubt == 0)
    for t, error in zip(kept, errors, strict=True):
        decided &= (t.abs() > error) | (t == 0)
    return [torch.where(vote >= 0, t > 0, t < 0) for t in kept], decided
