"""Recipes of public models run as they are; what is refused says what to use instead."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from lora_files import save_factors
from safetensors.torch import load_file, save_file
from toy_vocabularies import numbered, write_tokenizer

from merge_engine.errors import RecipeError
from merge_engine.mergekit.recipe import merge_recipe

LAYERS, WIDTH = 32, 4
PUBLIC = yaml.safe_load((Path(__file__).parent / "public_recipes.yaml").read_text())
SHAPES = {
    "model.embed_tokens.weight": (6, WIDTH),
    **{
        f"model.layers.{i}.{name}.weight": (WIDTH, WIDTH)
        for i in range(LAYERS)
        for name in ("self_attn.q_proj", "mlp.down_proj")
    },
    "model.norm.weight": (WIDTH,),
    "lm_head.weight": (6, WIDTH),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base; A to E tuned from it, B with a token of its own; A2 to A4, links to A; adapters lora1 and lora2 on base."""
    folder = tmp_path_factory.mktemp("public")
    generator = torch.Generator().manual_seed(0)
    base = {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
    for name in ("base", *"ABCDE"):
        (folder / name).mkdir()
        tensors = (
            base if name == "base" else {k: t + torch.randn(t.shape, generator=generator) for k, t in base.items()}
        )
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        config = {"vocab_size": 6, "tie_word_embeddings": False, "num_hidden_layers": LAYERS, "dtype": "float32"}
        (folder / name / "config.json").write_text(json.dumps(config))
        tokens = ["to", "be", "or", "not", "<a>"] + (["<b>"] if name == "B" else [])
        write_tokenizer(folder / name, numbered(*tokens))
        (folder / name / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    for number in (2, 3, 4):
        (folder / f"A{number}").symlink_to("A", target_is_directory=True)
    for number in (1, 2):
        modules = [f"model.layers.{i}.self_attn.q_proj" for i in range(LAYERS)]
        factors = {m: [torch.randn(s, generator=generator) for s in ((1, WIDTH), (WIDTH, 1))] for m in modules}
        save_factors(folder / f"lora{number}", factors, lora_alpha=1, target_modules=["q_proj"])
    return folder


def test_most_of_them_run():
    assert len(PUBLIC) >= 40 and sum("refused" not in each for each in PUBLIC) >= 36
    methods = {each["recipe"]["merge_method"] for each in PUBLIC}
    assert len(methods) >= 15


@pytest.mark.parametrize("number", range(len(PUBLIC)))
def test_a_public_recipe(folder, tmp_path, monkeypatch, number):
    monkeypatch.chdir(folder)
    recipe = PUBLIC[number]["recipe"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys that mergekit does not read either
        if "refused" in PUBLIC[number]:
            with pytest.raises(RecipeError) as refused:
                merge_recipe(recipe, tmp_path / "out")
            assert str(refused.value) == f"recipe: {PUBLIC[number]['refused']}"
            recipe = recipe | PUBLIC[number]["instead"]  # what the message says to use instead
            recipe = {key: value for key, value in recipe.items() if value is not None}
        merge_recipe(recipe, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert {f"model.layers.{config['num_hidden_layers'] - 1}.mlp.down_proj.weight"} <= tensors.keys()
    assert f"model.layers.{config['num_hidden_layers']}.mlp.down_proj.weight" not in tensors
    assert len(tensors["lm_head.weight"]) == config["vocab_size"]
    assert str(tensors["model.norm.weight"].dtype) == f"torch.{config['dtype']}"
    assert config["dtype"] == recipe.get("out_dtype", recipe.get("dtype", "float32"))
