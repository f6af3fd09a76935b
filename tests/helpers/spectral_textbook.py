"""Merging methods on dense deltas [M, N] in float64, as their formulas read: slow, and independent of the package.

Singular values up to TOLERANCE times the largest, or up to ``noise``, count as zero.
"""

import math

import torch

TOLERANCE = 2.0**-20


def count(values, noise=0.0):
    return int((values > max(TOLERANCE * float(values.max()), noise)).sum()) if len(values) else 0


def svd(matrix, noise=0.0):
    """U, S, V^T of the numerical rank."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    k = count(s, noise)
    return u[:, :k], s[:k], vh[:k]


def polar(matrix):
    u, _, vh = svd(matrix)
    return u @ vh


def linear(deltas, weights):
    return sum(w * delta for w, delta in zip(weights, deltas, strict=True))


def unit_directions(deltas, weights):
    """[U_1 ... U_T], diag(w S) and [V_1 ... V_T]^T of the adapters that have a weight."""
    left, middle, right = [], [], []
    for delta, w in zip(deltas, weights, strict=True):
        if w != 0:
            u, s, vh = svd(delta)
            left.append(u)
            middle.append(w * s)
            right.append(vh)
    if not left:
        rows, columns = deltas[0].shape
        return deltas[0].new_zeros(rows, 0), deltas[0].new_zeros(0, 0), deltas[0].new_zeros(0, columns)
    return torch.cat(left, dim=1), torch.diag(torch.cat(middle)), torch.cat(right)


def tsv(deltas, weights):
    u, s, vh = unit_directions(deltas, weights)
    return polar(u) @ s @ polar(vh)


def isotropic(matrix, noise):
    u, s, vh = svd(matrix, noise)
    return s.sum() / len(s) * (u @ vh) if len(s) else torch.zeros_like(matrix)


def iso_c(deltas, weights, noise=0.0):
    return isotropic(linear(deltas, weights), noise)


def tsv_iso(deltas, weights, noise=0.0):
    return isotropic(tsv(deltas, weights), noise)


def actmat(deltas, weights, ridge=1.0):
    """(sum w tau G) (sum |w| G + mu I)^+ within the row span, G = tau^T tau / |tau|^2, mu = ridge trace / rank."""
    n = deltas[0].shape[1]
    numerator, covariance = torch.zeros_like(deltas[0]), deltas[0].new_zeros(n, n)
    for delta, w in zip(deltas, weights, strict=True):
        if delta.any():
            G = delta.T @ delta / delta.square().sum()
            numerator += w * delta @ G
            covariance += abs(w) * G
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > TOLERANCE**2 * values.max()
    if not kept.any():
        return numerator
    mu = ridge * covariance.trace() / kept.sum()
    within = vectors[:, kept]
    return numerator @ within @ torch.diag(1 / (values[kept] + mu)) @ within.T


def multislerp(deltas, weights):
    present = [(delta, w) for delta, w in zip(deltas, weights, strict=True) if delta.any()]
    direction = sum(w * delta / delta.norm() for delta, w in present) if present else torch.zeros_like(deltas[0])
    if not direction.any():
        return direction
    mean_norm = sum(w * delta.norm() for delta, w in present) / sum(abs(w) for _, w in present)
    return mean_norm * direction / direction.norm()


def karcher(deltas, weights, steps=10, still=1e-5):
    """The iteration on flat unit vectors; weights and norms as `merge_engine.lowrank.gram.karcher` says."""
    points, shares, scale = [], [], 0.0
    for delta, w in zip(deltas, weights, strict=True):
        if w != 0 and delta.any():
            points.append(math.copysign(1, w) * delta.flatten() / delta.norm())
            shares.append(abs(w))
            scale += abs(w) * float(delta.norm())
    if not points:
        return torch.zeros_like(deltas[0])
    scale /= sum(shares)
    shares = [share / sum(shares) for share in shares]
    mean = sum(share * point for share, point in zip(shares, points, strict=True))
    mean = mean / mean.norm() if mean.norm() >= still else points[0]
    for _ in range(steps):
        tangent = torch.zeros_like(mean)
        for share, point in zip(shares, points, strict=True):
            along = float((mean @ point).clamp(-1, 1))
            angle = math.acos(along)
            if still <= angle <= math.pi - still:
                tangent += share * angle / math.sin(angle) * (point - along * mean)
        length = float(tangent.norm())
        if length < still:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * tangent
        mean = mean / mean.norm()
    return scale * mean.reshape(deltas[0].shape)


def gram(deltas):
    flat = torch.stack([delta.flatten() for delta in deltas])
    return flat @ flat.T


def bases(deltas):
    """U [M, K] of [tau_1 | ... | tau_T] and V [N, K'] of the stacked rows, with their singular values."""
    u, left, _ = svd(torch.cat(deltas, dim=1))
    v, right, _ = svd(torch.cat([delta.T for delta in deltas], dim=1))
    return (u, left), (v, right)


def pico(deltas):
    """(I + U diag(alpha - 1) U^T) tau of each."""
    (u, values), _ = bases(deltas)
    shares = values**2 / (values**2).sum()
    alpha = 1 / (1 + (len(deltas) - 1) * shares)
    damp = torch.eye(len(u), dtype=u.dtype) + u @ torch.diag(alpha - 1) @ u.T
    return [damp @ delta for delta in deltas]


METHODS = {
    "tsv": tsv,
    "iso_c": iso_c,
    "tsv_iso": tsv_iso,
    "actmat": actmat,
    "multislerp": multislerp,
    "karcher": karcher,
}


def condition(name, deltas, weights):
    """By which share of a relative disturbance of the deltas a method's result may be divided: 1 for the steadiest.

    The smallest counted singular values, of a largest of 1, of everything that a polar factor or an inverse is taken
    of: a product, since a disturbance passes one after the other.
    """

    def share(matrix):
        s = svd(matrix)[1]
        return float(s[-1] / s[0]) if len(s) else 1.0

    used = [delta for delta, w in zip(deltas, weights, strict=True) if w != 0 and delta.any()]
    if not used:
        return 1.0
    if name == "iso_c":
        return share(linear(deltas, weights))
    if name in ("tsv", "tsv_iso"):
        u, _, vh = unit_directions(deltas, weights)
        polars = min(share(u), share(vh)) * min(map(share, used))
        return polars * share(tsv(deltas, weights)) if name == "tsv_iso" else polars
    if name == "actmat":
        unit = [abs(w) ** 0.5 * delta / delta.norm() for delta, w in zip(deltas, weights, strict=True) if delta.any()]
        return share(torch.cat(unit))
    direction = sum(w * delta / delta.norm() for delta, w in zip(deltas, weights, strict=True) if delta.any())
    return float(direction.norm()) / sum(map(abs, weights))
