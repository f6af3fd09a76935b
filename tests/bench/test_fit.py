"""The straight line through costs."""

import pytest

from bench.reporting.fit import fit


@pytest.mark.quick
def test_a_line_is_found_and_what_is_no_line_has_a_residual() -> None:
    xs = [1.0, 2.0, 4.0, 8.0]
    line = fit(xs, [3.0 + 2.0 * x for x in xs])
    assert (line.slope, line.intercept) == (pytest.approx(2.0), pytest.approx(3.0))
    assert line.residual < 1e-12
    assert fit(xs, [x**2 for x in xs]).residual > 0.2


def test_no_other_line_has_smaller_relative_errors() -> None:
    """The sum of squares of (a + b x) / y - 1 is least where its derivatives by a and b are 0."""
    points = [(1.0, 1.0), (2.0, 2.0), (4.0, 8.0)]
    skew = fit(*zip(*points, strict=True))
    errors = [(skew.intercept + skew.slope * x) / y - 1 for x, y in points]
    assert sum(error / y for error, (_, y) in zip(errors, points, strict=True)) == pytest.approx(0, abs=1e-9)
    assert sum(error * x / y for error, (x, y) in zip(errors, points, strict=True)) == pytest.approx(0, abs=1e-9)
    assert skew.residual == pytest.approx(max(map(abs, errors)))


def test_one_size_has_no_line() -> None:
    with pytest.raises(ValueError, match="two sizes"):
        fit([1.0, 1.0], [1.0, 2.0])
