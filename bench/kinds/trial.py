"""Kind trial: one more merge of a search, with other weights: in a `Session`, and as mergekit-evolve makes it.

For each trial mergekit-evolve makes a merged model of full size: it runs mergekit's merge on a recipe with other
weights, by default to the disk, from adapters that were materialised once as full models. Merges follow each other in
one process; the first one does not count, and the median of the others does. mergekit is optional, as in kind base; its
merge runs in the Python beside its command.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from bench.harness.agreement import Disagreement
from bench.harness.disk import make_adapter, make_base, scratch_folder
from bench.harness.inputs import MODELS, SCALING
from bench.harness.kind import Entry, Kind, Results
from bench.harness.measure import MIB, Contestant, Sample
from bench.harness.workloads import Workload
from bench.kinds.base import MODULE, mergekit_program

WEIGHTS = [[round(0.4 + 0.2 * ((3 * i + j) % 5), 1) for i in range(8)] for j in range(4)]  # of up to eight adapters
OURS = """
import json, logging, resource, sys, time, merge_engine
logging.getLogger("merge_engine").setLevel(logging.ERROR)
adapters, method, weights, output = json.loads(sys.argv[1])
seconds = []
with merge_engine.Session(adapters, backend="torch") as session:
    for each in weights:
        started = time.perf_counter()
        session.merge(output, overwrite=True, method=method, scale="auto", weights=each)
        seconds.append(time.perf_counter() - started)
    if output is None:
        session.merge(sys.argv[2], overwrite=True, method=method, weights=weights[-1])
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""
MERGEKIT = """
import json, resource, sys, time, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
base, adapters, weights, output, cache = json.loads(sys.argv[1])
options = MergeOptions(lora_merge_cache=cache, copy_tokenizer=False, write_model_card=False)
seconds = []
for each in weights:
    models = [{"model": base + "+" + a, "parameters": {"weight": w}} for a, w in zip(adapters, each)]
    recipe = {"merge_method": "task_arithmetic", "base_model": base, "models": models, "dtype": "bfloat16"}
    started = time.perf_counter()
    run_merge(MergeConfiguration.model_validate(recipe), output, options)
    seconds.append(time.perf_counter() - started)
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


@lru_cache
def _inputs(work: Workload) -> tuple[Path, list[Path], list[list[float]]]:
    """(where the base model is if anyone needs it, adapters of it, the weights of each trial)."""
    folder, shapes = scratch_folder() / f"trial-{work.model}-{work.layers}-{work.adapters}", MODELS[work.model]
    base, adapters = folder / "base", [folder / str(number) for number in range(work.adapters)]
    for seed, adapter in enumerate(adapters, 1):
        if not adapter.exists():
            make_adapter(adapter, seed, work.layers, shapes, base)
    return base, adapters, [weights[: work.adapters] for weights in WEIGHTS]


def _timed(python: str, script: str, *arguments: Any) -> Sample:
    """The median of all merges but the first, in a new process; arguments: as JSON, or paths."""
    words = [str(each) if isinstance(each, Path) else json.dumps(each, default=str) for each in arguments]
    done = subprocess.run([python, "-c", script, *words], stdout=subprocess.PIPE, text=True, check=True)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return Sample(statistics.median(seconds[1:]), None, peak * 1024 / MIB)


def _ours(on_disk: bool, work: Workload, device: str) -> Contestant:
    base, adapters, weights = _inputs(work)
    output = base.with_name("to_disk" if on_disk else "in_memory")

    def run() -> Sample:
        given = [adapters, work.method, weights, output if on_disk else None]
        return _timed(sys.executable, OURS, given, output)._replace(result=output)

    return Contestant(run, own_clock=True)


def _in_memory(work: Workload, device: str) -> Contestant:
    return _ours(False, work, device)


def _to_disk(work: Workload, device: str) -> Contestant:
    return _ours(True, work, device)


def _mergekit(work: Workload, device: str) -> Contestant:
    base, adapters, weights = _inputs(work)
    output, cache = base.with_name("mergekit"), base.with_name("cache")
    if not base.exists():
        make_base(base, work.layers, MODELS[work.model])

    def run() -> Sample:
        given = [base, adapters, weights[:2], output, cache]  # a trial takes long
        python = str(Path(mergekit_program()[-1]).with_name("python"))
        return _timed(python, MERGEKIT, given)._replace(result=output)

    return Contestant(run, own_clock=True)


def _check(work: Workload, results: Results, device: str) -> Mapping[str, float] | None:
    """One module of a sum in memory is sum w s B A, and of mergekit's base + that, up to the rounding of its models."""
    if work.method != "linear":
        return None
    base, adapters, weights = _inputs(work)
    stem = f"base_model.model.{MODULE}"
    pairs = [_read(adapter, f"{stem}.lora_A.weight", f"{stem}.lora_B.weight") for adapter in adapters]
    for name, folder in results.items():
        of_trial = weights[1] if name == "mergekit-evolve" else weights[-1]
        products = [w * SCALING * (B.double() @ A.double()) for w, (A, B) in zip(of_trial, pairs, strict=True)]
        exact = torch.stack(products).sum(0)
        if name == "mergekit-evolve":
            (under,), (got,) = (_read(each, f"{MODULE}.weight") for each in (base, folder))
            off, most = (got.double() - under.double() - exact).norm(), 2.0**-8 * len(adapters) * under.double().norm()
        else:
            A, B = _read(folder, f"{stem}.lora_A.weight", f"{stem}.lora_B.weight")
            got = B.double() @ A.double()
            if name == "Session, to disk":  # by scale="auto"
                got *= exact.norm() / got.norm()
            off, most = (got - exact).norm(), 1e-6 * exact.norm()
        if not off <= most:
            raise Disagreement(f"{work.name}: {name} is {float(off):.2e} off, wanted up to {float(most):.2e}")
    return None


def _read(folder: Path, *names: str) -> list[torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        return [opened.get_tensor(name) for name in names]


KIND = Kind(
    {
        "Session": Entry(_in_memory, seconds=5, devices=("cpu",)),
        "Session, to disk": Entry(_to_disk, seconds=7, devices=("cpu",)),
        "mergekit-evolve": Entry(_mergekit, seconds=30, ns=10, on_request=True, devices=("cpu",), methods=("linear",)),
    },
    _check,
    checking=0,
    baseline=("mergekit-evolve",),
    forks=False,
    has_rates=False,
    least=1,  # of 4 merges
)
