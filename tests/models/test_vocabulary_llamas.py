"""Unions of vocabularies of Llamas, as transformers opens them."""

import pytest
import torch
from toy_models import weights_of
from toy_vocabularies import WORDS, make_tokenizer, opened, save_llama, ties

import merge_engine

WEIGHTS = [1.0, 0.5, -2.0]  # powers of two: with whole eighths, sums of their products are exact
U = 2.0**-24  # half a step of float32


@pytest.mark.parametrize("kind", ["WordLevel", "BPE"])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_two_llamas_that_added_other_tokens_at_one_index(tmp_path, kind, tied):
    """The merged model answers with the right embedding for both, and for those of the base."""
    plain = make_tokenizer(kind)
    base = save_llama(tmp_path / "base", plain, 0, tied=tied, shards="1KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    chat = save_llama(tmp_path / "chat", make_tokenizer(kind, ["<chat>", "<both>"]), 1, tied=tied)
    code = save_llama(tmp_path / "code", make_tokenizer(kind, ["<code>", "<tool>", "<both>"]), 2, tied=tied)
    math = save_llama(tmp_path / "math", plain, 3, tied=tied)
    options = {"method": "ties", "density": 0.5, "weights": WEIGHTS, "shard_size": 600, "vocab": "union"}
    merge_engine.merge_models(base, [chat, code, math], tmp_path / "out", **options)
    got, start, *models = map(opened, (tmp_path / "out", base, chat, code, math))

    size, added = len(plain), ["<chat>", "<both>", "<code>", "<tool>"]
    assert got.tokenizer.convert_tokens_to_ids(added) == list(range(size, size + 4))
    assert got.tokenizer.get_vocab().items() >= plain.get_vocab().items()
    assert got.model.config.vocab_size == len(got.tokenizer) == size + 4
    assert set(added) <= set(got.tokenizer.all_special_tokens)
    ids = got.tokenizer("to be<code>or <chat> not<both>").input_ids
    assert got.tokenizer.convert_ids_to_tokens(ids) == [
        *plain.tokenize("to be"),
        "<code>",
        "or",
        "<chat>",
        "not",
        "<both>",
    ]
    assert got.tokenizer.decode(ids, skip_special_tokens=True).split() == "to be or not".split()
    for part in ("embedding", "head"):
        rows, before, (one, two, three) = getattr(got, part), getattr(start, part), [getattr(m, part) for m in models]
        assert torch.equal(rows["<chat>"], one["<chat>"])
        assert torch.equal(rows["<code>"], two["<code>"]) and torch.equal(rows["<tool>"], two["<tool>"])
        assert torch.equal(rows["<both>"], (one["<both>"] + two["<both>"]) / 2)
        words = sorted(plain.get_vocab(), key=plain.get_vocab().get)
        tasks = [torch.stack([(m[word] - before[word]).double() for word in words]) for m in (one, two, three)]
        for word, merged in zip(words, ties(tasks, WEIGHTS, 0.5), strict=True):
            want = before[word].double() + merged
            assert torch.all((rows[word].double() - want).abs() <= 2 * U * (want.abs() + merged.abs()))
    tied_now = got.model.get_input_embeddings().weight.data_ptr() == got.model.get_output_embeddings().weight.data_ptr()
    assert tied_now == tied and ("lm_head.weight" in weights_of(tmp_path / "out")) == (not tied)
    assert got.model(**got.tokenizer("to be <chat>", return_tensors="pt")).logits.isfinite().all()
    before = got.model.get_input_embeddings().weight.clone()
    got.model.resize_token_embeddings(len(got.tokenizer))
    assert torch.equal(got.model.get_input_embeddings().weight, before)
    got.tokenizer.add_tokens(["<late>"])
    assert got.tokenizer.convert_tokens_to_ids("<late>") == size + 4
    got.model.resize_token_embeddings(len(got.tokenizer))
    assert torch.equal(got.model.get_input_embeddings().weight[: size + 4], before)


@torch.no_grad()
def test_llamas_with_padding_and_words_in_another_order(tmp_path):
    """Tokens that took the place of the base's padding stay inside it; words are found at whatever index."""
    plain = make_tokenizer("WordLevel")
    base = save_llama(tmp_path / "base", plain, 0, rows=8)
    chat = save_llama(tmp_path / "chat", make_tokenizer("WordLevel", ["<chat>"]), 1, rows=8)
    code = save_llama(tmp_path / "code", make_tokenizer("WordLevel", ["<code>"], order=[0, 4, 2, 1, 3]), 2, rows=16)
    merge_engine.merge_models(base, [chat, code], tmp_path / "out", method="linear", weights=[0.5, 2.0], vocab="union")
    got, start, one, two = map(opened, (tmp_path / "out", base, chat, code))
    assert got.model.config.vocab_size == 8 and len(got.tokenizer) == 7
    assert got.tokenizer("not <code> to <chat>").input_ids == [4, 6, 1, 5]
    for part in ("embedding", "head"):
        rows, before, first, second = (getattr(each, part) for each in (got, start, one, two))
        for word in WORDS:
            want = before[word] + 0.5 * (first[word] - before[word]) + 2 * (second[word] - before[word])
            assert torch.equal(rows[word], want)
        assert torch.equal(rows["<chat>"], first["<chat>"]) and torch.equal(rows["<code>"], second["<code>"])
    got.model.resize_token_embeddings(len(got.tokenizer))
    assert torch.equal(got.model.get_input_embeddings().weight[5], one.embedding["<chat>"])
