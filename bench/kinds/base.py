"""Kind base: adapters into a base model, from disk to disk: `merge-engine merge --into` against mergekit-yaml.

The base is a Llama in bfloat16, with three rank-16 adapters of every linear layer. Every run is a whole process, timed
from its start to its end. mergekit (LGPL; called, never copied) is optional: the environment variable MERGEKIT_YAML
holds the command that starts it, or `mergekit-yaml` is on the path. Its cache of materialised adapters is removed
before each run.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

import merge_engine
from bench.harness.agreement import Disagreement
from bench.harness.disk import base_and_adapters
from bench.harness.inputs import SCALING
from bench.harness.kind import Entry, Kind, Results
from bench.harness.measure import Contestant, Sample
from bench.harness.processes import whole_process
from bench.harness.workloads import Workload
from merge_engine.cpu.mask import keep_mask
from merge_engine.rules import reference
from merge_engine.rules.philox import stream_id
from merge_engine.rules.rule import make_rule

OPTIONS: dict[str, dict[str, Any]] = {"ties": {"density": 0.2}, "dare_ties": {"density": 0.2}}  # by method
PROGRAM = "MERGEKIT_YAML"  # the environment variable with the command that starts mergekit-yaml
MODULE = "model.layers.0.self_attn.q_proj"  # the one that is checked


def _into_base(run: Callable[[Path, list[Path], str], Sample], work: Workload, device: str) -> Contestant:
    base, adapters = base_and_adapters(work.layers, work.model)
    return Contestant(lambda: run(base, adapters, work.method), own_clock=True)


def output_of(base: Path, name: str) -> Path:
    """The folder for an output, beside the base."""
    return base.with_name(f"{name} output")


def _run_ours(base: Path, adapters: list[Path], method: str) -> Sample:
    output = output_of(base, "ours")
    shutil.rmtree(output, ignore_errors=True)
    return whole_process(our_command(base, adapters, output, method))._replace(result=output)


def our_command(base: Path, adapters: list[Path], output: Path, method: str) -> list[str]:
    """The command that merges them here."""
    options = [text for key, value in OPTIONS[method].items() for text in (f"--{key}", str(value))]
    arguments = ["merge", "--into", str(base), *map(str, adapters), "-o", str(output), "--method", method]
    return [sys.executable, "-m", "merge_engine", *arguments, *options]


def mergekit_program() -> list[str]:
    """The command that starts mergekit-yaml. Raises RuntimeError where there is none."""
    program = shlex.split(os.environ.get(PROGRAM) or shutil.which("mergekit-yaml") or "")
    if not program:
        raise RuntimeError(f"mergekit: wanted its command in {PROGRAM} or mergekit-yaml on the path, got neither")
    return program


def _run_mergekit(base: Path, adapters: list[Path], method: str) -> Sample:
    output, cache = output_of(base, "mergekit"), base.with_name("cache")
    for leftover in (output, cache):
        shutil.rmtree(leftover, ignore_errors=True)
    recipe = _mergekit_recipe(base, adapters, method)
    options = ["--lora-merge-cache", str(cache), "--no-copy-tokenizer", "--no-write-model-card"]
    return whole_process([*mergekit_program(), str(recipe), str(output), *options])._replace(result=output)


def _mergekit_recipe(base: Path, adapters: list[Path], method: str) -> Path:
    """mergekit's YAML file for the same merge."""
    parameters = {"weight": 1.0, **OPTIONS[method]}
    recipe = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": f"{base}+{adapter}", "parameters": parameters} for adapter in adapters],
        "parameters": {"normalize": True},
        "dtype": "bfloat16",
    }
    file = base.with_name(f"{method}.yaml")
    file.write_text(yaml.safe_dump(recipe))
    return file


def _check(work: Workload, results: Results, device: str) -> Mapping[str, float] | None:
    base, adapters = base_and_adapters(work.layers, work.model)
    check_module(base, adapters, work.method, results["merge-engine"])
    # dare_ties drops at random, and mergekit draws other masks: the results cannot be compared.
    return _excess(base, adapters, results) if work.method == "ties" and len(results) > 1 else None


def check_module(base: Path, adapters: list[Path], method: str, output: Path) -> None:
    """Raise Disagreement unless one module of the output is base + merged delta by `reference`, rounded to bfloat16.

    Sums of float32 products run in another order, so an element near the threshold, or with a vote near 0, may differ:
    at most one in ten thousand. All others are within one rounding to bfloat16.
    """
    sides = [f"base_model.model.{MODULE}.lora_{side}.weight" for side in "AB"]
    rule, density = make_rule(method), OPTIONS[method]["density"]
    deltas = {number: reference.delta(*_tensors(folder, *sides), SCALING) for number, folder in enumerate(adapters)}
    rows, columns = map(range, deltas[0].shape)
    place = {"seed": 0, "stream": stream_id(MODULE, "delta"), "rows": rows, "columns": columns}
    masks = {"": {number: keep_mask(density, adapter=number, **place) for number in deltas}}
    ones, densities = [1.0] * len(adapters), {"": [density] * len(adapters)}
    merged = reference.merge_model({"": deltas}, ones, densities, rule, masks=masks)[""]
    ((under,), (got,)) = (_tensors(folder, f"{MODULE}.weight") for folder in (base, output))
    wanted = under.double() + merged.double()
    off = int(((got.double() - wanted).abs() > 2.0**-8 * wanted.abs() + 1e-12).sum())
    if off > 1e-4 * wanted.numel():
        raise Disagreement(f"{method} into a base: {off} of {wanted.numel()} elements of {MODULE} are off")


def _tensors(folder: Path, *names: str) -> list[torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        return [opened.get_tensor(name) for name in names]


def _excess(base: Path, adapters: list[Path], results: Mapping[str, Path]) -> dict[str, float]:
    """Error / that of the exact sum rounded once - 1, for results of `ties` with weights of 1: 0 is rounded once.

    The exact sum is a merge with float32 output by mergekit's convention, which equals ours for these weights. Errors
    are norms over all merged tensors.
    """
    truth = output_of(base, "float32")
    options: dict[str, Any] = {"convention": "mergekit", "dtype": "float32", **OPTIONS["ties"]}
    merge_engine.merge_into(base, adapters, truth, method="ties", overwrite=True, progress=False, **options)
    exact = {key: tensor for key, tensor in load_file(truth / "model.safetensors").items() if "_proj" in key}

    def squares(folder: Path) -> float:
        got = {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
        return sum(float((got[key].double() - tensor.double()).square().sum()) for key, tensor in exact.items())

    best = sum(float((tensor.bfloat16().double() - tensor.double()).square().sum()) for tensor in exact.values())
    return {name: (squares(folder) / best) ** 0.5 - 1 for name, folder in results.items()}


KIND = Kind(
    {
        "merge-engine": Entry(partial(_into_base, _run_ours), seconds=4),
        "mergekit-yaml": Entry(partial(_into_base, _run_mergekit), seconds=60, on_request=True),
    },
    _check,
    checking=0,
    baseline=("mergekit-yaml",),
    forks=False,
    has_rates=False,
)
