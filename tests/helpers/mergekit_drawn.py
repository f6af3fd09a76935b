"""Drawn recipes through mergekit and merge_engine, side by side: python tests/helpers/mergekit_drawn.py [COUNT].

Small Llamas in float32. Results have to agree to 4e-7 of a tensor's norm, or, where mergekit's own float32 is further
off, with mergekit in float64. Random drops are made by our masks in both; of equal magnitudes mergekit's sorts take the
first. What mergekit refuses has to be refused.
"""

import contextlib
import copy
import io
import random
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from lora_files import save_factors
from mergekit_oracle import ADAPTED, CONFIG, LAYER, LAYERS, SHAPES
from safetensors.torch import load_file, save_file

from merge_engine.cpu.mask import random_words
from merge_engine.errors import MergeError
from merge_engine.mergekit.recipe import merge_recipe
from merge_engine.rules.philox import stream_id
from merge_engine.rules.whole_methods import WHOLE_METHODS

TOLERANCE = 4e-7
METHODS = tuple(WHOLE_METHODS)
MODELS = ("base", "ft1", "ft2", "ft3", "base+lo1", "ft1+lo2")


def save_continuous(folder, seed, like=None, **config):
    """A Llama of normal numbers, so that no two magnitudes are equal."""
    import json

    generator = torch.Generator().manual_seed(seed)
    drawn = {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
    tensors = {key: drawn[key] if like is None else like[key] + 0.3 * drawn[key] for key in SHAPES}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))


def save_continuous_adapter(folder, seed, base, rank=2):
    generator = torch.Generator().manual_seed(seed)
    factors = {
        f"model.layers.{i}.{name}": [
            0.5 * torch.randn(shape, generator=generator) for shape in ((rank, LAYER[name][1]), (LAYER[name][0], rank))
        ]
        for i in range(LAYERS)
        for name in ADAPTED
    }
    config = {"task_type": "CAUSAL_LM", "lora_alpha": rank, "lora_dropout": 0.0, "base_model_name_or_path": str(base)}
    save_factors(folder, factors, target_modules=[name.split(".")[1] for name in ADAPTED], **config)


def save_drawn_home(folder):
    """base; ft1, ft2, ft3 tuned from it; adapters lo1 on base and lo2 on ft1."""
    save_continuous(folder / "base", 0)
    like = load_file(folder / "base" / "model.safetensors")
    for i in (1, 2, 3):
        save_continuous(folder / f"ft{i}", i, like)
    save_continuous_adapter(folder / "lo1", 11, folder / "base")
    save_continuous_adapter(folder / "lo2", 12, folder / "ft1")
    return folder


def number(draw, low=-1.0, high=2.0):
    return round(draw.uniform(low, high), 3)


def setting(draw, make):
    """A value, a gradient, or a list of tables with filters."""
    kind = draw.random()
    if kind < 0.6:
        return make()
    if kind < 0.75:
        return [make() for _ in range(draw.randint(1, 4))]
    parts = [{"filter": name, "value": make()} for name in draw.sample(["self_attn", "mlp", "norm", "lm_head"], 2)]
    return [*parts, {"value": [make(), make()] if draw.random() < 0.5 else make()}]


def value_of(draw, method, name, option):
    """A setting of one parameter, mostly within what mergekit accepts."""
    if option.kind is bool:
        return draw.random() < 0.5
    if option.kind is int:
        return draw.randint(0, 20)
    ranges = {
        "density": (0.25, 1.0),
        "gamma": (0.0, 0.2),
        "t": (0.0, 1.0),
        "select_topk": (0.0, 1.0),
        "lambda": (0.5, 1.5),
        "scale": (0.5, 2.0),
        "weight": (0.1, 1.5),
        "tol": (1e-6, 1e-3),
        "eps": (1e-8, 1e-8),
        "r": (0.0, 0.3),
        "alpha": (0.0, 0.5),
    }
    if name == "density" and method.startswith("della"):
        return setting(draw, lambda: number(draw, 0.2, 0.85))
    if name == "epsilon":
        return setting(draw, lambda: number(draw, 0.02, 0.2))
    low, high = ranges[name]
    return setting(draw, lambda: 1e-8 if low == high else round(draw.uniform(low, high), 7))


def parameters_of(draw, method, of, chance):
    """Settings of some of a method's parameters."""
    found = {}
    for name, option in WHOLE_METHODS[method].options.items():
        if (option.of == "merge") == (of == "merge") and draw.random() < chance:
            found[name] = value_of(draw, method, name, option)
    return {"parameters": found} if found else {}


def models_of(draw, method):
    """(names of models, base or None): mostly as many as the method takes."""
    row = WHOLE_METHODS[method]
    names = draw.sample(MODELS, len(MODELS))
    base = draw.choice(["base", "base", "base", "ft1", "base+lo1"]) if row.base == "needed" else None
    if row.base == "optional" and draw.random() < 0.6:
        base = "base"
    others = [name for name in names if name != base]
    low, high = row.others if row.others != (0, None) else (row.least - (base is not None), row.most)
    high = (high - (base is not None) if row.others == (0, None) else high) if high is not None else 3
    count = draw.randint(max(1, low), max(1, low, high))
    if draw.random() < 0.06:
        count = draw.choice([1, 4])
    if method == "model_stock":
        count = max(2, count) if draw.random() > 0.1 else 1
    return others[:count], base


def draw_recipe(seed):
    """A recipe by its number."""
    draw = random.Random(seed)
    method = METHODS[seed % len(METHODS)]
    names, base = models_of(draw, method)
    recipe = {"merge_method": method, "dtype": "float32"}
    if base:
        recipe["base_model"] = base
    shared = parameters_of(draw, method, "merge", 0.5)
    required = {name for name, option in WHOLE_METHODS[method].options.items() if option.default is None}
    for name in required - {"scale"}:
        option = WHOLE_METHODS[method].options[name]
        if option.of == "merge" or draw.random() < 0.3:
            shared.setdefault("parameters", {})[name] = value_of(draw, method, name, option)
    if draw.random() < 0.15:
        shared.setdefault("parameters", {})["int8_mask"] = True
    own = {name: parameters_of(draw, method, "own", 0.6) for name in names}
    for name in names:
        if "weight" in required and draw.random() < 0.97:
            option = WHOLE_METHODS[method].options["weight"]
            own[name].setdefault("parameters", {})["weight"] = value_of(draw, method, "weight", option)
    form = draw.choice(["models", "models", "slices", "layers", "modules"])
    if method == "passthrough" and draw.random() < 0.7:
        form = "layers"
    if form == "models":
        recipe["models"] = [{"model": name, **own[name]} for name in names]
        if base and draw.random() < 0.4:
            recipe["models"].insert(draw.randint(0, len(names)), {"model": base})
    else:
        slices = slices_of(draw, method, names, base, own, whole=form == "slices")
        recipe |= {"modules": {"default": {"slices": slices}}} if form == "modules" else {"slices": slices}
    if shared:
        recipe |= shared
    if draw.random() < 0.1:
        recipe["out_dtype"] = "float32"
    return recipe


def slices_of(draw, method, names, base, own, *, whole):
    """One slice of all layers, or some of equal numbers of layers of each model."""
    slices = []
    for _ in range(1 if whole else draw.randint(1, 3)):
        count = LAYERS if whole else draw.randint(1, 3)
        members = names + ([base] if base and base not in names else [])
        if method == "passthrough":
            members = [draw.choice(MODELS)]
        sources = []
        for name in members:
            start = 0 if whole else draw.randint(0, LAYERS - count)
            if draw.random() < 0.01:
                start += 4
            sources.append({"model": name, "layer_range": [start, start + count], **own.get(name, {})})
        part = {"sources": draw.sample(sources, len(sources))}
        if draw.random() < 0.3:
            part |= parameters_of(draw, method, "merge", 0.4)
        slices.append(part)
    return slices


@contextlib.contextmanager
def our_randomness():
    """Inside, mergekit drops by our masks, and its sorts are stable."""
    from mergekit.merge_methods import generalized_task_arithmetic as arithmetic

    now = {}
    merge_group, sparsify = arithmetic.GeneralizedTaskArithmeticMerge.merge_group, arithmetic.sparsify
    argsort, bernoulli = torch.argsort, torch.bernoulli

    def of_group(self, group, /, **parameters):
        now.update(key=group.metadata.name, number=-1)
        return merge_group(self, group, **parameters)

    def of_model(delta, **options):
        now["number"] += 1
        return sparsify(delta, **options)

    def mask(chances):
        matrix = chances.reshape(-1, chances.shape[-1]).double().numpy()
        rows, columns = (slice(0, size) for size in matrix.shape)
        stream = stream_id(now["key"].removesuffix(".weight"), "delta")
        words = random_words(seed=0, stream=stream, adapter=now["number"], rows=rows, columns=columns)
        kept = words < np.rint(matrix * 2.0**32).astype(np.uint64)
        return torch.from_numpy(kept).to(chances.dtype).reshape(chances.shape)

    arithmetic.GeneralizedTaskArithmeticMerge.merge_group, arithmetic.sparsify = of_group, of_model
    torch.bernoulli = mask
    torch.argsort = lambda tensor, **asked: argsort(tensor, **asked, stable=True)
    try:
        yield
    finally:
        arithmetic.GeneralizedTaskArithmeticMerge.merge_group, arithmetic.sparsify = merge_group, sparsify
        torch.bernoulli, torch.argsort = bernoulli, argsort


def by_mergekit(recipe, out, cache):
    """The tensors that mergekit makes, or the error with which it refuses."""
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    LoaderCache().loaders.clear()  # it knows models by name, and folders of one name may be others now
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, lora_merge_cache=str(cache), quiet=True)
    try:
        with our_randomness(), contextlib.redirect_stderr(io.StringIO()):
            run_merge(MergeConfiguration.model_validate(copy.deepcopy(recipe)), str(out), options)
    except Exception as error:
        return error
    return load_file(out / "model.safetensors")


def by_us(recipe, out):
    """The tensors that we make, or the error with which we refuse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merge_recipe(recipe, out)
    except MergeError as error:
        return error
    return load_file(out / "model.safetensors")


def difference(ours, theirs):
    """The largest distance of a tensor, relative to its norm; infinite where keys or shapes differ."""
    if ours.keys() != theirs.keys() or any(ours[key].shape != theirs[key].shape for key in ours):
        return float("inf")
    return max(
        float((ours[key].double() - theirs[key].double()).norm() / theirs[key].double().norm().clamp(min=1e-30))
        for key in ours
    )


def compare(seed, folder):
    """(method, what came of it, whether that is right) of a drawn recipe; the current folder has the models."""
    recipe = draw_recipe(seed)
    with tempfile.TemporaryDirectory() as made:
        theirs = by_mergekit(recipe, Path(made) / "theirs", folder / "cache")
        ours = by_us(recipe, Path(made) / "ours")
    refused = isinstance(theirs, Exception), isinstance(ours, Exception)
    if any(refused):
        what = "both refuse" if all(refused) else "mergekit refuses" if refused[0] else "merge_engine refuses"
        detail = f"{what}: {theirs if refused[0] else ''} | {ours if refused[1] else ''}"
        return recipe["merge_method"], detail, all(refused)
    far = difference(ours, theirs)
    if far > TOLERANCE:
        with tempfile.TemporaryDirectory() as made:
            exact = by_mergekit(recipe | {"dtype": "float64"}, Path(made) / "theirs", folder / "cache")
        far = difference(ours, exact)
    return recipe["merge_method"], f"{far:.1e}", far <= TOLERANCE


def main(count):
    """Compare many; prints what is wrong and a line for each method."""
    import logging
    import os

    logging.disable(logging.CRITICAL)
    folder, wrong, table = Path(tempfile.mkdtemp()), [], {}
    save_drawn_home(folder)
    os.chdir(folder)
    for seed in range(count):
        method, what, right = compare(seed, folder)
        table.setdefault(method, []).append(what)
        if not right:
            wrong.append(seed)
            print(f"{seed}: {method}: {what}\n  {draw_recipe(seed)}", flush=True)
    for method, whats in sorted(table.items()):
        merged = [what for what in whats if "refuse" not in what]
        far = max(map(float, merged), default=0.0)
        print(f"{method:18} {len(merged):4} merged, largest difference {far:.1e}, {len(whats) - len(merged)} refused")
    print(f"{count - len(wrong)} of {count} right")
    shutil.rmtree(folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 200))
