"""The weights of factors that are merged apart."""

import pytest

from merge_engine.rules.factor_weights import factor_weights


@pytest.mark.parametrize("strengths", [[4.0, 0.0, -9.0], [0.0], [-0.0, 1e-300, 2.0]])
def test_the_two_sides_multiply_out_to_the_strength(strengths):
    of_a, of_b = factor_weights(strengths, "A"), factor_weights(strengths, "B")
    assert [a * b for a, b in zip(of_a, of_b, strict=True)] == pytest.approx(strengths, rel=1e-15, abs=0)
    assert all(b >= 0 for b in of_b)
    assert [abs(a) for a in of_a] == of_b
