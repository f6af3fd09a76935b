"""Merges c_1 tau_1 + ... + c_T tau_T whose coefficients follow from the inner products of the adapters alone.

``gram`` [T, T] holds G[i, j] = <tau_i, tau_j>, as `cores.gram_of` or `Cores.gram` computes it; flattened deltas are
points of a sphere here. A zero adapter has coefficient 0.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from merge_engine.lowrank.small_svd import rounding

_STEPS = 10
_STILL = 1e-5  # an angle below which nothing moves


def multislerp(gram: Tensor, weights: Sequence[float]) -> list[float]:
    """(sum_t w_t |tau_t|) / (sum_t |w_t|) * normalise(sum_t w_t tau_t / |tau_t|): the mean direction, of the mean norm.

    Only ratios of weights matter, as in mergekit, which divides them by their sum; zero adapters do not count. Negating
    all of them changes nothing. Raises ValueError where the directions cancel.
    Source: mergekit's method of that name; its step in the tangent space is always 0.
    """
    norms, cosines = _sphere(gram)
    w = torch.where(norms > 0, torch.tensor(weights, dtype=torch.float64), 0.0)
    length = _length(cosines, w)
    if length == 0:
        if w.any():
            raise ValueError("the weighted directions of the adapters cancel: wanted weights for which they do not")
        return [0.0] * len(norms)
    return _coefficients(w * float((w * norms).sum() / w.abs().sum()) / length, norms)


def karcher(gram: Tensor, weights: Sequence[float]) -> list[float]:
    """(sum_t |w_t| |tau_t|) / (sum_t |w_t|) * m, m on the unit sphere with the least sum_t |w_t| angle(m, +-tau_t)^2.

    The sign is that of w_t. Ten steps at most, of 1e-5 at least, from the weighted mean of the directions, or the
    first of them where that is 0. Only ratios of weights matter; mergekit has none. Zero adapters do not count.
    Source: mergekit's method of that name; Karcher's mean of points on a sphere.
    """
    norms, cosines = _sphere(gram)
    w = torch.where(norms > 0, torch.tensor(weights, dtype=torch.float64), 0.0)
    if not w.any():
        return [0.0] * len(norms)
    signs, shares = w.sign(), w.abs() / w.abs().sum()
    cosines = cosines * signs.outer(signs)  # of the points sign(w) tau / |tau|
    mean = shares
    if _length(cosines, mean) < _STILL:
        mean = torch.zeros_like(w)
        mean[int(w.nonzero()[0])] = 1.0
    mean = mean / _length(cosines, mean)
    for _ in range(_STEPS):
        along = (cosines @ mean).clamp(-1, 1)
        angles = along.arccos()
        # A point opposite to the mean lies in every direction at once: it has no pull.
        pulls = torch.where((angles < _STILL) | (math.pi - angles < _STILL), 0.0, shares * angles / angles.sin())
        tangent = pulls - float(pulls @ along) * mean
        length = _length(cosines, tangent)
        if length < _STILL:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * tangent
        mean = mean / _length(cosines, mean)
    return _coefficients(signs * mean * float((shares * norms).sum()), norms)


def _sphere(gram: Tensor) -> tuple[Tensor, Tensor]:
    """|tau_t| [T], and the cosines [T, T] between adapters: 0 with a zero one."""
    norms = gram.diag().clamp(min=0).sqrt()
    unit = torch.where(norms > 0, norms, 1.0)
    return norms, gram / unit / unit[:, None]


def _length(cosines: Tensor, coefficients: Tensor) -> float:
    """|sum_t c_t tau_t / |tau_t||; 0 where float64 cannot tell it from 0."""
    square = float(coefficients @ cosines @ coefficients)
    return math.sqrt(square) if square > rounding(len(cosines)) * float(coefficients.abs().sum()) ** 2 else 0.0


def _coefficients(of_units: Tensor, norms: Tensor) -> list[float]:
    return torch.where(norms > 0, of_units / norms, 0.0).tolist()
