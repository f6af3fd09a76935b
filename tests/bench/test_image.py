"""Kinds image and svd_merge, and what is extrapolated of them."""

from collections.abc import Callable

import pytest

from bench.harness.disk import image_modules
from bench.harness.inputs import FLUX, MODELS, flux
from bench.harness.row import Row
from bench.harness.suite import measured
from bench.harness.workloads import Workload
from bench.kinds.table import KINDS
from bench.reporting.extrapolated import OF_ONE_LAYER, SVD_MERGE, with_extrapolation


def test_a_model_of_the_shape_of_flux() -> None:
    modules = image_modules(19, MODELS[FLUX])
    assert len(modules) == 19 * 10 + 38 * 3  # as kohya's scripts adapt them: 304
    assert modules["lora_unet_double_blocks_18_txt_mlp_2"] == (3072, 12288)
    assert modules["lora_unet_single_blocks_37_linear1"] == (21504, 3072)
    assert {int(name.split("_")[4]) for name in modules if "single" in name} == set(range(38))


def test_a_merge_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGE_ENGINE_BACKEND", "torch")
    monkeypatch.setitem(MODELS, "tiny flux", flux(32))
    work = Workload("image", "ties", layers=1, model="tiny flux", rank=4, dtype="bfloat16")
    (made,) = measured(work, KINDS["image"], least=1, most=1)
    assert made.contestant == "merge-engine" and made.seconds > 0
    assert made.excess is not None and abs(made.excess) < 1e-3
    assert made.elements == sum(rows * columns for rows, columns in flux(32).values())


def test_one_layer_by_svd_merge() -> None:
    ours, theirs = measured(Workload("svd_merge", "linear", 96, 64, rank=8), KINDS["svd_merge"], least=1, most=1)
    assert (ours.contestant, theirs.contestant) == ("merge-engine", SVD_MERGE)
    assert abs(ours.excess or 0) < 1e-4 and abs(theirs.excess or 0) < 1e-4
    assert ours.baseline == SVD_MERGE


def test_svd_merge_is_extrapolated_from_one_layer(row: Callable[..., Row]) -> None:
    shapes = MODELS[FLUX].values()
    elements = 2 * sum(rows * columns for rows, columns in shapes)
    sizes = {"kind": "image", "contestant": "merge-engine", "layers": 2, "rank": 32, "elements": elements}
    image = row(**sizes, seconds=4.0)
    layer = row(kind="svd_merge", contestant=SVD_MERGE, rows=100, columns=50, rank=32, seconds=3.0, method="linear")
    ours, theirs, _ = with_extrapolation([image, layer])
    times = 2 * sum(rows * columns * min(rows, columns) for rows, columns in shapes) / (100 * 50 * 50)
    assert theirs.contestant == OF_ONE_LAYER and theirs.seconds == pytest.approx(3.0 * times)
    assert theirs.source == f"{times:.1f} x svd_merge: w, {SVD_MERGE}"
    assert (ours.baseline, ours.ratio) == (OF_ONE_LAYER, theirs.seconds / 4.0)
    assert with_extrapolation(with_extrapolation([image, layer])) == [ours, theirs, layer]
    other = row(kind="svd_merge", contestant=SVD_MERGE, rows=100, columns=50, rank=16)
    assert with_extrapolation([image, other]) == [image, other]
