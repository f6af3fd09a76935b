"""The textbook: every step on whole tensors, in a few lines each. The specification, and the benchmarks' baseline.

Task tensors are float32 and of one shape within a module. Nothing here is fast; `tiled` and the kernels must agree
with it.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from merge_engine.rules.rule import Rule, require


def delta(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """scaling * B @ A, A [r, N], B [M, r], in float32."""
    return scaling * (B.float() @ A.float())


def trim(tensor: Tensor, k: int, ties: str) -> Tensor:
    """tensor where |tensor| is among the k largest, else 0.

    ties "exact": exactly k elements stay, equal magnitudes by lowest flat index; "keep": all that equal the k-th stay.
    """
    magnitude = tensor.abs().flatten()
    if k == 0:
        return torch.zeros_like(tensor)
    order = magnitude.sort(descending=True, stable=True).indices
    if ties == "keep":
        mask = magnitude >= magnitude[order[k - 1]]
    else:
        mask = torch.zeros_like(magnitude, dtype=torch.bool)
        mask[order[:k]] = True
    return torch.where(mask.view_as(tensor), tensor, torch.zeros_like(tensor))


def band(tensor: Tensor, top: int, k: int, ties: str) -> Tensor:
    """tensor where |tensor| is among the top + k largest and not among the top largest, else 0; ties as in `trim`."""
    return trim(tensor, top + k, ties) - trim(tensor, top, ties)


def drop_and_rescale(tensor: Tensor, mask: Tensor, density: float, l1: bool) -> Tensor:
    """tensor * mask / density; l1: tensor * mask * |tensor|_1 / |tensor * mask|_1 (no rescale below 1e-7)."""
    kept = torch.where(mask, tensor, torch.zeros_like(tensor))
    if not l1:
        return kept / density
    before, after = tensor.double().abs().sum().item(), kept.double().abs().sum().item()
    return kept if density >= 1 or min(before, after) < 1e-7 else kept * (before / after)


def vote(tensors: Sequence[Tensor], weights: Sequence[float], rule: Rule) -> Tensor:
    """sum_i t_i (total) or sum_i sign(t_i) (frequency), of w_i t_i if the convention weighs the vote."""
    require(rule, "the reference", elect=("total", "frequency"))
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        ballot = weight * tensor if rule.vote_weighted else tensor
        total += ballot.sign() if rule.elect == "frequency" else ballot
    return total


def elected_signs(tensors: Sequence[Tensor], weights: Sequence[float], rule: Rule, tied: int) -> Tensor:
    """The sign of the vote, and `tied` where that is 0."""
    signs = vote(tensors, weights, rule).sign()
    return torch.where(signs == 0, tied, signs)


def combine(tensors: Sequence[Tensor], weights: Sequence[float], rule: Rule, tied: int = 1) -> Tensor:
    """What the rule makes of what is kept: `weighted_sum`, `largest` or `consensus`."""
    require(rule, "the reference", combine=("sum", "max", "consensus"))
    if rule.combine == "max":
        return largest(tensors, weights, rule, tied)
    if rule.combine == "consensus":
        return consensus(tensors, weights, rule)
    return weighted_sum(tensors, weights, rule, tied)


def largest(tensors: Sequence[Tensor], weights: Sequence[float], rule: Rule, tied: int) -> Tensor:
    """elected * max_i |w_i t_i| over those with sign(w_i t_i) = elected, 0 where there is none."""
    require(rule, "the reference, for the largest,", vote_weighted=(True,), divisor=("one",))
    elected = elected_signs(tensors, weights, rule, tied)
    size = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        size = torch.maximum(size, elected * (weight * tensor))  # what disagrees is negative here
    return elected * size


def consensus(tensors: Sequence[Tensor], weights: Sequence[float], rule: Rule) -> Tensor:
    """S = sum_i w_i t_i where at least min_tasks of the i have |w_i t_i| > mask |S - w_i t_i|, else 0.

    An adapter that passes accounts for much of S. Passing adapters are only counted, and the whole sum stays, as in
    the authors' code: there min_tasks = 0 removes nothing, and one above the number of adapters everything.
    """
    require(rule, "the reference, for a consensus,", elect=("none",), divisor=("one",))
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight * tensor
    count = torch.zeros_like(total)
    for tensor, weight in zip(tensors, weights, strict=True):
        count += (weight * tensor).abs() > (total - weight * tensor).abs() * rule.mask
    return torch.where(count >= rule.min_tasks, total, torch.zeros_like(total))


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float], rule: Rule, tied: int) -> Tensor:
    """sum_i w_i t_i [sign(t_i) = elected] / divisor; the divisor is the agreeing count, their weights' sum, or 1."""
    require(rule, "the reference", divisor=("count", "weight", "one"))
    elected = elected_signs(tensors, weights, rule, tied) if rule.elect != "none" else None
    total = torch.zeros_like(tensors[0])
    divisor = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        weighted = weight * tensor
        if elected is None:
            total += weighted
        else:
            agrees = (weighted if rule.vote_weighted else tensor).sign() == elected
            total += torch.where(agrees, weighted, torch.zeros_like(weighted))
            divisor += agrees * (weight if rule.divisor == "weight" else 1.0)
    return total if rule.divisor == "one" else total / torch.where(divisor == 0, 1.0, divisor)


def merge_model(
    tasks: Mapping[str, Mapping[int, Tensor]],
    weights: Sequence[float],
    densities: Mapping[str, Sequence[float]],
    rule: Rule,
    *,
    masks: Mapping[str, Mapping[int, Tensor]] | None = None,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """scale * combine(elect(keep(t))) for each module: {module: {adapter: task tensor}} -> {module: merged}.

    densities: per module, one number an adapter. masks: for random drops, {module: {adapter: bool tensor}}.
    Model scope: one threshold an adapter over all its modules in name order, with the density of its first module.
    """
    require(rule, "the reference", keep=("all", "magnitude", "band", "bernoulli"), scope=("tensor", "model"))
    names = sorted(tasks)
    kept: dict[str, dict[int, Tensor]] = {name: dict(tasks[name]) for name in names}
    for adapter in range(len(weights)):
        mine = [name for name in names if adapter in tasks[name]]
        groups = [[name] for name in mine] if rule.scope == "tensor" else [mine] if mine else []
        for group in groups:
            if rule.keep == "magnitude":
                flat = torch.cat([tasks[name][adapter].flatten() for name in group])
                trimmed = trim(flat, rule.kept(densities[group[0]][adapter], flat.numel()), rule.trim_ties)
                pieces = trimmed.split([tasks[name][adapter].numel() for name in group])
                for name, piece in zip(group, pieces, strict=True):
                    kept[name][adapter] = piece.view_as(tasks[name][adapter])
        for name in mine:
            if rule.keep == "band":
                tensor, density = tasks[name][adapter], densities[name][adapter]
                top, k = rule.topped(density, tensor.numel()), rule.kept(density, tensor.numel())
                kept[name][adapter] = band(tensor, top, k, rule.trim_ties)
            if rule.keep == "bernoulli" and masks is not None:
                tensor, mask = tasks[name][adapter], masks[name][adapter]
                kept[name][adapter] = drop_and_rescale(tensor, mask, densities[name][adapter], rule.l1_rescale)
    tensors = {name: list(kept[name].values()) for name in names}
    shares = {name: [weights[adapter] for adapter in kept[name]] for name in names}
    tied = 1
    if rule.elect != "none" and rule.majority:
        balance = sum(int(vote(tensors[name], shares[name], rule).sign().sum().item()) for name in names)
        tied = (balance > 0) - (balance < 0)
    return {name: scale * combine(tensors[name], shares[name], rule, tied or -1) for name in names}
