"""Kind base."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.harness.agreement import Disagreement
from bench.harness.workloads import Workload
from bench.kinds.base import output_of
from bench.kinds.table import KINDS


def test_errors_of_merges_into_a_base_are_relative_to_rounding_once(tiny: str, tmp_path: Path) -> None:
    work, kind = Workload("base", "ties", layers=1, model=tiny), KINDS["base"]
    sample = kind.entries["merge-engine"].build(work, "cpu").run()
    assert sample.seconds > 0 and sample.peak_mib > 50 and sample.processor > 0
    assert kind.check(work, {"merge-engine": sample.result}, "cpu") is None

    name = "model.safetensors"
    ours = {key: tensor.float() for key, tensor in load_file(sample.result / name).items()}
    save_file({key: tensor * 1.01 for key, tensor in ours.items()}, tmp_path / name)
    excess = kind.check(work, {"merge-engine": sample.result, "mergekit-yaml": tmp_path}, "cpu")
    assert excess is not None and excess["merge-engine"] == 0.0
    exact = load_file(output_of(sample.result, "float32") / name)
    merged = [key for key in exact if "_proj" in key]
    assert len(merged) == 7
    errors = [
        torch.cat([(wanted - exact[key]).double().flatten() for key, wanted in of.items() if key in merged]).norm()
        for of in ({key: tensor * 1.01 for key, tensor in ours.items()}, {k: t.bfloat16() for k, t in exact.items()})
    ]
    assert excess["mergekit-yaml"] == pytest.approx(float(errors[0] / errors[1]) - 1)

    with pytest.raises(Disagreement, match=r"elements of .*q_proj are off"):
        kind.check(work, {"merge-engine": tmp_path}, "cpu")
