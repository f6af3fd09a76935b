"""Kind whole: a whole merge of adapters cut to a rank, from disk to disk, without a base model.

Each merge has a process of its own, so that its peak memory is its own. PEFT's add_weighted_adapter needs the base
model and takes minutes, so its time is extrapolated from kind `layer`: see `reporting.extrapolated`.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from bench.harness.agreement import Disagreement
from bench.harness.disk import adapters_on_disk, scratch_folder
from bench.harness.inputs import SCALING
from bench.harness.kind import Entry, Kind, Results
from bench.harness.measure import MIB, Contestant, Sample
from bench.harness.workloads import Workload
from merge_engine.rules import reference
from merge_engine.rules.rule import make_rule

LARGEST_EXCESS = 1e-3  # of the error over that of the best cut
# Random factors lose much of their energy in a cut: merges would log that every time.
WORKER = """
import json, logging, sys, time
import merge_engine
logging.getLogger("merge_engine").setLevel(logging.ERROR)
start, before = time.perf_counter(), time.process_time()
result = merge_engine.merge(json.loads(sys.argv[1]), sys.argv[2], **json.loads(sys.argv[3]))
seconds, processor = time.perf_counter() - start, time.process_time() - before
from bench.harness.processes import process_status  # only now, so that the merge pays for its own imports
print(json.dumps([seconds, 1024 * process_status("VmHWM"), processor, result.total_energy]))
"""


def _merge(work: Workload, device: str) -> Contestant:
    adapters, output = adapters_on_disk(work.adapters, work.layers, work.model), scratch_folder() / "merged"
    recipe = {"method": work.method, "density": work.density, "rank": work.rank, "overwrite": True}
    return Contestant(lambda: in_a_process(adapters, output, recipe), own_clock=True)


def in_a_process(adapters: list[Path], output: Path, recipe: Mapping[str, Any]) -> Sample:
    """One merge, timed by the process that does it; the result is the path of the output."""
    arguments = [json.dumps([str(folder) for folder in adapters]), str(output), json.dumps(recipe)]
    done = subprocess.run([sys.executable, "-c", WORKER, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    seconds, peak, processor, kept = json.loads(done.stdout)
    return Sample(seconds, output, peak / MIB, processor=processor, kept_energy=kept)


def _check(work: Workload, results: Results, device: str) -> Mapping[str, float]:
    """One module of the output is as good a cut as the best."""
    adapters = adapters_on_disk(work.adapters, work.layers, work.model)
    excess = {name: _excess(work, adapters, folder) for name, folder in results.items()}
    if not max(excess.values()) <= LARGEST_EXCESS:
        raise Disagreement(
            f"{work.name}: the error of one module is larger than that of the best cut, by {max(excess.values()):.1e}"
        )
    return excess


def _excess(work: Workload, adapters: list[Path], output: Path) -> float:
    """|D - B A| / |D - the best cut of D| - 1, of one module; D is the merged delta by `reference`."""
    deltas = {number: reference.delta(*_factors(folder), SCALING) for number, folder in enumerate(adapters)}
    ones, densities = [1.0] * len(deltas), {"": [work.density] * len(deltas)}
    exact = reference.merge_model({"": deltas}, ones, densities, make_rule(work.method))[""].double()
    config = json.loads((output / "adapter_config.json").read_text())
    A, B = _factors(output)
    error = (exact - config["lora_alpha"] / config["r"] * (B.double() @ A.double())).norm()
    best = torch.linalg.svdvals(exact)[work.rank :].norm()
    return float(error / best) - 1


def _factors(folder: Path) -> list[torch.Tensor]:
    """A and B of one module of an adapter."""
    stem = "base_model.model.model.layers.0.self_attn.k_proj"
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return [file.get_tensor(f"{stem}.lora_{side}.weight") for side in "AB"]


KIND = Kind(
    {"merge-engine": Entry(_merge, ns=3, seconds=4)},
    _check,
    checking=0,
    baseline=(),
    forks=False,
    has_rates=False,
)
