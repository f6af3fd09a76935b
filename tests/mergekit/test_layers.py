"""Slices of layers: what is stacked opens in transformers and computes what the same layers do by hand."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_engine.mergekit.layers as layers_module
from merge_engine.errors import RecipeError
from merge_engine.formats.checkpoint import open_checkpoint
from merge_engine.mergekit.recipe import merge_recipe

MODEL = "model.safetensors"


def save(folder, seed, kind="llama", *, tied=False, layers=4):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
    more = {"layer_types": ["sliding_attention", "full_attention"] * (layers // 2)} if kind == "gemma3_text" else {}
    more |= {"head_dim": 4, "sliding_window": 2} if kind == "gemma3_text" else {}
    config = AutoConfig.for_model(
        kind, vocab_size=16, num_hidden_layers=layers, tie_word_embeddings=tied, **sizes, **more
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) / 2)
    model.save_pretrained(folder)
    return model


def stacked(first, layers, last):
    """A model of the layers given, with the embedding of one and what comes after the layers of another."""
    model = copy.deepcopy(first)
    model.model.layers = torch.nn.ModuleList(copy.deepcopy(layer) for layer in layers)
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    model.model.norm = copy.deepcopy(last.model.norm)
    if not model.config.tie_word_embeddings:
        model.lm_head = copy.deepcopy(last.lm_head)
    model.config.num_hidden_layers = len(layers)
    return model


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[3, 1, 4, 1, 5, 9]]), use_cache=False).logits


def cut(name, start, stop):
    return {"sources": [{"model": str(name), "layer_range": [start, stop]}]}


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("tied", [False, True])
def test_stacked_layers_give_the_logits_of_the_same_by_hand(tmp_path, kind, tied):
    from transformers import AutoModelForCausalLM

    one, two = save(tmp_path / "one", 1, kind, tied=tied), save(tmp_path / "two", 2, kind, tied=tied)
    slices = [cut(tmp_path / "one", 0, 3), cut(tmp_path / "two", 1, 4)]
    merge_recipe({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert merged.config.num_hidden_layers == 6
    want = stacked(one, [*one.model.layers[:3], *two.model.layers[1:]], two)
    types = getattr(one.config, "layer_types", None)
    if types is not None:
        want.config.layer_types = types[:3] + types[1:]
        assert merged.config.layer_types == types[:3] + types[1:]
    assert torch.equal(logits(merged), logits(want))


def test_a_head_of_its_own_unties_the_output(tmp_path):
    from transformers import AutoModelForCausalLM

    one, two = save(tmp_path / "one", 1, tied=True), save(tmp_path / "two", 2, tied=False)
    slices = [cut(tmp_path / "one", 0, 2), cut(tmp_path / "two", 2, 4)]
    merge_recipe({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert not merged.config.tie_word_embeddings
    assert torch.equal(merged.lm_head.weight, two.lm_head.weight)
    assert torch.equal(merged.model.embed_tokens.weight, one.model.embed_tokens.weight)


@pytest.mark.parametrize("order", [("tied", "apart"), ("apart", "tied")], ids=str)
def test_one_head_of_its_own_among_models_unties_the_output(tmp_path, order):
    """The tied model brings its embedding as its head."""
    models = {name: save(tmp_path / name, seed, tied=name == "tied") for seed, name in enumerate(("tied", "apart"))}
    slices = [
        {"sources": [cut(tmp_path / name, *layers)["sources"][0] | {"parameters": {"weight": 0.5}} for name in order]}
        for layers in ((0, 2), (2, 4))
    ]
    merge_recipe({"merge_method": "linear", "dtype": "float32", "slices": slices}, tmp_path / "out")
    got = load_file(tmp_path / "out" / MODEL)
    tied, apart = models["tied"].model.embed_tokens.weight, models["apart"]
    assert torch.equal(got["lm_head.weight"], (tied + apart.lm_head.weight) / 2)
    assert torch.equal(got["model.embed_tokens.weight"], (tied + apart.model.embed_tokens.weight) / 2)
    assert not open_checkpoint(tmp_path / "out").ties_embeddings


def test_a_scale_by_filter_and_one_layer_often(tmp_path):
    """The depth-upscaled models of public cards silence what they repeat."""
    model = save(tmp_path / "one", 1)
    scale = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.5}, {"value": 1.0}]
    again = {"sources": [{"model": str(tmp_path / "one"), "layer_range": [1, 2], "parameters": {"scale": scale}}]}
    recipe = {"merge_method": "passthrough", "slices": [cut(tmp_path / "one", 0, 4), again, again]}
    merge_recipe(recipe, tmp_path / "out")
    got, want = load_file(tmp_path / "out" / "model.safetensors"), model.state_dict()
    assert not got["model.layers.5.self_attn.o_proj.weight"].any()
    assert torch.equal(got["model.layers.4.mlp.down_proj.weight"], want["model.layers.1.mlp.down_proj.weight"] / 2)
    assert torch.equal(got["model.layers.5.mlp.up_proj.weight"], want["model.layers.1.mlp.up_proj.weight"])
    assert open_checkpoint(tmp_path / "out").config["num_hidden_layers"] == 6


def test_copies_are_the_bytes_of_their_model(tmp_path):
    """Nothing is computed, and a dtype that the recipe does not ask for is not changed."""
    save(tmp_path / "one", 1).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    result = merge_recipe({"merge_method": "passthrough", "slices": [cut(tmp_path / "half", 0, 4)]}, tmp_path / "out")
    assert (result.merged, result.inputs) == (0, 1)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "out"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_layers_that_are_not_there(tmp_path):
    save(tmp_path / "one", 1)
    recipe = {"merge_method": "passthrough", "slices": [cut(tmp_path / "one", 2, 6)]}
    with pytest.raises(RecipeError, match=r"layer_range: wanted layers of one, \[0, 4\], got \[2, 6\]"):
        merge_recipe(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    recipe["slices"] = [{"sources": [{"model": "one", "layer_range": [2, 2]}]}]
    with pytest.raises(RecipeError, match=r"layer_range: wanted a first layer and a later end, got \[2, 2\]"):
        merge_recipe(recipe, tmp_path / "out")


@pytest.mark.parametrize("sliced", [False, True])
def test_each_name_is_searched_a_few_times_however_many_layers_there_are(tmp_path, monkeypatch, sliced):
    """A model of 100,000 tensors took minutes: the layers were looked for anew for each tensor."""
    counts = []
    for layers in (20, 40):
        folder = tmp_path / f"of {layers}"
        folder.mkdir()
        save_file({f"model.layers.{n}.x.weight": torch.full((2,), float(n)) for n in range(layers)}, folder / MODEL)
        (folder / "config.json").write_text(json.dumps({"num_hidden_layers": layers}))
        pattern = CountedPattern(layers_module._LAYER)
        monkeypatch.setattr(layers_module, "_LAYER", pattern)
        model = {"model": str(folder)}
        parts = (
            {"slices": [cut(folder, 1, layers)]} if sliced else {"models": [{**model, "parameters": {"weight": 1.0}}]}
        )
        merge_recipe({"merge_method": "passthrough" if sliced else "linear", **parts}, tmp_path / "out", overwrite=True)
        got = load_file(tmp_path / "out" / MODEL)
        assert {key: tensor[0].item() for key, tensor in got.items()} == {
            f"model.layers.{n}.x.weight": n + sliced for n in range(layers - sliced)
        }
        counts.append(pattern.searches)
    assert 40 <= counts[0] and counts[1] <= 2.2 * counts[0]


class CountedPattern:
    def __init__(self, pattern):
        self.pattern, self.searches = pattern, 0

    def search(self, text):
        self.searches += 1
        return self.pattern.search(text)
