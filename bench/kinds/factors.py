"""Kind factors: merges of factors in a PEFT model of TinyLlama's shape, by PEFT's add_weighted_adapter and the drop-in.

Three adapters of rank 16, float32. What is timed is the call that adds the merged adapter. Kinds `layer` and
`recompress` do the same with types that cut a merged delta to a rank, on one or two layers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness.agreement import Disagreement
from bench.harness.inputs import SCALING
from bench.harness.kind import Entry, Kind, Results
from bench.harness.measure import Contestant
from bench.harness.peft_models import NAMES, factors_of, lora_layers, tiny_llama
from bench.harness.workloads import Workload
from merge_engine.cpu.merge import merge_deltas
from merge_engine.cpu.select import trims
from merge_engine.cpu.source import Product
from merge_engine.peft_backend import add_weighted_adapter
from merge_engine.rules.rule import make_rule

ModelOf = Callable[[Workload, str], Any]  # (workload, device) -> a PEFT model with adapters NAMES

WEIGHTS, DENSITY = [2.0, 1.0, 1.0], 0.2
LARGEST_EXCESS = 1e-3  # of the error over that of the best cut


def combine(adds: str, model_of: ModelOf, work: Workload, device: str) -> Contestant:
    """adds: "PEFT" or "drop-in", which is also the name of the adapter that is added."""
    model = model_of(work, device)
    drawn = {"rng": "torch", "seed": 1} if adds == "drop-in" and "dare" in work.method else {}

    def add(**options: Any) -> list[Tensor]:
        ADD[adds](model, combination_type=work.method, **options)
        return factors_of(model, adds)

    def forget() -> None:
        if adds in model.peft_config:
            model.delete_adapter(adds)

    return Contestant(add, ready=forget, checked=partial(add, **drawn) if drawn else None)


def _stock(model: Any, **call: Any) -> None:
    torch.manual_seed(1)
    model.base_model.add_weighted_adapter(list(NAMES), WEIGHTS, "PEFT", density=DENSITY, **call)


def _drop_in(model: Any, **call: Any) -> None:
    add_weighted_adapter(model, list(NAMES), WEIGHTS, "drop-in", density=DENSITY, **call)


ADD: dict[str, Callable[..., None]] = {"PEFT": _stock, "drop-in": _drop_in}


def check(model_of: ModelOf, work: Workload, results: Results, device: str) -> Mapping[str, float]:
    """Factors are equal to the bit, but for a few ties; cuts to a rank are as good as PEFT's.

    Returns, for types that cut and draw nothing at random, how much larger each error |D - B A| over all layers is than
    PEFT's, whose dense SVD is the best cut of the merged delta D.
    """
    if not work.method.endswith("svd"):
        _check_factors(work.method, results)
        return {}
    products = {
        name: [B.double() @ A.double() for A, B in zip(t[::2], t[1::2], strict=True)] for name, t in results.items()
    }
    _check_cuts(work.method, products)
    if work.method.startswith("dare"):
        return {}
    deltas = _merged_deltas(model_of(work, device), work.method)
    errors = {
        name: math.fsum(float((delta - cut).square().sum()) for delta, cut in zip(deltas, of, strict=True)) ** 0.5
        for name, of in products.items()
    }
    excess = {name: error / errors["PEFT"] - 1 for name, error in errors.items()}
    if not excess["drop-in"] <= LARGEST_EXCESS:
        raise Disagreement(f"{work.name}: the error is larger than that of the best cut, by {excess['drop-in']:.1e}")
    return excess


def _check_factors(method: str, results: Results) -> None:
    for ours, theirs in zip(results["drop-in"], results["PEFT"], strict=True):
        if int((ours != theirs).sum()) > 8:
            raise Disagreement(f"{method}: a factor {list(ours.shape)} differs in more than a few ties")


def _check_cuts(method: str, products: Mapping[str, Sequence[Tensor]]) -> None:
    """Two cuts of one matrix to one rank, both near the best, differ by little and keep the same share of it."""
    for ours, theirs in zip(products["drop-in"], products["PEFT"], strict=True):
        if not ((ours - theirs).norm() <= 0.02 * theirs.norm() and ours.norm() >= theirs.norm() * (1 - 1e-4)):
            raise Disagreement(f"{method}: a product {list(ours.shape)} differs, or keeps less")


def _merged_deltas(model: Any, combination: str) -> list[Tensor]:
    """The merged delta [M, N] of every layer, which a type that draws nothing at random cuts to a rank."""
    method = {"svd": "linear"}.get(combination, combination.removesuffix("_svd"))
    rule, merged = make_rule(method), []
    for layer in lora_layers(model):
        pairs = [(layer.lora_A[name].weight.data.cpu(), layer.lora_B[name].weight.data.cpu()) for name in NAMES]
        sources = [Product(A, B, SCALING) for A, B in pairs]
        kept = rule.kept(DENSITY, sources[0].rows * sources[0].columns)
        trimmed = rule.keep == "magnitude"
        keeps = [trims([source], kept, rule.trim_ties)[0] if trimmed else None for source in sources]
        merged.append(merge_deltas(sources, WEIGHTS, keeps, rule).to(layer.lora_A[NAMES[0]].weight.device))
    return merged


def _model_of(work: Workload, device: str) -> Any:
    return tiny_llama(work.layers, device)


KIND = Kind(
    {
        "drop-in": Entry(partial(combine, "drop-in", _model_of), seconds=0.4),
        "PEFT": Entry(partial(combine, "PEFT", _model_of), seconds=1.0),
    },
    partial(check, _model_of),
    checking=5,
    has_rates=False,
)
