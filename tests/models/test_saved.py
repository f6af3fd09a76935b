"""Layers that an adapter holds whole."""

import shutil

import pytest
import torch
from lora_files import STEM, save_factors
from safetensors.torch import load_file, save_file
from toy_models import SHAPES, save_base, weights_of
from toy_vocabularies import (
    KEYS,
    WIDTH,
    WORDS,
    eighths,
    make_tokenizer,
    numbered,
    opened,
    rewrite,
    save_llama,
    union_folder,
    write_tokenizer,
)

import merge_engine
from merge_engine.errors import MergeError, ModelError, RecipeError
from merge_engine.formats.checkpoint import open_checkpoint
from merge_engine.formats.open import open_adapter
from merge_engine.into.job import make_job
from merge_engine.into.resume import _files_of
from merge_engine.rules.recipe import Recipe

U = 2.0**-24  # half a step of float32


@pytest.mark.quick
def test_a_saved_layer_may_come_with_its_original_and_twice(tmp_path):
    """As PEFT writes embeddings in modules_to_save where the vocabulary was resized."""
    base, head = save_base(tmp_path / "base"), torch.full((19, 12), 0.5)
    factors = {"model.layers.0.q_proj": (torch.ones(2, 20), torch.ones(12, 2))}
    stem, names = "base_model.model.lm_head", ("weight", "modules_to_save.weight", "original_module.weight")
    extras = {f"{stem}.{name}": tensor for name, tensor in zip(names, (head, head.clone(), head - 3), strict=True)}
    save_factors(tmp_path / "a", factors, extras, modules_to_save=["lm_head"])
    merge_engine.merge_into(base, [tmp_path / "a"], tmp_path / "out", method="linear")
    got = weights_of(tmp_path / "out")
    assert got.keys() == weights_of(base).keys() and torch.equal(got["lm_head.weight"], head.bfloat16())
    extras[f"{stem}.modules_to_save.weight"] = head + 1
    save_factors(tmp_path / "b", factors, extras, modules_to_save=["lm_head"])
    with pytest.raises(
        ModelError, match=r"^b: \S+lm_head\.modules_to_save\.weight would replace lm_head\.modules_to_s"
    ):
        merge_engine.merge_into(base, [tmp_path / "b"], tmp_path / "no", method="linear")


@pytest.mark.quick
def test_a_saved_layer_that_the_base_ties_is_refused(tmp_path):
    """The base holds no head: its configuration alone says that the embedding is the head, too."""
    shapes = {name: shape for name, shape in SHAPES.items() if name != "lm_head"}
    factors = {"model.layers.0.q_proj": (torch.ones(2, 20), torch.ones(12, 2))}
    rows = {f"{STEM}model.embed_tokens.weight": torch.zeros(19, 12)}
    adapter = save_factors(tmp_path / "a", factors, rows, modules_to_save=["embed_tokens"])
    tied = save_base(tmp_path / "tied", shapes=shapes, tie_word_embeddings=True)
    with pytest.raises(ModelError, match=r"^a: model\.embed_tokens\.weight is tied to another layer of tied; untie"):
        merge_engine.merge_into(tied, [adapter], tmp_path / "no", method="linear")
    untied = save_base(tmp_path / "untied", shapes=shapes)
    merge_engine.merge_into(untied, [adapter], tmp_path / "out", method="linear")
    assert not weights_of(tmp_path / "out")["model.embed_tokens.weight"].any()


def test_an_adapter_merges_into_the_bases_rows(toys):
    base, (chat, *_) = toys
    generator = torch.Generator().manual_seed(9)
    A, B = eighths(generator, 2, 4), eighths(generator, WIDTH, 2)
    adapter = save_factors(base.parent / "sql", {"model.embed_tokens": (A, B)})
    out = union_folder((base, [adapter, chat]), method="linear", weights=[1.0, 0.5])
    start, x = weights_of(base)[KEYS[0]], weights_of(chat)[KEYS[0]]
    want = start + 2 * (B @ A).t() + 0.5 * (x - start)
    want[3] = x[3]
    assert torch.equal(weights_of(out)[KEYS[0]], want)
    shutil.rmtree(out)
    write_tokenizer(adapter, numbered("to", "be", "or", "<z>"))
    with pytest.raises(
        ModelError, match=r"^sql: it changes model\.embed_tokens\.weight and has tokens that base does not have"
    ):
        merge_engine.merge_into(base, [adapter], out, vocab="union")
    assert not out.exists()


@torch.no_grad()
def test_an_adapter_that_peft_saved_with_added_tokens(tmp_path):
    """Its rows of embedding and head go by their tokens, beside those of a full model; its factors merge as ever."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = save_llama(tmp_path / "base", make_tokenizer("WordLevel"), 0)
    full = save_llama(tmp_path / "full", make_tokenizer("WordLevel", ["<full>", "<both>"]), 1)
    tokenizer, folder = make_tokenizer("WordLevel", ["<both>", "<lora>"]), tmp_path / "lora"
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    generator = torch.Generator().manual_seed(5)
    for name, weight in model.named_parameters():
        if ".lora_" in name or "embed_tokens" in name or "lm_head" in name:
            weight.copy_(eighths(generator, *weight.shape))
    model.save_pretrained(folder, save_embedding_layers=True)
    tokenizer.save_pretrained(folder)
    factors = load_file(folder / "adapter_model.safetensors")
    want = {
        key.replace("base_model.model.", ""): tensor for key, tensor in model.merge_and_unload().state_dict().items()
    }

    alone = merge_engine.merge_into(base, [folder], tmp_path / "alone", method="linear", vocab="union")
    got = weights_of(tmp_path / "alone")
    assert alone.merged == 3 and got.keys() == want.keys() and len(factors) == 4
    assert all(torch.equal(got[key], want[key]) for key in want)

    job = make_job(open_checkpoint(base), [open_adapter(folder)], Recipe(method="linear"), 10**9, "union")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= _files_of(job.plan.adapters[0]).keys()

    options = {"method": "linear", "weights": [0.5, 2.0], "vocab": "union"}
    merge_engine.merge_models(base, [full, folder], tmp_path / "out", **options)
    got, start, one = map(opened, (tmp_path / "out", base, full))
    assert got.tokenizer.convert_tokens_to_ids(["<full>", "<both>", "<lora>"]) == [5, 6, 7]
    ids = tokenizer.get_vocab()
    for part, key in (("embedding", "model.embed_tokens.weight"), ("head", "lm_head.weight")):
        rows, before, first = (getattr(each, part) for each in (got, start, one))
        for word in WORDS:
            expected = before[word] + 0.5 * (first[word] - before[word]) + 2 * (want[key][ids[word]] - before[word])
            assert torch.equal(rows[word], expected)
        assert torch.equal(rows["<full>"], first["<full>"])
        assert torch.equal(rows["<lora>"], want[key][ids["<lora>"]])
        assert torch.equal(rows["<both>"], (first["<both>"] + want[key][ids["<both>"]]) / 2)
    key = "model.layers.0.self_attn.q_proj.weight"
    before, first = weights_of(base)[key], weights_of(full)[key]
    expected = before + 0.5 * (first - before) + 2 * (want[key] - before)
    torch.testing.assert_close(weights_of(tmp_path / "out")[key], expected, rtol=4 * U, atol=512 * U)

    with pytest.raises(MergeError, match="vocabularies differ"):
        merge_engine.merge_into(base, [folder], tmp_path / "no")
    with pytest.raises(RecipeError, match=r"^space: lora holds its vocabulary whole and has no factors"):
        merge_engine.merge_into(base, [folder], tmp_path / "no", vocab="union", space="factors")
    stem = "base_model.model."
    for change, message in (
        ({f"{stem}score.weight": torch.zeros(2)}, "not adapted, got score.weight"),
        (
            {f"{stem}lm_head.lora_A.weight": torch.zeros(2, 8), f"{stem}lm_head.lora_B.weight": torch.zeros(5, 2)},
            "lm_h",
        ),
        ({next(key for key in factors if "lora_B" in key): torch.full((8, 2), torch.nan)}, "holds NaN"),
        ({f"{stem}lm_head.weight": torch.zeros(7, 9)}, "lm_head.weight is .7, 9., wanted .5, 8. as in base"),
    ):
        save_file({**factors, **change}, folder / "adapter_model.safetensors")
        rewrite(folder, "adapter_config.json", modules_to_save=["score"])
        with pytest.raises(MergeError, match=f"^lora: .*{message}"):
            merge_engine.merge_into(base, [folder], tmp_path / "no", vocab="union")
    del factors[f"{stem}lm_head.weight"]
    save_file(factors, folder / "adapter_model.safetensors")
    with pytest.raises(MergeError, match="vocabularies differ"):
        merge_engine.merge_into(base, [folder], tmp_path / "no", vocab="union")


@pytest.mark.parametrize("same", [True, False])
def test_an_adapter_whose_head_is_tied_to_its_embedding(tmp_path, repositories, same):
    """From the hub, with its tokens."""
    base = save_llama(tmp_path / "base", make_tokenizer("WordLevel"), 0, tied=True)
    rows = eighths(torch.Generator().manual_seed(1), 6, 8)
    factors = {"model.layers.0.self_attn.q_proj": (torch.ones(1, 8), torch.ones(8, 1))}
    held = {f"{STEM}{KEYS[0]}": rows, f"{STEM}{KEYS[1]}": rows + (not same)}
    repositories["user/lora"] = save_factors(tmp_path / "lora", factors, held)
    make_tokenizer("WordLevel", ["<a>"]).save_pretrained(tmp_path / "lora")
    if same:
        merge_engine.merge_into(base, ["user/lora"], tmp_path / "out", method="linear", vocab="union")
        assert torch.equal(weights_of(tmp_path / "out")[KEYS[0]], rows) and KEYS[1] not in weights_of(tmp_path / "out")
    else:
        with pytest.raises(
            ModelError, match=r"^lora: lm_head\.weight is tied to model\.embed_tokens\.weight in base, w"
        ):
            merge_engine.merge_into(base, ["user/lora"], tmp_path / "out", method="linear", vocab="union")
