"""Weights by block: which modules a pattern names, and what a merge with them is."""

import pytest
import torch
from image_files import read_by_comfy, save_image

import merge_engine
from merge_engine.cli.main import main
from merge_engine.errors import RecipeError
from merge_engine.rules.patterns import compiled
from merge_engine.rules.recipe import Recipe

LAYERS = {
    "lora_unet_double_blocks_0_img_attn_proj": (12, 16),
    "lora_unet_double_blocks_1_img_attn_proj": (12, 16),
    "lora_unet_double_blocks_11_img_attn_proj": (12, 16),
    "lora_unet_single_blocks_0_linear1": (20, 9),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": (9, 7),
}


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("down_blocks.*", "unet.down_blocks.0.attn", True),
        ("down_blocks.*", "lora_unet_down_blocks_0_attn", True),
        ("down_blocks.*", "lora_unet__down_blocks_0_attn", True),
        ("down_blocks.*", "lora_prior_unet_down_blocks_0", True),
        ("text_model.*", "lora_te2_text_model_encoder", True),
        ("transformer_blocks.*", "lora_transformer_transformer_blocks_0_attn", True),
        ("down_blocks.*", "lycoris_down_blocks_0", True),
        ("down_blocks.*", "down_blocks.0", True),
        ("down_blocks.*", "lora_unet_up_down_blocks_0", False),
        ("proj", "model.q_proj", False),
        ("q_proj", "model.layers.0.q_proj", True),
        ("q_proj", "model.layers.0.q_proj.x", False),
        ("a|b", "x.b", True),
        ("a|b", "x.b.c", False),
    ],
)
def test_what_a_pattern_matches(pattern, name, matches):
    assert bool(compiled("density", pattern).match(name)) == matches


def save_two(folder):
    files = [folder / "a.safetensors", folder / "b.safetensors"]
    return files, [save_image(file, "kohya", 3, alpha=2, seed=n, modules=LAYERS) for n, file in enumerate(files)]


def weights_in(name, blocks, plain):
    """The two weights in a module, written out by hand for the tests' blocks."""
    found = list(plain)
    for adapter, number in (("a", 0), ("b", 1)):
        for start, weight in blocks.get(adapter, {}).items():
            if name.split("_", 2)[2].startswith(start):
                found[number] = weight
                break
    return found


@pytest.mark.quick
def test_weights_of_blocks_are_those_of_the_modules_that_match(tmp_path):
    files, deltas = save_two(tmp_path)
    starts = {"a": {"double_blocks_1_": 0.5, "double_blocks": 0.0}, "b": {"single_blocks": -2.0}}
    patterns = {adapter: {f"{start}.*": w for start, w in table.items()} for adapter, table in starts.items()}
    for blocks in (patterns, {"0": patterns["a"], 1: patterns["b"]}):
        options = {"method": "linear", "weights": [3, 1], "block_weights": blocks, "overwrite": True}
        merge_engine.merge(files, tmp_path / "out.safetensors", **options)
        for name, got in read_by_comfy(tmp_path / "out.safetensors", LAYERS).items():
            one, two = weights_in(name, starts, (3, 1))
            want = one * deltas[0][name] + two * deltas[1][name]
            assert (got - want).norm() <= 1e-6 * (deltas[0][name].norm() * 3 + deltas[1][name].norm() * 2), name


def test_the_command_line_and_a_recipe_file(tmp_path):
    files, _ = save_two(tmp_path)
    merge_engine.merge(
        files,
        tmp_path / "api.safetensors",
        method="ties",
        weights=[1, 0.8],
        block_weights={"a": {"double_blocks.*": 0.5}},
    )
    texts = ["1", "0.8", "a:double_blocks.*=0.5"]
    options = [*map(str, files), "-o", str(tmp_path / "cli.safetensors"), "--method", "ties", "--weights", *texts]
    assert main(["merge", *options]) == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"adapters: [{files[0]}, {files[1]}]\noutput: {tmp_path / 'file.safetensors'}\nmethod: ties\n"
        "weights: [1, 0.8]\nblock_weights: {a: {double_blocks.*: 0.5}}\n"
    )
    assert main(["merge", str(recipe)]) == 0
    want = read_by_comfy(tmp_path / "api.safetensors", LAYERS)
    for form in ("cli", "file"):
        got = read_by_comfy(tmp_path / f"{form}.safetensors", LAYERS)
        assert all(torch.equal(got[name], want[name]) for name in LAYERS)


def test_the_recipe_beside_a_result_repeats_it(tmp_path):
    files, _ = save_two(tmp_path)
    blocks = {"a": {"double_blocks.*": 0.5}}
    merge_engine.merge(files, tmp_path / "out", method="ties", weights=[1, 0.8], block_weights=blocks)
    again = tmp_path / "again.safetensors"
    assert main(["merge", str(tmp_path / "out" / "recipe.yaml"), "-o", str(again)]) == 0
    want, got = (read_by_comfy(file, LAYERS) for file in (tmp_path / "out" / "out.safetensors", again))
    assert all(torch.equal(got[name], want[name]) for name in LAYERS)


def test_sessions_and_sweeps_tell_weights_of_blocks_apart(tmp_path):
    files, _ = save_two(tmp_path)
    recipes = [{"method": "ties", "block_weights": {"a": {"double_blocks.*": w}}} for w in (0.5, 2.0)]
    many = list(merge_engine.merge_many(files, recipes))
    with merge_engine.Session(files) as session:
        for recipe, result in zip(recipes, many, strict=True):
            single = merge_engine.merge(files, **recipe)
            kept = session.merge(**recipe)
            for name, module in single.modules.items():
                assert torch.equal(module.A, result.modules[name].A) and torch.equal(module.B, result.modules[name].B)
                assert torch.equal(module.A, kept.modules[name].A) and torch.equal(module.B, kept.modules[name].B)
    name = "lora_unet_double_blocks_0_img_attn_proj"
    assert not torch.equal(many[0].modules[name].B, many[1].modules[name].B)


@pytest.mark.parametrize(
    ("blocks", "match"),
    [
        ({"c": {".*": 1}}, "block_weights: wanted one of a, b, or a number below 2, got 'c'"),
        ({"2": {".*": 1}}, "got '2'"),
        ({"a": {"no_block.*": 1}}, "'no_block.*' matches no module of a; wanted one of them, as lora_te1_text_model"),
        ({"a": {"(": 1}}, "block_weights: a: pattern '\\(' is no regular expression"),
        ({"a": {"a{99999999999}": 1}}, "is no regular expression: the repetition number is too large"),
        ({"a": {3000 * "(" + 3000 * ")": 1}}, "block_weights: a: pattern '\\(+' is no regular expression"),
        ({"a": {".*": "x"}}, r"block_weights: a: \.\*: wanted a finite number, got 'x'"),
        ({"a": {".*": float("nan")}}, "wanted a finite number, got nan"),
        ({"a": {}}, "wanted a table of patterns and numbers"),
        ({"a": 0.5}, "wanted a table of patterns and numbers, got 0.5"),
        ([1], "wanted a table of adapters"),
    ],
)
def test_what_is_no_table_of_blocks(tmp_path, blocks, match):
    files, _ = save_two(tmp_path)
    with pytest.raises(RecipeError, match=match):
        merge_engine.merge(files, tmp_path / "out.safetensors", block_weights=blocks)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_name_of_two_adapters_is_not_taken_for_one(tmp_path):
    files = []
    for place in "xy":
        (tmp_path / place).mkdir()
        files.append(tmp_path / place / "a.safetensors")
        save_image(files[-1], "kohya", 2, modules=LAYERS)
    with pytest.raises(RecipeError, match="got 'a', the name of 2"):
        merge_engine.merge(files, block_weights={"a": {".*": 1}})
    merge_engine.merge(files, block_weights={"1": {".*": 1}})


@pytest.mark.parametrize("texts", [["a=1"], ["a:=1"], [":x=1"], ["a:x=y"], ["x"], ["a:x=1", "a:x=2"]])
def test_what_the_command_line_takes_for_weights(tmp_path, capsys, texts):
    files, _ = save_two(tmp_path)
    assert main(["merge", *map(str, files), "-o", str(tmp_path / "out.safetensors"), "--weights", *texts]) == 2
    assert "error: --weights: wanted" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_a_recipe_with_blocks_is_plain_data():
    assert Recipe(block_weights={"a": {"x": 1}}).as_dict()["block_weights"] == {"a": {"x": 1.0}}
