"""Whole merges on dense deltas in float64, and adapters of all kinds to try them on.

Files are read by hand here. Of the package only `rules.reference` is used, for rules that look at single elements, and
the masks of random drops.
"""

import json
import math
import re

import spectral_textbook as textbook
import torch
from lora_files import STEM, save_factors
from safetensors.torch import load_file

from merge_engine.cpu.mask import keep_mask
from merge_engine.rules import reference
from merge_engine.rules.philox import stream_id
from merge_engine.rules.rule import make_rule

U32 = 2.0**-24
WEIGHTS = [0.9, -0.4, 1.3]
RULE = ("election", "convention", "scope", "trim_ties", "gamma", "mask", "min_tasks")  # what `make_rule` takes
SHAPES = {
    "layers.0.q": (24, 40),
    "layers.0.up": (37, 20),
    "layers.1.q": (24, 40),
    "layers.1.small": (5, 7),  # of fewer rows than ranks
    "layers.1.own": (16, 12),  # of one adapter
    "layers.1.zero": (9, 8),
    "conv": (10, 3, 2, 2),
    "embed_tokens": (12, 30),
}


def save_zoo(root, dtype=torch.float32):
    """Three adapters of different ranks, scalings and modules; among these a convolution, an embedding, and zeros."""
    everywhere = [name for name in SHAPES if name != "layers.1.own"]
    ranks, alphas = {"up": 5}, {"q": 1.5, "conv": 7}
    return [
        save_one(root / "sql", 1, list(SHAPES), 4, dtype),
        save_one(root / "chat", 2, everywhere, 3, dtype, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=True),
        save_one(root / "ads", 3, ["layers.0.q", "layers.1.q", "conv", "layers.1.small"], 2, dtype),
    ]


def save_one(folder, seed, modules, rank, dtype=torch.float32, **config):
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name in modules:
        rows, *columns = SHAPES[name]
        r = config.get("rank_pattern", {}).get(name.split(".")[-1], rank)
        A = torch.randn(r, *columns, generator=generator)
        B = torch.randn(rows, r, *(1 for _ in columns[1:]), generator=generator) * (not name.endswith("zero"))
        factors[name] = A.to(dtype), B.to(dtype)
    return save_factors(folder, factors, r=rank, lora_alpha=2 * rank, **config)


def factors_of(folder):
    """{module: (A [r, N], B [M, r], scaling)} in float64, as PEFT reads a folder."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key in [key for key in tensors if "_A" in key]:
        name = key.removeprefix(STEM).removesuffix(".weight").rsplit(".", 1)[0]
        A, B = (tensors[each].double().flatten(1) for each in (key, key.replace("_A", "_B")))
        patterns = config.get("alpha_pattern", {}).items()
        own = [value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", name)]
        alpha = [*own, config["lora_alpha"]][0]
        found[name] = A, B, alpha / (math.sqrt(len(A)) if config.get("use_rslora") else len(A))
    return dict(sorted(found.items()))


def tasks_of(folders):
    """{module: {adapter: s B A}} in float64."""
    tasks = {}
    for number, folder in enumerate(folders):
        for name, (A, B, scaling) in factors_of(folder).items():
            tasks.setdefault(name, {})[number] = scaling * (B @ A)
    return dict(sorted(tasks.items()))


def sizes_of(folders, weights):
    """{module: sum |w s| |B| |A|}: rounding of factors is a share of it."""
    sizes = {}
    for folder, weight in zip(folders, weights, strict=True):
        for name, (A, B, scaling) in factors_of(folder).items():
            sizes[name] = sizes.get(name, 0.0) + abs(weight * scaling) * float(A.norm() * B.norm())
    return sizes


def masks_of(tasks, density, seed):
    return {
        name: {
            number: keep_mask(
                density,
                seed=seed,
                stream=stream_id(name, "delta"),
                adapter=number,
                rows=range(len(task)),
                columns=range(task.shape[1]),
            )
            for number, task in own.items()
        }
        for name, own in tasks.items()
    }


def dense_merge(tasks, recipe, gain=1.0):
    """{module: what the recipe makes of {adapter: delta}}, before any cut to a rank."""
    own, weights = dict(recipe), recipe.get("weights", WEIGHTS)
    norms = {name: [float(task.norm()) for task in each.values()] for name, each in tasks.items()}
    if own.get("balance") == "pico":
        tasks = {name: dict(zip(each, textbook.pico(list(each.values())), strict=True)) for name, each in tasks.items()}
    method = own.get("method", "ties")
    if method in textbook.METHODS:
        options = {"ridge": own["ridge"]} if "ridge" in own else {}
        found = {
            name: textbook.METHODS[method](list(each.values()), [weights[number] for number in each], **options)
            for name, each in tasks.items()
        }
    else:
        found = _by_rule(tasks, own, weights)
    scale = own.get("scale", 1.0)
    if scale != "auto":
        return {name: scale * merged for name, merged in found.items()}
    return {name: auto(norms[name], merged, gain) * merged for name, merged in found.items()}


def auto(norms, merged, gain=1.0):
    """gain * mean |tau| / |merged|."""
    return gain * sum(norms) / len(norms) / float(merged.norm()) if merged.any() else 1.0


def _by_rule(tasks, recipe, weights):
    space = recipe.get("space", "delta")
    bases = {name: textbook.bases(list(each.values())) for name, each in tasks.items()}
    sums = {name: sum(each.values()) for name, each in tasks.items()}
    left = {name: _turned(U, sums[name].sum(1)) for name, ((U, _), _) in bases.items()}
    right = {name: _turned(V, sums[name].sum(0)) for name, (_, (V, _)) in bases.items()}
    if space != "delta":
        tasks = {name: {t: left[name].T @ task for t, task in each.items()} for name, each in tasks.items()}
    if space == "core":
        tasks = {name: {t: task @ right[name] for t, task in each.items()} for name, each in tasks.items()}
    density = recipe.get("density", 0.2)
    rule = make_rule(recipe["method"], **{key: recipe[key] for key in RULE if key in recipe})
    densities = {name: [density] * len(weights) for name in tasks}
    masks = masks_of(tasks, density, recipe.get("seed", 0)) if rule.keep == "bernoulli" else None
    merged = reference.merge_model(tasks, weights, densities, rule, masks=masks)
    if space == "knots":
        return {name: left[name] @ small for name, small in merged.items()}
    if space == "core":
        return {name: left[name] @ small @ right[name].T for name, small in merged.items()}
    return merged


def _turned(basis, total):
    """Vectors that all have a positive product with a total: a tied vote elects +, which is to mean something."""
    return basis * torch.where(basis.T @ total < 0, -1.0, 1.0)


def product(result):
    """B A in float64."""
    return result.B.double() @ result.A.double()
