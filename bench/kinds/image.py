"""Kind image: LoRAs of a Flux-shaped model cut to their rank, from file to file.

The three files are bfloat16, with the names of kohya's scripts. Each merge has a process of its own. What kohya's
svd_merge would take is extrapolated from kind `svd_merge`: see `reporting.extrapolated`.
"""

from collections.abc import Mapping

import torch
from safetensors import safe_open

from bench.harness.agreement import Disagreement
from bench.harness.disk import image_loras_on_disk, image_modules, scratch_folder
from bench.harness.inputs import MODELS
from bench.harness.kind import Entry, Kind, Results
from bench.harness.measure import Contestant
from bench.harness.workloads import Workload
from bench.kinds.whole import LARGEST_EXCESS, in_a_process
from merge_engine.rules import reference
from merge_engine.rules.rule import make_rule


def _merge(work: Workload, device: str) -> Contestant:
    files = image_loras_on_disk(work.adapters, work.layers, work.model, work.rank)
    output = scratch_folder() / "merged.safetensors"
    recipe = {"method": work.method, "density": work.density, "rank": work.rank, "overwrite": True}
    return Contestant(lambda: in_a_process(files, output, recipe), own_clock=True)


def _check(work: Workload, results: Results, device: str) -> Mapping[str, float]:
    """The smallest module of the output is as good a cut as the best."""
    files = image_loras_on_disk(work.adapters, work.layers, work.model, work.rank)
    modules = image_modules(work.layers, MODELS[work.model])
    name = min(modules, key=lambda module: modules[module][0] * modules[module][1])
    deltas = {number: reference.delta(*_factors(file, name)) for number, file in enumerate(files)}
    ones, densities = [1.0] * len(deltas), {"": [work.density] * len(deltas)}
    exact = reference.merge_model({"": deltas}, ones, densities, make_rule(work.method))[""].double()
    best = torch.linalg.svdvals(exact)[work.rank :].norm()
    excess = {}
    for contestant, file in results.items():
        A, B, scaling = _factors(file, name)
        excess[contestant] = float((exact - scaling * (B.double() @ A.double())).norm() / best) - 1
    if not max(excess.values()) <= LARGEST_EXCESS:
        raise Disagreement(
            f"{work.name}: the error of {name} exceeds that of the best cut by {max(excess.values()):.1e}"
        )
    return excess


def _factors(file: object, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A, B and alpha / r of one module."""
    with safe_open(file, "pt") as opened:
        A, B, alpha = (opened.get_tensor(f"{name}{end}") for end in (".lora_down.weight", ".lora_up.weight", ".alpha"))
    return A, B, float(alpha) / len(A)


KIND = Kind(
    {"merge-engine": Entry(_merge, ns=3.5, seconds=6, share={"linear": 0.1})},
    _check,
    checking=1,
    baseline=(),
    forks=False,
    has_rates=False,
    least=1,
)
