"""mergekit's recipes: against float64 arithmetic on whole tensors, numpy's interpolation, and mergekit itself."""

import json

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit_oracle import (
    ADAPTED,
    CONFIG,
    LAYERS,
    RECIPES,
    SHAPES,
    assert_close,
    full,
    keep,
    look_up,
    model,
    oracle,
    put,
    recipe,
    save_model,
    weights_of,
)
from safetensors.torch import save_file
from toy_models import bytes_of

import merge_engine
from merge_engine.errors import MergeError, RecipeError
from merge_engine.formats.checkpoint import open_checkpoint
from merge_engine.mergekit.factors import bind
from merge_engine.mergekit.file import read_recipe
from merge_engine.mergekit.layers import depths
from merge_engine.mergekit.recipe import merge_recipe
from merge_engine.rules.recipe import Recipe


@pytest.mark.quick
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


def test_a_negative_sum_of_weights_divides_too(here, tmp_path):
    models = [model("ft1", weight=0.5), model("ft2", weight=-1.0)]
    merge_recipe(recipe("task_arithmetic", *models, parameters={"normalize": True}), tmp_path / "out")
    base, one, two = (full(name) for name in ("base", "ft1", "ft2"))
    want = {key: base[key] + (0.5 * (one[key] - base[key]) - (two[key] - base[key])) / -0.5 for key in base}
    assert_close(weights_of(tmp_path / "out"), {key: (exact, 1e-5) for key, exact in want.items()})


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
    with pytest.raises(RecipeError, match=r"slices\[0\]: wanted as many layers of each source, got \[4, 5\]"):
        merge_recipe(sliced, tmp_path / "two")
    part["sources"].pop()
    with pytest.raises(RecipeError, match=r"slices\[0\]: wanted base among the sources, .*; add it, or set "):
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
        with pytest.raises(RecipeError, match=r"wanted a weight for ft1, got none .* parameters: {weight: X}"):
            bind(read_recipe(asked), base)
        return
    bound = bind(read_recipe(asked), base)
    assert bound is not None
    fields = bound.fields
    modules = [key.removesuffix(".weight") for key in SHAPES]
    got = fields["module_weights"] if "weights" not in fields else dict.fromkeys(modules, fields["weights"])
    for key, module in zip(SHAPES, modules, strict=True):
        times = look_up("lambda", key, parameters, default=1.0)
        assert got[module] == pytest.approx((times * want[key], times), rel=1e-12, abs=1e-12)


@pytest.mark.quick
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


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            recipe("linear", model("ft1", weight=1), model("ft2", weight=-1), base=None),
            "recipe: weight: linear divides by their sum, got 0 for lm_head.weight; wanted other weights, or nor",
        ),
        (
            recipe("linear", model("ft1", weight=1)),
            "recipe: wanted a weight for base, got none for ",
        ),
    ],
)
def test_what_arithmetic_cannot_follow_is_said(here, tmp_path, asked, message):
    with pytest.raises(RecipeError, match=f"^{message}"):
        merge_recipe(asked, tmp_path / "out")


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


def test_a_changed_gradient_is_another_merge(here, tmp_path):
    """What the settings come to is in the report, and in what a resumed run is compared by."""
    asked = RECIPES["ties, gradients and filters"]
    merge_recipe(asked, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "merge_report.json").read_text())["recipe"]
    assert told["module_weights"]["model.layers.2.self_attn.q_proj"] == [1.0, 0.5, 0.75]
    assert told["module_densities"]["model.layers.4.self_attn.q_proj"] == [0.1, 0.8, 0.8]
    shown = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("```yaml\n")[1].split("```")[0])
    tables = dict.fromkeys(["module_weights", "module_densities"], "of 48 modules, listed in recipe.yaml")
    assert {key: shown[key] for key in tables} == tables and len(told["module_weights"]) == 48
    assert all(told[key] in (value, None) for key, value in shown.items() if key not in tables)
    kept = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert {key: kept[key] for key in tables} == {key: told[key] for key in tables}
    plain = Recipe(module_weights={"a": (1.0, 2.0)}, module_densities={"a": (0.5, 1.0)}).as_dict()
    assert json.loads(json.dumps(plain)) == plain


def test_tables_by_module_cover_every_module(here, tmp_path):
    for field in ("module_weights", "module_densities"):
        with pytest.raises(RecipeError, match=f"^{field}: wanted an entry for every module, got none for "):
            merge_engine.merge_models("base", ["ft1"], tmp_path / "out", **{field: {"other": [1.0]}})
        table = {key.removesuffix(".weight"): [1.0, 1.0] for key in SHAPES}
        with pytest.raises(RecipeError, match=f"^{field}: wanted 1 number for lm_head, got 2"):
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
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.merge_methods import generalized_task_arithmetic as arithmetic
    from mergekit.options import MergeOptions

    LoaderCache().loaders.clear()  # it knows models by name, and folders of one name may be others now
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


def test_the_card_of_a_merge_of_whole_models(here, tmp_path):
    """What the hub reads, a recipe that repeats the merge by its file, and lines that load the model."""
    asked = {"merge_method": "slerp", "base_model": "base", "models": [{"model": "base"}, {"model": "ft1"}]}
    merge_recipe({**asked, "parameters": {"t": 0.25}}, tmp_path / "out", seed=3)
    _, front, card = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["merge", "merge-engine"]}
    assert "`merge-engine merge FOLDER/mergekit_config.yml --seed 3 -o OUT` repeats the merge" in card
    assert '.from_pretrained(".")' in card.split("## Use\n")[1]
    merge_recipe(tmp_path / "out" / "mergekit_config.yml", tmp_path / "again", seed=3)
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "out")
