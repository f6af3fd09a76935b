"""Whether contestants agree: each result against the same merge in float64, a block of rows at a time.

A contestant computes in float32, and rounds deltas to `unit` where it stores them. So it may see a magnitude on the
other side of the threshold, or a vote with the other sign, where the exact one is nearer to it than its rounding
reaches. Such elements are not decided and are left out; all others have to be within the bound. In float32 fewer than
one in ten thousand is undecided; a check that leaves out more than a tenth fails.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.inputs import SCALING
from bench.workloads import Task
from merge_engine.rules.rule import make_rule

BLOCK_ELEMENTS = 1 << 23  # of all adapters together
U32, DECIDED = 2.0**-24, 0.9


class Disagreement(AssertionError):
    """A contestant's result is not that of the workload."""


@dataclass(frozen=True)
class Habit:
    """How a contestant goes about it: whose convention, the rounding of the deltas it stores, that of its result."""

    convention: str = "peft"
    unit: float = U32
    unit_out: float = U32


class Exact(NamedTuple):
    """Rows of the merged delta in float64, how far off a result may be, and where that is decided."""

    merged: Tensor
    tolerance: Tensor
    decided: Tensor


def check_merge(results: Mapping[str, Tensor], task: Task, habits: Mapping[str, Habit] | None = None) -> None:
    """Raise Disagreement unless every result [M, N] is the workload's merge. habits: by name, `Habit()` otherwise."""
    work = task.workload
    of = {name: (habits or {}).get(name, Habit()) for name in results}
    thresholds = _thresholds(task) if task.rule.keep == "magnitude" else [0.0] * work.adapters
    step = max(1, BLOCK_ELEMENTS // (work.columns * work.adapters))
    decided, off, worst = dict.fromkeys(of, 0), dict.fromkeys(of, 0), dict.fromkeys(of, 0.0)
    for top in range(0, work.rows, step):
        rows = range(top, min(top + step, work.rows))
        exact = {habit: _exact(task, habit, thresholds, rows) for habit in set(of.values())}
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
            f"{task.workload.name}: {name} says that the {task.kept}th magnitude is {value}; {above} are above it, "
            f"and {upto} are not below"
        )


def _thresholds(task: Task) -> list[float]:
    """Of each delta, what lies halfway between the last magnitude that stays and the first that does not."""
    numel, kept, found = task.workload.elements, task.kept, []
    for adapter in range(task.workload.adapters):
        magnitudes, _ = _magnitudes(task, adapter)
        edges = np.partition(magnitudes, [max(numel - kept - 1, 0), min(numel - kept, numel - 1)])
        last = float(edges[numel - kept]) if kept else np.inf
        found.append((last + float(edges[numel - kept - 1])) / 2 if kept < numel else -1.0)
    return found


def _magnitudes(task: Task, adapter: int) -> tuple[np.ndarray, float]:
    """|t| of one delta, rounded to float32 [M N], and how far float32 arithmetic may be off that."""
    work = task.workload
    out, slack, step = torch.empty(work.rows, work.columns), 0.0, max(1, BLOCK_ELEMENTS // work.columns)
    for top in range(0, work.rows, step):
        rows = range(top, min(top + step, work.rows))
        t, error = _delta(task, adapter, rows)
        out[top : rows.stop] = t.abs()
        slack = max(slack, float(error.max()))
    return out.flatten().numpy(), slack


def _delta(task: Task, adapter: int, rows: range) -> tuple[Tensor, Tensor]:
    """t = s B A in float64, and (r + 2) u s |B| |A|: what float32 products and sums may be off."""
    A, B = (factor.double().cpu() for factor in task.pairs[adapter])
    B = B[rows.start : rows.stop]
    return SCALING * (B @ A), (len(A) + 2) * U32 * SCALING * (B.abs() @ A.abs())


def _exact(task: Task, habit: Habit, thresholds: list[float], rows: range) -> Exact:
    rule, work = make_rule(task.workload.method, convention=habit.convention), task.workload
    kept, errors = [], []
    shape = len(rows), work.columns
    decided = torch.ones(shape, dtype=torch.bool)
    for adapter in range(work.adapters):
        t, error = _delta(task, adapter, rows)
        slack = (
            float(error.max()) + 2 * habit.unit * thresholds[adapter]
        )  # the threshold is as uncertain as what is near it
        error = error + habit.unit * t.abs()
        if rule.keep == "magnitude":
            decided &= (t.abs() - thresholds[adapter]).abs() > error + slack
            keep = t.abs() > thresholds[adapter]
        else:
            keep = task.mask(adapter, rows).cpu() if rule.keep == "bernoulli" else torch.ones(shape, dtype=torch.bool)
        gain = 1 / work.density if rule.keep == "bernoulli" else 1.0
        kept.append(t * keep * gain)
        errors.append((error + 2 * habit.unit * t.abs()) * keep * gain)  # dropping rounds twice more
    agreeing = [torch.ones(shape, dtype=torch.bool)] * work.adapters
    count = torch.ones(shape, dtype=torch.float64)
    if rule.elect != "none":
        ballots = [weight if rule.vote_weighted else 1.0 for weight in task.weights]
        vote = sum(ballot * t for ballot, t in zip(ballots, kept, strict=True))
        doubt = sum(abs(ballot) * error for ballot, error in zip(ballots, errors, strict=True))
        votes_are_sure = (vote.abs() > doubt) | (doubt == 0)
        decided &= votes_are_sure
        for t, error in zip(kept, errors, strict=True):
            decided &= (t.abs() > error) | (t == 0)
        agreeing = [torch.where(vote >= 0, t > 0, t < 0) for t in kept]
    if rule.divisor != "one":
        shares = task.weights if rule.divisor == "weight" else [1.0] * work.adapters
        count = sum(share * agrees.double() for share, agrees in zip(shares, agreeing, strict=True))
        count = torch.where(count == 0, 1.0, count)
    terms = [weight * t * agrees for weight, t, agrees in zip(task.weights, kept, agreeing, strict=True)]
    merged = sum(terms) / count
    blur = sum(
        abs(weight) * error * agrees for weight, error, agrees in zip(task.weights, errors, agreeing, strict=True)
    )
    rounding = (work.adapters + 3) * U32 * sum(term.abs() for term in terms)
    return Exact(merged, (blur + rounding) / count.abs() + habit.unit_out * merged.abs(), decided)
