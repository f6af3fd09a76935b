"""mergekit's YAML: against float64 arithmetic on whole tensors, numpy's interpolation, and mergekit itself."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_files import save_factors
from safetensors.torch import load_file, save_file

import merge_engine
from merge_engine.cli.main import main
from merge_engine.cpu.mask import keep_mask
from merge_engine.errors import MergeError, RecipeError
from merge_engine.formats.checkpoint import open_checkpoint
from merge_engine.mergekit.file import MERGEKIT_METHODS, Clause, read_recipe
from merge_engine.mergekit.recipe import bind, depths, merge_recipe
from merge_engine.rules.philox import stream_id
from merge_engine.rules.recipe import Recipe

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


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """base; ft1, ft2, ft3 tuned from it; adapters lo1, lo2 on it."""
    home = tmp_path_factory.mktemp("home")
    save_model(home / "base", 0)
    like = load_file(home / "base" / "model.safetensors")
    for i in (1, 2, 3):
        save_model(home / f"ft{i}", i, like)
    for i in (1, 2):
        save_adapter(home / f"lo{i}", 10 + i, home / "base")
    return home


@pytest.fixture
def here(home, monkeypatch):
    monkeypatch.chdir(home)
    return home


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


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_mergekits_numbers(here, tmp_path, name):
    merge_recipe(RECIPES[name], tmp_path / "out")
    got, want = weights_of(tmp_path / "out"), oracle(RECIPES[name])
    assert got.keys() == SHAPES.keys()
    assert_close(got, want)
    changed = [key for key, tensor in weights_of(here / "base").items() if not torch.equal(tensor, got[key])]
    assert len(changed) >= len(ADAPTED) * (LAYERS - 1)


@pytest.mark.parametrize("name", ["task_arithmetic", "ties, gradients and filters"])
def test_weights_by_module_on_kernels(here, tmp_path, name):
    """One launch takes many modules, but of one weight."""
    merge_recipe(RECIPES[name], tmp_path / "out", backend="triton")
    assert_close(weights_of(tmp_path / "out"), oracle(RECIPES[name]))


def test_one_slice_of_all_layers_is_its_models(here, tmp_path):
    """The slice's own parameters come between those of its models and those of the whole recipe."""
    models = [model("ft1", weight=1.0), model("ft2", density=0.9), model("base")]
    plain = recipe("ties", *models, parameters={"weight": 0.5, "density": 0.25})
    part = {"sources": [{**each, "layer_range": [0, LAYERS]} for each in models], "parameters": {"weight": 0.5}}
    sliced = {**plain, "slices": [part], "parameters": {"weight": 0.125, "density": 0.25}}
    del sliced["models"]
    merge_recipe(sliced, tmp_path / "out")
    assert_close(weights_of(tmp_path / "out"), oracle(plain))
    part["sources"][0]["layer_range"] = part["sources"][1]["layer_range"] = [0, 4]
    with pytest.raises(RecipeError, match=r"sources\[2\].layer_range: wanted \[0, 4\] as in the other sources, got"):
        merge_recipe(sliced, tmp_path / "two")
    part["sources"][2]["layer_range"] = [0, 4]
    with pytest.raises(RecipeError, match=r"layer_range: wanted all of base, \[0, 5\], got \[0, 4\]"):
        merge_recipe(sliced, tmp_path / "two")
    part["sources"].pop()
    with pytest.raises(RecipeError, match=r"slices\[0\].sources: wanted base among them, the base model"):
        merge_recipe(sliced, tmp_path / "two")


numbers = st.floats(-4, 4).map(lambda x: round(x, 3))
gradients = numbers | st.lists(numbers, max_size=6)
names = st.sampled_from(["*", "mlp", "self_attn", "layers.3.", "norm", "lm_head", "weight", "nowhere"])
tables = st.builds(dict, filter=names, value=gradients) | st.builds(dict, value=gradients)
anything = gradients | tables | st.lists(tables, min_size=1, max_size=4)


@settings(max_examples=60)
@given(own=anything, shared=anything, scale=gradients)
def test_settings_say_of_every_tensor_what_numpy_does(home, own, shared, scale):
    base = open_checkpoint(home / "base")
    parameters = {"weight": shared, "lambda": scale}
    asked = recipe("task_arithmetic", model("ft1", weight=own), model("ft2", weight=1), parameters=parameters)
    want = {key: look_up("weight", key, {"weight": own}, parameters) for key in SHAPES}
    if None in want.values():
        with pytest.raises(RecipeError, match=r"^recipe: wanted a weight for ft1, got none for "):
            bind(read_recipe(asked), base)
        return
    fields = bind(read_recipe(asked), base)
    modules = [key.removesuffix(".weight") for key in SHAPES]
    got = fields["module_weights"] if "weights" not in fields else dict.fromkeys(modules, fields["weights"])
    for key, module in zip(SHAPES, modules, strict=True):
        times = look_up("lambda", key, parameters, default=1.0)
        assert got[module] == pytest.approx((times * want[key], times), rel=1e-12, abs=1e-12)


def test_depths():
    """Towers of layers each have their own; the first number in a name says of which layer it is."""
    towers = [f"vision.blocks.{i}.mlp.{j}.weight" for i in range(3) for j in range(7)]
    one = ["text.layers.0.weight.a"]
    got = depths([*towers, *one, "embed.weight", "head.3"])
    assert got == {
        **{key: int(key.split(".")[2]) / 2 for key in towers},
        "text.layers.0.weight.a": 1.0,
        "embed.weight": 0.0,
        "head.3": 0.0,
    }


def test_switches_take_the_lower_value():
    clause = Clause(None, (True, False, True))
    assert [clause.at(depth) for depth in (0, 0.25, 0.5, 0.75, 1)] == [True, True, False, False, True]


@pytest.mark.parametrize(
    "reference",
    [
        "base+lo1",
        {"model": "base", "lora": "lo1"},
        {"model": {"path": "base"}, "lora": {"path": "lo1"}},
        {"model": {"path": "./base", "revision": None}, "lora": "lo1"},
    ],
)
def test_the_ways_to_name_a_model(here, tmp_path, reference):
    merge_recipe(recipe("task_arithmetic", model(reference, weight=1)), tmp_path / "out")
    got, want = weights_of(tmp_path / "out"), full("base+lo1")
    assert all(torch.equal(got[key].double(), want[key]) for key in want)


def test_a_revision_is_read():
    asked = read_recipe(recipe("ties", model("me/tuned@v2+you/lora@main", weight=1), base="me/tuned@v2"))
    (entry,) = asked.inputs
    assert (str(asked.base), str(entry.reference)) == ("me/tuned@v2", "me/tuned@v2+you/lora@main")
    assert (entry.reference.revision, entry.reference.lora.path, entry.reference.lora.revision) == (
        "v2",
        "you/lora",
        "main",
    )


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "float32", "out_dtype": "torch.float16"}, torch.float16),
        ({"dtype": None, "out_dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": None}, torch.float32),
    ],
)
def test_dtypes(here, tmp_path, keys, dtype):
    """All arithmetic is float32 and rounded once, whatever the dtype that is asked for."""
    asked = RECIPES["ties"]
    merge_recipe(asked, tmp_path / "exact")
    merge_recipe({**asked, **keys}, tmp_path / "out")
    got, exact = weights_of(tmp_path / "out"), weights_of(tmp_path / "exact")
    assert all(torch.equal(got[key], tensor.to(dtype)) for key, tensor in exact.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_without_a_dtype_the_output_holds_every_input(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "half", 0, dtype=torch.bfloat16)
    save_model(tmp_path / "other", 5, dtype=torch.bfloat16)
    asked = recipe("task_arithmetic", model(str(home / "ft1"), weight=1), base="half", dtype=None)
    merge_recipe(asked, tmp_path / "wide")
    assert {tensor.dtype for tensor in weights_of(tmp_path / "wide").values()} == {torch.float32}
    merge_recipe({**asked, "models": [model("other", weight=1)]}, tmp_path / "narrow")
    assert {tensor.dtype for tensor in weights_of(tmp_path / "narrow").values()} == {torch.bfloat16}


TIES = recipe("ties", model("ft1", weight=1, density=0.5), model("ft2", weight=1))


def bad(change, message):
    return pytest.param(change, message, id=message[:50])


def put(place, value):
    """The recipe with a value at a place like ``models.0.parameters.weight``."""
    changed = json.loads(json.dumps(TIES))
    *path, last = [int(part) if part.isdigit() else part for part in place.split("/")]
    inner = changed
    for part in path:
        inner = inner.setdefault(part, {}) if isinstance(inner, dict) else inner[part]
    inner[last] = value
    return changed


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        bad(put("name", "x"), "recipe: name is not supported; wanted one of merge_method, base_model, models, "),
        bad(put("modules", {}), "recipe: modules is not supported"),
        bad(put("chat_template", "auto"), "recipe: chat_template is not supported"),
        bad(
            put("models/0/weight", 1), r"recipe: models\[0\]: weight is not supported; wanted one of model, parameters"
        ),
        bad(
            put("models/1/parameters/gamma", 1),
            r"recipe: models\[1\].parameters: gamma is not supported; wanted one of",
        ),
        bad(put("parameters/epsilon", 1), "recipe: parameters: epsilon is not supported"),
        bad(
            put("models/0/parameters/weight", [{"filter": "mlp", "values": 1}]),
            r"recipe: models\[0\].parameters.weight\[0\]: values is not supported; wanted one of filter, value",
        ),
        bad(
            put("models/0/model", {"model": "ft1", "override_architecture": "x"}),
            r"recipe: models\[0\].model: override_architecture is not supported",
        ),
        bad(
            put("models/0/model", {"model": {"path": "ft1", "x": 1}}), r"recipe: models\[0\].model.model: x is not supp"
        ),
        bad(put("tokenizer/pad_to_multiple_of", 8), "recipe: tokenizer: pad_to_multiple_of is not supported"),
        bad(put("tokenizer/tokens", {}), "recipe: tokenizer: tokens is not supported; wanted one of source"),
        bad(
            put("merge_method", "slerp"), "recipe: merge_method: wanted one of linear, task_arithmetic, .*, got 'slerp'"
        ),
        bad(put("merge_method", ["ties"]), r"recipe: merge_method: wanted one of .*, got \['ties'\]"),
        bad(put("slices", [{}]), "recipe: wanted either models or slices, got both"),
        bad(put("models", None), "recipe: wanted either models or slices, got neither"),
        bad(put("models", []), r"recipe: models: wanted a list, got \[\]"),
        bad(put("models/0", "ft1"), r"recipe: models\[0\]: wanted a table of keys, got 'ft1'"),
        bad(put("models/0/model", None), r"recipe: models\[0\].model: wanted model or model\+lora, got None"),
        bad(put("models/0/model", "a+b+c"), r"recipe: models\[0\].model: wanted model or model\+lora, got 'a\+b\+c'"),
        bad(put("models/0/model", "a@b@c"), r"recipe: models\[0\].model: wanted a path, or path@revision, got 'a@b@c'"),
        bad(put("models/0/model", "base+"), r"recipe: models\[0\].model.path: wanted a name, got ''"),
        bad(put("models/0/model", "ft3+lo1"), r"recipe: ft3\+lo1: wanted an adapter on the base model, base"),
        bad(put("models/0/model", "ft2"), "recipe: ft2 is there twice, wanted each model once"),
        bad(put("models", [model("base")]), "recipe: wanted at least one model besides base, got none"),
        bad(put("base_model", None), "recipe: base_model: ties wants one, got none"),
        bad(
            put("base_model", "base+lo1"),
            r"recipe: base_model: wanted a full model without an adapter, got 'base\+lo1'",
        ),
        bad(
            put("models/1/parameters/weight", None), r"recipe: models\[1\].parameters.weight: wanted a number, got None"
        ),
        bad(put("models/1/parameters/weight", "half"), "recipe: .*weight: wanted a number, got 'half'"),
        bad(put("models/1/parameters/weight", True), "recipe: .*weight: wanted a number, got True"),
        bad(put("models/1/parameters/weight", [1, float("nan")]), "recipe: .*weight: wanted a number, got nan"),
        bad(
            put("models/1/parameters/weight", [1, {"value": 2}]),
            r"recipe: .*weight\[0\]: wanted a table of keys, got 1",
        ),
        bad(
            put("models/1/parameters/weight", {"filter": "mlp"}), r"recipe: .*weight\[0\].value: wanted a number, got N"
        ),
        bad(
            put("models/1/parameters/weight", {"filter": 1, "value": 1}),
            r"recipe: .*filter: wanted a part of tensor na",
        ),
        bad(put("models/1/parameters", {}), "recipe: wanted a weight for ft2, got none for "),
        bad(put("models/1/parameters/density", 1.5), "recipe: .*density: wanted a number from 0 to 1, got 1.5"),
        bad(put("parameters/normalize", "maybe"), "recipe: parameters.normalize: wanted true or false, got 'maybe'"),
        bad(
            put("parameters/rescale", True), "recipe: rescale: wanted false for ties, got true: trims are not rescaled"
        ),
        bad(
            put("parameters/lambda", [0, 1]),
            "recipe: lambda: ties takes one for the whole model, got 0.0 for lm_head and ",
        ),
        bad(
            put("parameters/normalize", {"filter": "mlp", "value": False}), "recipe: normalize: ties takes one for the "
        ),
        bad(put("dtype", "float64"), "recipe: dtype: wanted one of float32, float16, bfloat16, got 'float64'"),
        bad(put("out_dtype", 16), "recipe: out_dtype: wanted one of float32, float16, bfloat16, got 16"),
        bad(put("tokenizer_source", "ft1"), "recipe: tokenizer_source: wanted base, union or base, got 'ft1'"),
        bad(
            {**TIES, "tokenizer_source": "base", "tokenizer": {}}, "recipe: wanted either tokenizer or tokenizer_source"
        ),
    ],
)
def test_what_cannot_be_done_is_said(here, tmp_path, asked, message):
    with pytest.raises(RecipeError, match=f"^{message}"):
        merge_recipe(asked, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            recipe("linear", model("ft1", weight=0.5), model("ft2", weight=1), base=None, parameters={"normalize": 0}),
            "recipe: normalize: linear without it needs weights that sum to 1, got 1.5 for lm_head.weight",
        ),
        (
            recipe("linear", model("ft1", weight=1), model("ft2", weight=-1), base=None),
            "recipe: weight: linear divides by their sum, got 0 for lm_head.weight",
        ),
        (
            recipe("linear", model("ft1", weight=1)),
            "recipe: wanted a weight for base, got none for ",
        ),
        (
            recipe("dare_ties", model("ft1", weight=1), parameters={"normalize": True, "rescale": False}),
            "recipe: rescale: wanted true for dare_ties with normalize, got false",
        ),
    ],
)
def test_what_arithmetic_cannot_follow_is_said(here, tmp_path, asked, message):
    with pytest.raises(RecipeError, match=f"^{message}"):
        merge_recipe(asked, tmp_path / "out")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            put("models/0/parameters/normalize", False),
            r"models\[0\].parameters.normalize has no effect: it is of the whole",
        ),
        (
            {**TIES, "merge_method": "task_arithmetic"},
            r"models\[0\].parameters.density has no effect: task_arithmetic does not look at it",
        ),
        (
            {**TIES, "models": [*TIES["models"], model("base", weight=3)]},
            "what base has as parameters has no effect: ties takes none for the base model",
        ),
    ],
)
def test_what_mergekit_reads_and_ignores_is_told(here, asked, message):
    with pytest.warns(UserWarning, match=f"^recipe: {message}"):
        told = read_recipe(asked)
    assert len(told.inputs) == 2


def test_tied_tensors_take_one_set_of_parameters(home, tmp_path):
    tensors = weights_of(home / "base")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    for name in ("base", "ft"):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": True}))
    asked = recipe(
        "ties",
        model(str(tmp_path / "ft"), weight=[{"filter": "lm_head", "value": 2}, {"value": 1}]),
        base=str(tmp_path / "base"),
    )
    with pytest.raises(
        RecipeError, match=r"^recipe: lm_head.weight is tied to model.embed_tokens.weight; wanted the same"
    ):
        merge_recipe(asked, tmp_path / "out")


def test_the_command(here, tmp_path, capsys):
    file = tmp_path / "dare.yml"
    file.write_text(yaml.safe_dump(RECIPES["dare_ties"]))
    run = ["merge", str(file), "-o"]
    assert main([*run, str(tmp_path / "one"), "--seed", "7", "--shard-size", "4KB"]) == 0
    assert f"{tmp_path / 'one'}: 3 inputs, 48 tensors merged, 0 copied" in capsys.readouterr().out
    merge_recipe(str(file), tmp_path / "two", seed=7, shard_size="4KB")
    files = sorted(path.name for path in (tmp_path / "one").glob("*.safetensors"))
    assert len(files) > 1
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    assert main([*run, str(tmp_path / "three"), "--dry-run"]) == 0
    assert "would be 3 inputs" in capsys.readouterr().out and not (tmp_path / "three").exists()
    for option in (["--method", "ties"], ["--into", "base"], ["--dtype", "float16"], ["--density", "0.5"]):
        assert main([*run, str(tmp_path / "three"), *option]) == 2
        name = option[0].removeprefix("--")
        message = f"merge-engine: error: {name}: wanted it in {file}, which is mergekit's; got it as an option\n"
        assert capsys.readouterr().err == message
    file.write_text("merge_method: ties\nadapters: [a]")
    assert main([*run, str(tmp_path / "three")]) == 2
    assert capsys.readouterr().err.startswith(f"merge-engine: error: {file}: adapters is not supported; wanted one of ")


def test_a_changed_gradient_is_another_merge(here, tmp_path):
    """What the settings come to is in the report, and in what a resumed run is compared by."""
    asked = RECIPES["ties, gradients and filters"]
    merge_recipe(asked, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "merge_report.json").read_text())["recipe"]
    assert told["module_weights"]["model.layers.2.self_attn.q_proj"] == [1.0, 0.5, 0.75]
    assert told["module_densities"]["model.layers.4.self_attn.q_proj"] == [0.1, 0.8, 0.8]
    shown = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("```yaml\n")[1].split("```")[0])
    tables = dict.fromkeys(["module_weights", "module_densities"], "of 48 modules, listed in merge_report.json")
    assert shown == told | tables and len(told["module_weights"]) == 48
    plain = Recipe(module_weights={"a": (1.0, 2.0)}, module_densities={"a": (0.5, 1.0)}).as_dict()
    assert json.loads(json.dumps(plain)) == plain


def test_the_union_of_tokens_is_passed_on(here, tmp_path, monkeypatch):
    asked = {}

    def record(*_, vocab="base", **__):
        asked["vocab"] = vocab

    monkeypatch.setattr("merge_engine.mergekit.recipe.merge_models", record)
    for keys, vocab in (
        ({"tokenizer_source": "union"}, "union"),
        ({"tokenizer": {"source": "union"}}, "union"),
        ({"tokenizer": {}}, "union"),
        ({"tokenizer_source": "base"}, "base"),
        ({"tokenizer": {"source": {"model": "base"}}}, "base"),
        ({}, "base"),
    ):
        merge_recipe({**TIES, **keys}, tmp_path / "out")
        assert asked["vocab"] == vocab


def test_the_bases_tokens_are_those_of_every_model(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, added in (("base", "<a>"), ("ft1", "<a>"), ("ft2", "<b>")):
        (tmp_path / name).mkdir()
        for file in (home / name).iterdir():
            (tmp_path / name / file.name).symlink_to(file)
        (tmp_path / name / "added_tokens.json").write_text(json.dumps({added: 15}))
    asked = {**TIES, "tokenizer_source": "base"}
    with pytest.raises(RecipeError, match=r"^recipe: tokenizer_source: base: wanted the tokens of base in ft2, got"):
        merge_recipe(asked, tmp_path / "out")
    asked["models"] = asked["models"][:1]
    merge_recipe(asked, tmp_path / "out")
    assert_close(weights_of(tmp_path / "out"), oracle({**asked, "parameters": {}}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"normalize": True, "method": "linear"}, "normalize: wanted true or false, of ties or dare_ties, got True"),
        ({"normalize": 1}, "normalize: wanted true or false, of ties or dare_ties, got 1"),
        ({"rescale": "l1"}, "rescale: wanted density or l1, of random drops, got 'l1'"),
        ({"rescale": "l2", "method": "dare_ties"}, "rescale: wanted density or l1, of random drops, got 'l2'"),
        ({"module_weights": {"a": 1.0}}, "module_weights: a: wanted a list of numbers, got 1.0"),
        ({"module_weights": {"a": [float("inf")]}}, "module_weights: a: wanted a finite number, got inf"),
        ({"module_densities": {"a": [2.0]}}, "density: wanted a number from 0 to 1, got 2.0"),
        ({"module_densities": {}, "density": 0.5}, "density: wanted density or module_densities, got both"),
    ],
)
def test_mistakes_in_the_fields_behind_it(fields, message):
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
        Recipe(**fields)


def test_tables_by_module_cover_every_module(here, tmp_path):
    for field in ("module_weights", "module_densities"):
        with pytest.raises(RecipeError, match=f"^{field}: wanted an entry for every module, got none for "):
            merge_engine.merge_models("base", ["ft1"], tmp_path / "out", **{field: {"other": [1.0]}})
        table = {key.removesuffix(".weight"): [1.0, 1.0] for key in SHAPES}
        with pytest.raises(RecipeError, match=f"^{field}: wanted 1 numbers for lm_head, got 2"):
            merge_engine.merge_models("base", ["ft1"], tmp_path / "out", **{field: table})


def test_a_model_that_is_missing(here, tmp_path):
    with pytest.raises(MergeError, match=r"^nowhere does not exist"):
        merge_recipe(put("models/0/model", "nowhere"), tmp_path / "out")


@pytest.mark.filterwarnings("ignore")  # of mergekit's dependencies
@pytest.mark.parametrize("name", RECIPES)
def test_mergekit_itself_gives_the_same(here, tmp_path, monkeypatch, name):
    """The same YAML through mergekit, to float32 rounding, with our random masks and our order of equal magnitudes."""
    pytest.importorskip("mergekit")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.merge_methods import generalized_task_arithmetic as arithmetic
    from mergekit.options import MergeOptions

    asked, now = RECIPES[name], {}
    merge_group, sparsify = arithmetic.GeneralizedTaskArithmeticMerge.merge_group, arithmetic.sparsify

    def of_group(self, group, /, **parameters):
        now.update(key=group.metadata.name, number=-1)
        return merge_group(self, group, **parameters)

    def of_model(delta, **options):
        now.update(number=now["number"] + 1, density=options["density"])
        return sparsify(delta, **options)

    def mask(like):
        return keep(torch.ones_like(like), "dare", now["density"], now["key"], now["number"], rescale=False)

    monkeypatch.setattr(arithmetic.GeneralizedTaskArithmeticMerge, "merge_group", of_group)
    monkeypatch.setattr(arithmetic, "sparsify", of_model)

    def stable(tensor, descending):
        return tensor.sort(descending=descending, stable=True).indices

    monkeypatch.setattr(torch, "bernoulli", mask)
    monkeypatch.setattr(torch, "argsort", stable)
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, lora_merge_cache=str(tmp_path / "cache"))
    run_merge(MergeConfiguration.model_validate(asked), str(tmp_path / "theirs"), options)
    assert_close(weights_of(tmp_path / "theirs"), oracle(asked))
    merge_recipe(asked, tmp_path / "ours")
    ours, theirs = weights_of(tmp_path / "ours"), weights_of(tmp_path / "theirs")
    for key, (_, bound) in oracle(asked).items():
        assert ((ours[key] - theirs[key]).abs() <= 2 * bound).all(), key


def test_the_table_of_methods_is_mergekits():
    """What a recipe leaves out is mergekit's default."""
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    for name, row in MERGEKIT_METHODS.items():
        theirs = {parameter.name: parameter.default for parameter in registry.get(name).spec.parameters}
        assert theirs.get("normalize") == row.normalize
        assert theirs.get("rescale", False) == row.rescale
        assert set(row.parameters) <= theirs.keys()
