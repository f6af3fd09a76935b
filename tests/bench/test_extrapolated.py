"""PEFT's whole merge, from its layers."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from bench.harness.inputs import TINY_LLAMA
from bench.harness.row import Row
from bench.reporting.extrapolated import EXTRAPOLATED, with_extrapolation
from bench.reporting.files import Report
from bench.reporting.tables import markdown

TOOK = {(256, 2048): 0.25, (2048, 2048): 2.0, (2048, 5632): 8.0, (5632, 2048): 5.0}


@pytest.fixture
def whole(row: Callable[..., Row]) -> Row:
    """A whole merge of three layers."""
    block = sum(rows * columns for rows, columns in TINY_LLAMA.values())
    made = row(kind="whole", contestant="merge-engine", layers=3, rows=0, columns=0, seconds=2.0, elements=3 * block)
    return replace(made, processor=4.0, peak_mib=500.0, excess=1e-5, kept_energy=0.3)


@pytest.fixture
def layers(row: Callable[..., Row]) -> list[Row]:
    """PEFT and the drop-in on one layer of each shape."""
    made = [
        row(
            kind="layer", workload=f"{m}x{n}", contestant=name, method="ties_svd", rows=m, columns=n, seconds=t * factor
        )
        for (m, n), t in TOOK.items()
        for name, factor in (("PEFT", 1.0), ("drop-in", 0.01))
    ]
    return [replace(each, low=0.5 * each.seconds, processor=2 * each.seconds, peak_mib=9.0) for each in made]


@pytest.mark.quick
def test_pefts_whole_merge_is_a_sum_of_its_layers(whole: Row, layers: list[Row]) -> None:
    for rows in ([whole, *layers], [*layers, whole]):
        made = with_extrapolation(rows)
        assert with_extrapolation(made) == made
        ours, theirs = (each for each in made if each.kind == "whole")
        assert [each for each in made if each.kind == "layer"] == layers
        # A block has the modules: q and o; k and v; gate and up; down.
        assert theirs.contestant == EXTRAPOLATED
        assert theirs.seconds == 3 * (2 * 2.0 + 2 * 0.25 + 2 * 5.0 + 8.0)
        assert (theirs.low, theirs.processor) == (theirs.seconds / 2, theirs.seconds * 2)
        assert (theirs.peak_mib, theirs.excess, theirs.kept_energy) == (None, None, None)
        assert theirs.source.startswith("6 x layer: 256x2048, PEFT + 6 x layer: 2048x2048, PEFT + 3 x ")
        assert (ours.baseline, ours.ratio) == (EXTRAPOLATED, theirs.seconds / 2.0)
        assert replace(ours, baseline="", ratio=None) == whole
        assert theirs.source in markdown(Report({}, made))


def test_nothing_is_extrapolated_from_other_settings_or_a_missing_shape(whole: Row, layers: list[Row]) -> None:
    for rows in ([whole, *layers[2:]], [replace(whole, rank=8), *layers], [replace(whole, elements=64), *layers]):
        assert with_extrapolation(rows) == rows
