"""Coefficients from inner products, against dense means on the sphere."""

import math

import pytest
import spectral_textbook as textbook
import torch
from hypothesis import assume, given, settings
from small_adapters import adapters, drawn

from merge_engine.lowrank.cores import gram_of
from merge_engine.lowrank.gram import karcher, multislerp


def merged(method, given) -> torch.Tensor:
    found = method(gram_of(given.As, given.Bs, given.scalings), given.weights)
    assert all(isinstance(c, float) for c in found)
    return textbook.linear(given.deltas, found)


def length_of_mean(given) -> float:
    """|sum w tau / |tau|| of a sum |w| of 1: what the mean direction is divided by."""
    return textbook.condition("multislerp", given.deltas, given.weights) if any(given.weights) else 1.0


@pytest.mark.quick
@pytest.mark.parametrize(("name", "method"), [("multislerp", multislerp), ("karcher", karcher)])
def test_without_cores(name, method):
    given = drawn(1, 20, 30, [3, 6, 2], [0.2, 0.5, 0.3])
    wanted = textbook.METHODS[name](given.deltas, given.weights)
    assert float((merged(method, given) - wanted).norm()) <= 1e-13 * float(wanted.norm())


@settings(max_examples=100)
@given(given=adapters())
def test_any_adapters(given):
    present = [w for w, delta in zip(given.weights, given.deltas, strict=True) if w and delta.any()]
    if not present:
        assert multislerp(gram_of(given.As, given.Bs, given.scalings), given.weights) == [0.0] * len(given.As)
        assert karcher(gram_of(given.As, given.Bs, given.scalings), given.weights) == [0.0] * len(given.As)
        return
    length = length_of_mean(given)
    assume(length > 1e-3)
    for name, method in (("multislerp", multislerp), ("karcher", karcher)):
        wanted = textbook.METHODS[name](given.deltas, given.weights)
        pairs = [(abs(w), float(d.norm())) for w, d in zip(given.weights, given.deltas, strict=True) if d.any()]
        scale = sum(w * norm for w, norm in pairs) / sum(w for w, _ in pairs)
        # Its square is off by some 2**-50 where deltas are products that cancel a little, and divides.
        assert float((merged(method, given) - wanted).norm()) <= 1e-13 / length**2 * scale


def test_two_points_meet_halfway_on_the_sphere():
    """Of two, the weighted Karcher mean lies on the great circle, at angles in the ratio of the weights."""
    angle = 1.1
    gram = torch.tensor([[1.0, math.cos(angle)], [math.cos(angle), 1.0]], dtype=torch.float64)
    first, second = karcher(gram, [0.75, 0.25])
    mean = torch.tensor([first, second], dtype=torch.float64)
    cosines = gram @ mean
    assert math.sqrt(float(mean @ gram @ mean)) == pytest.approx(1.0, abs=1e-14)
    # It stops at steps of 1e-5, and each is several times smaller than the one before.
    assert math.acos(float(cosines[0])) == pytest.approx(angle / 4, abs=1e-5)
    assert math.acos(float(cosines[1])) == pytest.approx(3 * angle / 4, abs=1e-5)
    chord = multislerp(gram, [0.75, 0.25])  # the mean of the chord, on the same circle, lies elsewhere
    assert abs(chord[0] - first) > 1e-3


def test_norms_are_weighted_means_of_norms():
    given = drawn(2, 20, 30, [3, 6, 2], [0.2, 0.5, 0.3])
    wanted = sum(w * float(d.norm()) for w, d in zip(given.weights, given.deltas, strict=True))
    for method in (multislerp, karcher):
        assert float(merged(method, given).norm()) == pytest.approx(wanted, rel=1e-13)


def test_equal_adapters_are_their_own_mean():
    given = drawn(3, 20, 30, [3], [1.0])
    copies = given._replace(As=given.As * 3, Bs=given.Bs * 3, scalings=given.scalings * 3, weights=[0.5, 0.2, 0.3])
    for method in (multislerp, karcher):
        difference = merged(method, copies) - given.deltas[0]
        assert float(difference.norm()) <= 1e-13 * float(given.deltas[0].norm())


def test_opposite_adapters():
    """mergekit's Karcher mean starts from the first of directions that cancel; their chord has no direction."""
    gram = torch.tensor([[4.0, -2.0], [-2.0, 1.0]], dtype=torch.float64)
    assert karcher(gram, [0.5, 0.5]) == pytest.approx([0.75, 0.0], abs=1e-14)
    with pytest.raises(ValueError, match="cancel"):
        multislerp(gram, [0.5, 0.5])
    assert multislerp(gram, [0.0, 0.0]) == karcher(gram, [0.0, 0.0]) == [0.0, 0.0]
    # Opposite signs make them one direction again: norms 2 and 1.
    assert karcher(gram, [0.5, -0.5]) == pytest.approx([0.375, -0.75], abs=1e-14)
    assert karcher(gram, [3.0, -3.0]) == pytest.approx([0.375, -0.75], abs=1e-14)


def test_a_point_opposite_to_the_mean_pulls_nowhere():
    """Points of a plane: at 0, at pi, and at two angles whose sines cancel and which themselves do not."""
    high, low = 2.5, -0.4
    weights = [0.6, 0.05, 0.3 * math.sin(-low), 0.3 * math.sin(high)]
    angles = [0.0, math.pi, high, low]
    points = torch.tensor([[math.cos(angle), math.sin(angle)] for angle in angles], dtype=torch.float64)
    mean = torch.tensor(karcher(points @ points.T, weights), dtype=torch.float64) @ points
    # After the first step the point at pi is seen from one side, and pulls: the angles of all others settle it.
    steps = textbook.karcher(list(points[:, None]), weights)
    assert float((mean - steps[0]).norm()) <= 1e-12
    assert abs(math.atan2(float(mean[1]), float(mean[0]))) > 0.05


def test_inner_products_of_any_ranks_and_signs():
    given = drawn(4, 9, 7, [0, 3, 1], scalings=[1.0, -2.0, 0.5])
    found = gram_of(given.As, given.Bs, given.scalings)
    assert torch.allclose(found, textbook.gram(given.deltas), rtol=0, atol=1e-13 * float(found.max()))
    assert not found[0].any() and torch.equal(found, found.T)
