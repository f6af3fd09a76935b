"""Kind trial."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.harness.agreement import Disagreement
from bench.harness.disk import make_base
from bench.harness.inputs import MODELS, SCALING
from bench.harness.workloads import Workload
from bench.kinds import trial
from bench.kinds.table import KINDS


def test_a_trial_is_timed_and_its_sum_is_checked(tiny: str, tmp_path: Path) -> None:
    work, kind = Workload("trial", "linear", adapters=2, layers=1, model=tiny), KINDS["trial"]
    sample = kind.entries["Session"].build(work, "cpu").run()
    assert sample.seconds > 0 and sample.peak_mib > 50

    base, adapters, weights = trial._inputs(work)
    make_base(base, work.layers, MODELS[tiny])
    name, stem = f"{trial.MODULE}.weight", f"base_model.model.{trial.MODULE}"
    merged = load_file(base / "model.safetensors")[name].double()
    for w, adapter in zip(weights[1], adapters, strict=True):
        factors = load_file(adapter / "adapter_model.safetensors")
        A, B = factors[f"{stem}.lora_A.weight"], factors[f"{stem}.lora_B.weight"]
        merged += w * SCALING * (B.double() @ A.double())
    save_file({name: merged.bfloat16()}, tmp_path / "model.safetensors")
    results = {"Session": sample.result, "mergekit-evolve": tmp_path}
    assert kind.check(work, results, "cpu") is None
    save_file({name: 1.1 * merged.bfloat16()}, tmp_path / "model.safetensors")
    with pytest.raises(Disagreement, match=r"mergekit-evolve is .* off"):
        kind.check(work, results, "cpu")

    file = sample.result / "adapter_model.safetensors"
    ours = load_file(file)
    save_file({key: 1.001 * tensor for key, tensor in ours.items()}, file)
    with pytest.raises(Disagreement, match=r"Session is .* off"):
        kind.check(work, {"Session": sample.result}, "cpu")
    save_file({key: torch.zeros_like(tensor) for key, tensor in ours.items()}, file)
    with pytest.raises(Disagreement, match=r"Session, to disk is nan off"):
        kind.check(work, {"Session, to disk": sample.result}, "cpu")
