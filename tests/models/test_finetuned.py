"""Full models beside their base: which fit, and which of their tensors are one."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tuned_models import change, save_model, weights_of

import merge_engine
from merge_engine.errors import MergeError
from merge_engine.formats.checkpoint import open_checkpoint
from merge_engine.models.vocabulary import vocabulary_keys


@pytest.mark.parametrize("save", [torch.save, save_file])
def test_shared_weights_stay_shared(tmp_path, save):
    def shared(seed):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(17, 12, generator=generator)
        head = weight if save is torch.save else weight.clone()
        return {"lm_head.weight": head, "model.embed_tokens.weight": weight, "x": torch.ones(3) * seed}

    options = {"save": save, "tie_word_embeddings": save is save_file}
    base = save_model(tmp_path / "base", 0, tensors=shared(0), **options)
    models = [save_model(tmp_path / str(i), 0, tensors=shared(i), **options) for i in (1, 2)]
    result = merge_engine.merge_models(base, models, tmp_path / "out", method="dare_ties", density=0.5)
    got = weights_of(tmp_path / "out")
    assert torch.equal(got["lm_head.weight"], got["model.embed_tokens.weight"])
    assert not torch.equal(got["lm_head.weight"], shared(0)["lm_head.weight"])
    assert result.merged == 3


def poisoned(value):
    tensor = torch.zeros(12, 12)
    tensor[3, 4] = value
    return tensor


@pytest.mark.quick
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__norm__weight": None}, "base has tensor model.norm.weight but chat does not"),
        ({"model__extra__weight": torch.zeros(2)}, "chat has tensor model.extra.weight but base does not"),
        ({"model__norm__weight": torch.zeros(13)}, "chat: model.norm.weight is [13], wanted [12] as in base"),
        ({"model__positions": torch.arange(6) + 1}, "chat: model.positions is torch.int64 and differs from base"),
        (
            {"model__norm__weight": torch.zeros(12).int()},
            "chat: model.norm.weight is torch.int32, wanted torch.bfloat16",
        ),
        ({"model__layers__0__q_proj__weight": poisoned(float("nan"))}, "chat: tensor model.layers.0.q_proj.weight in "),
        (
            {"model__layers__0__q_proj__weight": poisoned(float("-inf"))},
            "chat: tensor model.layers.0.q_proj.weight in ",
        ),
    ],
)
def test_models_that_do_not_fit(base, three, tmp_path, changes, message):
    change(three[0], **changes)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(MergeError) as error:
        merge_engine.merge_models(base, three, tmp_path / "out")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_a_head_that_was_trained_apart_is_no_copy(base, tmp_path, save):
    """Of a base that has its head tied and saved: the head of a model is that copy too, or it is refused."""
    tensors = weights_of(base)
    head = tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    copied = tensors if save is torch.save else {**tensors, "lm_head.weight": head.clone()}
    save_model(tmp_path / "tied", 0, tensors=copied, save=save, tie_word_embeddings=True)
    same = {**tensors, "model.embed_tokens.weight": head + 1, "lm_head.weight": head + 1}
    save_model(tmp_path / "same", 0, tensors={key: tensor.clone() for key, tensor in same.items()})
    save_model(tmp_path / "apart", 0, tensors={**tensors, "lm_head.weight": head + 1})
    merge_engine.merge_models(tmp_path / "tied", [tmp_path / "same"], tmp_path / "out", method="linear")
    got = weights_of(tmp_path / "out")
    assert torch.equal(got["lm_head.weight"], head + 1) and torch.equal(got["model.embed_tokens.weight"], head + 1)
    wanted = r"^apart: (lm_head|model\.embed_tokens)\.weight differs from \S+\.weight, to which tied ties it$"
    with pytest.raises(MergeError, match=wanted):
        merge_engine.merge_models(tmp_path / "tied", [tmp_path / "apart"], tmp_path / "no", method="linear")


@pytest.mark.parametrize("of_base", [True, False])
def test_a_tied_head_may_be_saved_by_one_of_them(base, tmp_path, of_base):
    tensors = weights_of(base)
    head = tensors.pop("lm_head.weight")
    embedding = tensors["model.embed_tokens.weight"]
    tuned = {**tensors, "model.embed_tokens.weight": embedding + 1}
    for name, values, saves in (("tied", tensors, of_base), ("tuned", tuned, not of_base)):
        copy = {"lm_head.weight": values["model.embed_tokens.weight"].clone()} if saves else {}
        save_model(tmp_path / name, 0, tensors={**values, **copy}, tie_word_embeddings=True)
    merge_engine.merge_models(tmp_path / "tied", [tmp_path / "tuned"], tmp_path / "out", method="linear")
    got = weights_of(tmp_path / "out")
    assert got.keys() == weights_of(tmp_path / "tied").keys()
    assert torch.equal(got["model.embed_tokens.weight"], embedding + 1)
    assert not of_base or torch.equal(got["lm_head.weight"], embedding + 1)
    save_model(tmp_path / "untied", 0, tensors={**tuned, "lm_head.weight": head})
    other = save_model(tmp_path / "bare", 0, tensors=tensors, tie_word_embeddings=True)
    for pair in ((other, tmp_path / "untied"), (tmp_path / "untied", other)):
        with pytest.raises(MergeError, match=r"^untied has tensor lm_head\.weight but bare does not$"):
            merge_engine.merge_models(pair[0], [pair[1]], tmp_path / "no", method="linear")


def test_a_head_that_only_one_of_them_declares_tied_is_no_copy(base, tmp_path):
    tensors = weights_of(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_model(tmp_path / "tied", 0, tensors=tensors, tie_word_embeddings=True)
    del tensors["lm_head.weight"]
    save_model(tmp_path / "untied", 0, tensors=tensors, tie_word_embeddings=False)
    for one, other in (("tied", "untied"), ("untied", "tied")):
        with pytest.raises(MergeError, match=r"^tied has tensor lm_head\.weight but untied does not$"):
            merge_engine.merge_models(tmp_path / one, [tmp_path / other], tmp_path / "no", method="linear")


def test_an_added_vocabulary_is_named(base, three, tmp_path):
    def tokenizer(folder, words, added):
        vocabulary = {word: number for number, word in enumerate(words)}
        entries = [{"id": len(words) + i, "content": token} for i, token in enumerate(added)]
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": entries}))

    tokenizer(base, ["a", "b"], [])
    tokenizer(three[0], ["a", "b"], ["<|im_start|>", "<|im_end|>"])
    bigger = {key: torch.zeros(19, 12) for key in ("model__embed_tokens__weight", "lm_head__weight")}
    change(three[0], **bigger)
    with pytest.raises(MergeError) as error:
        merge_engine.merge_models(base, three, tmp_path / "out")
    first = vocabulary_keys(open_checkpoint(base))[0]
    assert str(error.value) == (
        f"vocabularies differ: base has 17 tokens; chat has 19 rows in {first} (added: <|im_start|>, <|im_end|>)"
    )
