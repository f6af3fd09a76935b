"""Methods on spheres: what they give are combinations of the inputs, whose factors follow from inner products.

Sources: Shoemake, "Animating rotation with quaternion curves" (slerp); Goddard, "multi-SLERP"; arXiv:2603.04972
(Karcher means of models); the behaviour of mergekit 0.1.5.
"""

import math

import numpy as np
import torch
from torch import Tensor

from merge_engine.errors import RecipeError
from merge_engine.whole_tensors.group import Group, block, combination, gram, onto, sweep

NEARLY_PARALLEL = 0.9995  # mergekit's slerp is linear beyond this cosine
_TINY = 1e-12  # a sine below this is 0: the same direction, or the opposite one


def slerp(group: Group) -> None:
    """sin((1 - t) a)/sin(a) base + sin(t a)/sin(a) x, a the angle between them; linear where they are parallel.

    mergekit's convention: linear where |cos a| > 0.9995, too.
    """
    (x,), t, base = group.tensors, group.options["t"], group.base
    assert base is not None
    products = gram([base, x], None)
    first, second = _arc(_sides(products), t, 1.0 if group.published else NEARLY_PARALLEL)
    combination(group, [float(second)], float(first))


def nuslerp(group: Group) -> None:
    """slerp of two tensors by weights, t = w_2 / (w_1 + w_2); of their differences, where there is a base.

    Of whole tensors (nuslerp_flatten), else of every row, or of every column (nuslerp_row_wise).
    """
    weights, options = group.options["weight"], group.options
    total = sum(weights)
    t = 0.5 if abs(total) < 1e-6 else weights[1] / total
    if options["nuslerp_flatten"] or group.out.ndim < 2:
        first, second = _arc(_sides(gram(group.tensors, group.base)), t, 1.0)
        onto(group, [float(first), float(second)])
    else:
        _by_lines(group, t, by_columns=options["nuslerp_row_wise"])


def _by_lines(group: Group, t: float, by_columns: bool) -> None:
    shape = (group.out.shape[0], -1) if by_columns else (-1, group.columns)
    one, two, out = (each.reshape(shape) for each in (*group.tensors, group.out))
    base = None if group.base is None else group.base.reshape(shape)
    axis = 0 if by_columns else 1

    def products(part: slice) -> Tensor:
        a, b = (block(each, part, base).double() for each in (one, two))
        return torch.stack([(a * a).sum(axis), (b * b).sum(axis), (a * b).sum(axis)])

    parts = sweep(out.shape, products)
    sums = sum(parts[1:], parts[0]) if by_columns else torch.cat(parts, 1)
    factors = [torch.from_numpy(np.asarray(each)).float() for each in _arc(sums.numpy(), t, 1.0)]

    def combine(part: slice) -> None:
        first, second = factors if by_columns else (factor[part, None] for factor in factors)
        total = block(one, part, base).mul_(first).add_(block(two, part, base).mul_(second))
        out[part] = total if base is None else total.add_(base[part])

    sweep(out.shape, combine)


def _sides(products: np.ndarray) -> np.ndarray:
    return np.array([products[0, 0], products[1, 1], products[0, 1]])


def _arc(sides: np.ndarray, t: float, parallel: float) -> tuple[np.ndarray, np.ndarray]:
    """The factors of two vectors at t on the arc between them; sides: |a|^2, |b|^2, <a, b>, each for many lines."""
    first, second, both = sides
    size = np.sqrt(np.asarray(first * second, np.float64))
    cosine = np.clip(np.divide(both, size, out=np.zeros_like(size), where=np.asarray(size > 0)), -1.0, 1.0)
    angle = np.arccos(cosine)
    sine = np.sin(angle)
    straight = (sine < _TINY) | (np.abs(cosine) > parallel)
    safe = np.where(straight, 1.0, sine)
    return (
        np.where(straight, 1 - t, np.sin((1 - t) * angle) / safe),
        np.where(straight, t, np.sin(t * angle) / safe),
    )


def multislerp(group: Group) -> None:
    """(sum_i w_i |t_i|) * direction of sum_i w_i t_i / |t_i|; of differences, where there is a base.

    The interpolation in the tangent space at the mean direction adds nothing: its weighted sum is 0 there. One tensor
    alone is taken as it is. Raises RecipeError where weights sum to 0, or where directions cancel out.
    """
    weights, eps = np.array(group.options["weight"], np.float64), group.options["eps"]
    if len(weights) == 1:
        combination(group, [1.0])
        return
    if group.options["normalize_weights"]:
        if not weights.sum():
            use = "wanted other weights, or normalize_weights: false"
            raise RecipeError(f"weight: multislerp divides by their sum, got 0 for {group.name}; {use}")
        weights = weights / weights.sum()
    products = gram(group.tensors, group.base)
    norms = np.sqrt(products.diagonal())
    shares = weights / (norms + eps)
    length = math.sqrt(max(float(shares @ products @ shares), 0.0))
    if length >= eps and length > 0:
        onto(group, list(shares * (norms @ weights) / length))
    elif len(weights) == 2:
        onto(group, list(weights))
    else:
        raise RecipeError(f"weight: multislerp: directions cancel out in {group.name}; wanted other weights")


def karcher(group: Group) -> None:
    """mean norm * the mean on the sphere of directions: steps of the exponential map until the tangent is below tol.

    Steps are on coefficients over the inputs, from their inner products. Inputs with a norm up to tol are left out.
    """
    count, tol = len(group.tensors), group.options["tol"]
    if count == 1:
        combination(group, [1.0])
        return
    products = gram(group.tensors, None)
    norms = np.sqrt(products.diagonal())
    used = [i for i in range(count) if norms[i] > tol]
    factors = np.zeros(count)
    if used:
        cosines = products[np.ix_(used, used)] / np.outer(norms[used], norms[used])
        factors[used] = _mean_direction(cosines, tol, group.options["max_iter"]) / norms[used] * norms.mean()
    combination(group, list(factors))


def _mean_direction(cosines: np.ndarray, tol: float, steps: int) -> np.ndarray:
    """The coefficients of the Karcher mean over unit vectors with these inner products, all of one weight."""
    count = len(cosines)
    share, units = 1 / count, np.eye(count)

    def norm(vector: np.ndarray) -> float:
        return math.sqrt(max(float(vector @ cosines @ vector), 0.0))

    mean = np.full(count, share)
    mean = units[0] if norm(mean) < tol else mean / norm(mean)
    for _ in range(steps):
        tangent = np.zeros(count)
        for unit, cosine in zip(units, np.clip(cosines @ mean, -1, 1), strict=True):
            angle = math.acos(cosine)
            if tol <= angle < math.pi:
                tangent += share * angle / math.sin(angle) * (unit - cosine * mean)
        length = norm(tangent)
        if length < tol:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * tangent
        mean = mean / norm(mean)
    return mean
