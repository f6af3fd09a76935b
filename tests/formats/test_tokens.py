"""Trained tokens of adapters that are merged without their base: carried over row by row, as PEFT loads them."""

import json

import pytest
import torch
from lora_files import STEM, save_factors
from peft import PeftModel
from peft_models import edit, edit_tensors, llama, saved

import merge_engine
from merge_engine.errors import AdapterError
from merge_engine.formats.adapter import TOKENS
from merge_engine.formats.open import open_adapter
from merge_engine.formats.tokens import tokens_of

KEY = f"{STEM}model.embed_tokens{TOKENS}"


def adapter(folder, seed, tokens, **config):
    """With rows that say which adapter and which token they are: token + seed / 8."""
    saved(folder, seed=seed, r=2, target_modules=["q_proj"], trainable_token_indices=tokens, **config)
    indices = tokens if isinstance(tokens, list) else tokens["embed_tokens"]
    rows = torch.stack([torch.full((32,), token + seed / 8) for token in indices])
    edit_tensors(folder, lambda tensors: tensors.update({KEY: rows}))
    return folder


def rows_of(folder):
    """{token: its row}, of an adapter as PEFT has it once it is loaded."""
    layer = PeftModel.from_pretrained(llama(), folder).base_model.model.model.embed_tokens.token_adapter
    rows = layer.trainable_tokens_delta["default"].detach()
    return dict(zip(layer.token_indices["default"], rows, strict=True))


@pytest.mark.quick
@pytest.mark.parametrize("table", [False, True])
def test_rows_that_only_one_adapter_has_or_that_agree(tmp_path, table):
    def named(tokens):
        return {"embed_tokens": tokens} if table else tokens

    folders = [adapter(tmp_path / "one", 0, named([5, 1])), adapter(tmp_path / "two", 0, named([1, 9]))]
    folders += [saved(tmp_path / "three", r=2, target_modules=["q_proj"])]
    merge_engine.merge(folders, tmp_path / "out", method="linear")
    got = rows_of(tmp_path / "out")
    assert list(got) == [5, 1, 9]
    assert all(torch.equal(row, torch.full((32,), float(token))) for token, row in got.items())
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == ({"model.embed_tokens": [5, 1, 9]} if table else [5, 1, 9])


@pytest.mark.parametrize("way", ["merge", "Session"])
def test_rows_that_differ(tmp_path, way):
    folders = [adapter(tmp_path / "one", 0, [5, 1]), adapter(tmp_path / "two", 2, [1, 9])]

    def merged(name, **recipe):
        if way == "merge":
            return merge_engine.merge(folders, tmp_path / name, method="linear", **recipe)
        with merge_engine.Session(folders) as session:
            return session.merge(tmp_path / name, method="linear", **recipe)

    message = r"tokens_delta: the row of token 1 differs between one and two, .*; wanted a merge --into BASE, or saved"
    with pytest.raises(AdapterError, match=message):
        merged("no")
    for saved_, between in (("average", 1.125), ("first", 1.0)):
        merged(saved_, saved=saved_)
        got = rows_of(tmp_path / saved_)
        assert {token: float(row[3]) for token, row in got.items()} == {5: 5.0, 1: between, 9: 9.25}
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("tokens", [[1], [1, 1], [1, -2], None, {"lm_head": [1, 2]}])
def test_indices_that_are_not_those_of_the_rows(tmp_path, tokens):
    folder = adapter(tmp_path / "a", 0, [5, 1])
    edit(folder, trainable_token_indices=tokens)
    with pytest.raises(AdapterError, match=r"^a: \S+tokens_delta is \[2, 32\], wanted a row for each of trainable_tok"):
        merge_engine.merge([folder], tmp_path / "no", method="linear")


@pytest.mark.parametrize("names", [("tokens", "embed_tokens"), ("embed_tokens", "tokens")], ids=str)
def test_the_longest_name_that_ends_the_layers_counts(tmp_path, names):
    folder = adapter(tmp_path / "a", 0, [5, 1])
    edit(folder, trainable_token_indices={name: [5, 1] if name == "embed_tokens" else [7, 8] for name in names})
    assert tokens_of(open_adapter(folder), KEY) == [5, 1]


def test_what_does_not_go_together(tmp_path):
    one = open_adapter(adapter(tmp_path / "one", 0, [5, 1]))
    factors = {"model.layers.0.self_attn.q_proj": (torch.ones(2, 32), torch.ones(32, 2))}
    whole = {f"{STEM}model.embed_tokens.weight": torch.zeros(64, 32)}
    two = save_factors(tmp_path / "two", factors, whole, base_model_name_or_path=None)
    with pytest.raises(AdapterError, match=r"^two holds model\.embed_tokens whole, and another adapter trains tokens"):
        merge_engine.merge([two, one], tmp_path / "no", method="linear")
    lora = saved(tmp_path / "three", r=2, target_modules=["embed_tokens"], save_embedding_layers=False)
    with pytest.raises(AdapterError, match=r"^one holds model\.embed_tokens whole, and three adapts it"):
        merge_engine.merge([lora, one], tmp_path / "no", method="linear")
    half = {KEY: torch.zeros(2, 32, dtype=torch.float16)}
    other = save_factors(tmp_path / "four", factors, half, base_model_name_or_path=None, trainable_token_indices=[1, 2])
    with pytest.raises(AdapterError, match=r"one has rows of \[32\] float32, four of \[32\] float16"):
        merge_engine.merge([one, other], tmp_path / "no", method="linear")
