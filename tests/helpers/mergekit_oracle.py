"""mergekit's arithmetic in float64, on whole tensors of small Llamas; and recipes for it."""

import json
import re

import numpy as np
import torch
from lora_files import save_factors
from safetensors.torch import load_file, save_file

from merge_engine.cpu.mask import keep_mask
from merge_engine.rules.philox import stream_id

LAYERS = 5  # depths of quarters: with weights of quarters, every sum that is voted on is exact
LAYER = {
    "input_layernorm": (8,),
    "self_attn.q_proj": (8, 8),
    "self_attn.k_proj": (4, 8),
    "self_attn.v_proj": (4, 8),
    "self_attn.o_proj": (8, 8),
    "post_attention_layernorm": (8,),
    "mlp.up_proj": (12, 8),
    "mlp.gate_proj": (12, 8),
    "mlp.down_proj": (8, 12),
}
SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    **{f"model.layers.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in LAYER.items()},
    "model.norm.weight": (8,),
    "lm_head.weight": (16, 8),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 16,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
ADAPTED = ("self_attn.q_proj", "mlp.down_proj")


def save_model(folder, seed, like=None, dtype=torch.float32, **config):
    """A Llama of whole eighths, so that differences are exact."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {key: torch.randint(-40, 41, shape, generator=generator) / 8 for key, shape in SHAPES.items()}
    tensors = {key: ((like[key] if like else 0) + tensor).to(dtype) for key, tensor in drawn.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))


def save_adapter(folder, seed, base, rank=2):
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for i in range(LAYERS):
        for name in ADAPTED:
            rows, columns = LAYER[name]
            factors[f"model.layers.{i}.{name}"] = [
                torch.randint(-6, 7, shape, generator=generator) / 4 for shape in ((rank, columns), (rows, rank))
            ]
    config = {"task_type": "CAUSAL_LM", "lora_alpha": rank, "lora_dropout": 0.0, "base_model_name_or_path": str(base)}
    save_factors(folder, factors, target_modules=[name.split(".")[1] for name in ADAPTED], **config)


def save_home(folder):
    """base; ft1, ft2, ft3 tuned from it; adapters lo1, lo2 on it."""
    save_model(folder / "base", 0)
    like = load_file(folder / "base" / "model.safetensors")
    for i in (1, 2, 3):
        save_model(folder / f"ft{i}", i, like)
    for i in (1, 2):
        save_adapter(folder / f"lo{i}", 10 + i, folder / "base")
    return folder


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def full(name):
    """A model of the recipe, multiplied out in float64."""
    path, _, lora = name.partition("+")
    tensors = {key: tensor.double() for key, tensor in load_file(f"{path}/model.safetensors").items()}
    if lora:
        factors = load_file(f"{lora}/adapter_model.safetensors")
        for key, B in factors.items():
            if ".lora_B." in key:
                A = factors[key.replace("lora_B", "lora_A")]
                module = key.removeprefix("base_model.model.").replace(".lora_B", "")
                tensors[module] = tensors[module] + B.double() @ A.double()
    return tensors


def ask(setting, key):
    """What a setting says of a tensor: None if nothing."""
    if isinstance(setting, dict):
        setting = [setting]
    if isinstance(setting, list) and setting and isinstance(setting[0], dict):
        fits = [each for each in setting if each.get("filter", "*") == "*" or each["filter"] in key]
        return ask(fits[0]["value"], key) if fits else None
    values = setting if isinstance(setting, list) else [setting]
    layer = re.search(r"layers\.(\d+)\.", key)
    depth = int(layer[1]) / (LAYERS - 1) if layer else 0.0
    if not values:
        return None
    if any(isinstance(value, bool) for value in values):
        return values[int(np.floor(depth * (len(values) - 1)))]
    return float(np.interp(depth, np.linspace(0, 1, len(values)), [float(value) for value in values]))


def look_up(name, key, *tables, default=None):
    found = [ask(table[name], key) for table in tables if name in table]
    return next((value for value in found if value is not None), default)


def oracle(recipe):
    """{key: merged, and a bound on the float32 error}: mergekit's arithmetic in float64, on whole tensors."""
    method, shared = recipe["merge_method"], recipe.get("parameters", {})
    models = [(each["model"], each.get("parameters", {})) for each in recipe["models"]]
    base = recipe.get("base_model")
    if base and base not in [name for name, _ in models]:
        models.append((base, {}))
    loaded, results = {name: full(name) for name, _ in models}, {}
    for key in SHAPES:
        normalize = look_up("normalize", key, shared, default=method in ("linear", "ties"))
        rescale = look_up("rescale", key, shared, default="dare" in method)
        scale = look_up("lambda", key, shared, default=1.0)
        start = loaded[base][key] if method != "linear" else torch.zeros(SHAPES[key], dtype=torch.float64)
        inputs = [(name, own) for name, own in models if method == "linear" or name != base]
        terms, weights = [], []
        for i, (name, own) in enumerate(inputs):
            weights.append(look_up("weight", key, own, shared))
            density = look_up("density", key, own, shared, default=1.0)
            terms.append(keep(loaded[name][key] - start, method, density, key, i, rescale) * weights[-1])
        elected = torch.ones_like(start) if "ties" not in method else sum(terms).sign()
        elected[elected == 0] = 1
        agree = [(term.sign() == elected) if "ties" in method else torch.ones_like(start) for term in terms]
        merged = sum(term * mask for term, mask in zip(terms, agree, strict=True))
        size = sum(term.abs() for term in terms)
        divisor = sum(weight * mask for weight, mask in zip(weights, agree, strict=True))
        divisor = torch.where(divisor.abs() < 1e-8, 1.0, divisor) if normalize else torch.ones_like(start)
        share = scale / divisor
        # weights, shares, scale, products, sums, norms of a rescale and the store: a rounding each, of at most all this
        results[key] = start + share * merged, 2**-24 * 16 * (start.abs() + share.abs() * size)
    return results


def keep(delta, method, density, key, number, rescale):
    flat = delta.reshape(len(delta) if delta.ndim > 1 else 1, -1)
    mask = torch.zeros_like(flat)
    if density >= 1 or method in ("linear", "task_arithmetic"):
        return delta
    if method == "ties" and density > 0:
        order = flat.abs().flatten().argsort(descending=True, stable=True)
        mask.view(-1)[order[: max(1, int(density * delta.numel()))]] = 1
    if "dare" in method and density > 0:
        name = key.removesuffix(".weight")
        place = {"rows": range(flat.shape[0]), "columns": range(flat.shape[1])}
        mask = keep_mask(density, seed=0, stream=stream_id(name, "delta"), adapter=number, **place).double()
    kept = flat * mask
    if rescale and kept.abs().sum() > 0:
        kept = kept * (flat.abs().sum() / kept.abs().sum())
    return kept.reshape(delta.shape)


def model(name, **parameters):
    return {"model": name, **({"parameters": parameters} if parameters else {})}


def recipe(method, *models, base="base", dtype="float32", parameters=None, **keys):
    written = {"merge_method": method, "models": list(models), "dtype": dtype, **keys}
    written |= {"base_model": base} if base else {}
    return written | ({"parameters": parameters} if parameters else {})


FT = ("ft1", "ft2", "ft3")
RECIPES = {
    "linear": recipe("linear", *(model(name, weight=w) for name, w in zip(FT, (0.5, 1, 2.5), strict=True)), base=None),
    "linear, the base counts": recipe("linear", model("ft1"), model("ft2", weight=0.75), parameters={"weight": 0.5}),
    "linear, not normalized": recipe(
        "linear",
        model("base+lo1", weight=[0.25, 0.75]),
        model("base+lo2", weight=[0.75, 0.25]),
        base=None,
        parameters={"normalize": False, "int8_mask": True},
    ),
    "task_arithmetic": recipe(
        "task_arithmetic",
        model("base+lo1", weight=[0, 0.5, 1]),
        model("ft1", weight=-0.5),
        model("base"),
        parameters={"lambda": [1.5, 0.5], "int8_mask": True},
    ),
    "task_arithmetic, normalized": recipe(
        "task_arithmetic",
        model("ft1", weight=[0.5, 1.5]),
        model("ft2", weight=1),
        parameters={"normalize": {"filter": "mlp", "value": True}, "lambda": "5e-1"},
    ),
    "task_arithmetic, weights that cancel": recipe(
        "task_arithmetic", model("ft1", weight=0.5), model("ft2", weight=-0.5), parameters={"normalize": True}
    ),
    "ties": recipe(
        "ties",
        model("ft1", weight=0.5, density=0.3),
        model("ft2", weight=0.75, density=0.6),
        model("ft3", weight=-0.25, density=1),
        model("base"),
    ),
    "ties, gradients and filters": recipe(
        "ties",
        model("base+lo1", density=[1, 0.7, 0.1], weight=1),
        model("base+lo2", weight=[0, 0.25, 0.5, 0.75, 1], density=[{"filter": "layers.3", "value": 0.9}]),
        model(
            "ft1",
            weight=[
                {"filter": "mlp", "value": 0.5},
                {"filter": "*", "value": [0.25, 1.25]},
                {"filter": "norm", "value": 9},
            ],
        ),
        parameters={"density": [{"filter": "self_attn", "value": [0.2, 0.8]}, {"value": 0.5}], "normalize": True},
    ),
    "ties, not normalized": recipe(
        "ties",
        model("ft1", weight=0.5, density=[{"filter": "mlp", "value": []}, {"value": 0.6}]),
        model("ft2", density=0.4),
        parameters={"normalize": False, "lambda": 1.75, "weight": 0.25, "density": 0.2},
    ),
    "ties, nothing kept of one": recipe(
        "ties", model("ft1", weight=0.5, density=0), model("ft2", weight=0.5, density=0.01)
    ),
    "dare_linear": recipe(
        "dare_linear", model("ft1", weight=0.5, density=0.4), model("base+lo2", weight=0.75, density=[0.3, 0.9])
    ),
    "dare_linear, as it is": recipe(
        "dare_linear",
        model("ft1", weight=0.5, density=0.4),
        model("ft2", weight=0.75, density=0),
        parameters={"normalize": True, "rescale": False, "lambda": 0.5},
    ),
    "dare_ties": recipe(
        "dare_ties",
        model("ft1", weight=0.5, density=0.4),
        model("ft2", weight=[0.25, 1], density=[{"filter": "q_proj", "value": 1}, {"value": 0.7}]),
        model("base+lo1", weight=0.75, density=0.5),
    ),
    "dare_ties, normalized": recipe(
        "dare_ties",
        model("ft1", weight=0.5, density=0.4),
        model("ft2", weight=0.75, density=0.7),
        parameters={"normalize": True, "lambda": 1.25},
    ),
    "dare_ties, as it is": recipe(
        "dare_ties",
        model("ft1", weight=0.5, density=0.4),
        model("ft2", weight=0.75, density=0.7),
        parameters={"rescale": False},
    ),
}


def assert_close(got, want):
    for key, (exact, bound) in want.items():
        assert ((got[key].double() - exact).abs() <= bound).all(), key


TIES = recipe("ties", model("ft1", weight=1, density=0.5), model("ft2", weight=1))


def put(place, value):
    """The recipe with a value at a place like ``models.0.parameters.weight``."""
    changed = json.loads(json.dumps(TIES))
    *path, last = [int(part) if part.isdigit() else part for part in place.split("/")]
    inner = changed
    for part in path:
        inner = inner.setdefault(part, {}) if isinstance(inner, dict) else inner[part]
    inner[last] = value
    return changed
