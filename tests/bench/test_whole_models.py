"""Kind whole_models."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bench.harness.agreement import Disagreement
from bench.harness.workloads import Workload
from bench.kinds.table import KINDS
from bench.kinds.whole_models import OPTIONS


@pytest.mark.parametrize("method", OPTIONS)
def test_a_merge_of_whole_models_is_timed_and_checked(tiny: str, tmp_path: Path, method: str) -> None:
    work = Workload("whole_models", method, adapters=1 if method == "slerp" else 2, layers=1, model=tiny)
    kind = KINDS["whole_models"]
    sample = kind.entries["merge-engine"].build(work, "cpu").run()
    assert sample.seconds > 0 and sample.peak_mib > 50 and sample.processor > 0 and sample.written_mib is not None
    assert kind.check(work, {"merge-engine": sample.result}, "cpu") is None

    name = "model.safetensors"
    ours = load_file(sample.result / name)
    save_file({key: tensor * 1.1 for key, tensor in ours.items()}, tmp_path / name)
    if method in ("slerp", "model_stock"):
        with pytest.raises(Disagreement, match="off the textbook"):
            kind.check(work, {"merge-engine": tmp_path}, "cpu")
    if method != "della":  # which draws
        with pytest.raises(Disagreement, match="off mergekit"):
            kind.check(work, {"merge-engine": sample.result, "mergekit-yaml": tmp_path}, "cpu")
