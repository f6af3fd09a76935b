"""Tokenizers of recipes: whose tokens the output has, and where their rows come from; beside mergekit, too."""

import json

import pytest
import torch
from safetensors.torch import load_file
from toy_vocabularies import entry, make_tokenizer, numbered, opened, save_llama, save_toy

from merge_engine.errors import ModelError, RecipeError
from merge_engine.mergekit.recipe import merge_recipe

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """base with a row of padding; code has <b> and <a> at other indices; old lacks <or>."""
    monkeypatch.chdir(tmp_path)
    save_toy(tmp_path / "base", numbered("to", "be", "or"), 4)
    save_toy(tmp_path / "chat", numbered("to", "be", "or", "<a>"), 4, seed=1)
    save_toy(tmp_path / "code", numbered("to", "be", "or", "<b>", "<a>"), 6, seed=2)
    save_toy(tmp_path / "old", {"to": 1, "be": 0, "<c>": 2}, 3, seed=3)
    return tmp_path


def asked(*names, method="task_arithmetic", base="base", **keys):
    models = [{"model": name, "parameters": {"weight": 1.0}} for name in names]
    return {"merge_method": method, "models": models, **({"base_model": base} if base else {}), **keys}


def rows(folder, key=EMBEDDING):
    tokens = json.loads((folder / "tokenizer.json").read_text())
    held = tokens["model"]["vocab"] | {each["content"]: each["id"] for each in tokens["added_tokens"]}
    tensor = load_file(folder / "model.safetensors")[key]
    return {token: tensor[index] for token, index in held.items()}, tensor


def test_a_union_gives_each_model_what_the_others_say_of_a_token_that_it_lacks(toys):
    recipe = asked("chat", "code", tokenizer_source="union")
    merge_recipe(recipe, "out")
    base, chat, code = (rows(toys / name)[0] for name in ("base", "chat", "code"))
    got, tensor = rows(toys / "out")
    assert set(got) == {"to", "be", "or", "<a>", "<b>"} and len(tensor) == 5
    assert torch.equal(got["to"], chat["to"] + code["to"] - base["to"])
    assert torch.equal(got["<b>"], code["<b>"])  # its only model
    mean = (chat["<a>"] + code["<a>"]) / 2  # what the base takes
    assert torch.equal(got["<a>"], mean + (chat["<a>"] - mean) + (code["<a>"] - mean))
    assert json.loads((toys / "out" / "config.json").read_text())["vocab_size"] == 5
    assert len(load_file(toys / "out" / "model.safetensors")["lm_head.bias"]) == 5


def test_the_bases_tokens_and_those_of_a_model(toys):
    base, chat, code, old = (rows(toys / name)[0] for name in ("base", "chat", "code", "old"))
    merge_recipe(asked("code", "old", tokenizer_source="base"), "one")
    got, tensor = rows(toys / "one")
    assert set(got) == {"to", "be", "or"} and len(tensor) == 3
    assert torch.equal(got["to"], code["to"] + old["to"] - base["to"])
    assert torch.equal(got["or"], code["or"])  # old takes the base's row
    merge_recipe(asked("code", "chat", tokenizer={"source": "code"}), "two")
    got, _ = rows(toys / "two")
    assert list(got) == list(code)
    assert torch.equal(got["<b>"], code["<b>"]) and torch.equal(got["be"], code["be"] + chat["be"] - base["be"])


def test_rows_that_a_recipe_asks_for(toys):
    tokens = {
        "<a>": {"source": "code", "force": True},
        "<new>": {"source": {"kind": "model_token", "model": "chat", "token": "be"}},
        "<id>": {"source": {"kind": "model_token", "model": "code", "token_id": 5}},
        "<zero>": {"source": {"kind": "zero"}},
    }
    recipe = asked("chat", "code", tokenizer={"source": "union", "tokens": tokens, "pad_to_multiple_of": 16})
    merge_recipe(recipe, "out")
    got, tensor = rows(toys / "out")
    chat, code = rows(toys / "chat")[0], rows(toys / "code")[0]
    assert torch.equal(got["<a>"], code["<a>"]) and torch.equal(got["<new>"], chat["be"])
    assert torch.equal(got["<id>"], rows(toys / "code")[1][5]) and not got["<zero>"].any()
    assert len(tensor) == 16 and torch.equal(tensor[8], tensor[15])
    with pytest.raises(ModelError, match=r"^chat: wanted the token <b> for the row of <new>, got none"):
        source = {"kind": "model_token", "model": "chat", "token": "<b>"}
        merge_recipe(asked("chat", "code", tokenizer={"tokens": {"<new>": {"source": source}}}), "other")


def test_without_a_tokenizer_rows_have_to_fit(toys):
    with pytest.raises(ModelError, match=r"^vocabularies differ: base has 4 tokens; code has 6 rows"):
        merge_recipe(asked("code"), "out")
    with pytest.raises(ModelError, match=r"^base: .* is \[4.*\], wanted \[6.*\] .*; a tokenizer in the recipe"):
        merge_recipe({"merge_method": "karcher", "models": [{"model": "code"}, {"model": "base"}]}, "out")


def test_a_chat_template(toys):
    for name, template in (
        ("base", "{{ a }} and others"),
        ("chat", "{{ b }} and others"),
        ("code", "{{ b }} and others"),
    ):
        (toys / name / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    for number, (said, want) in enumerate(
        [("auto", "{{ b }} and others"), ("chatml", "<|im_start|>"), ("{% for m in messages %}x{% endfor %}", "for m")]
    ):
        merge_recipe(asked("chat", "code", tokenizer_source="union", chat_template=said), f"out{number}")
        held = json.loads((toys / f"out{number}" / "tokenizer_config.json").read_text())["chat_template"]
        assert want in held and (toys / f"out{number}" / "chat_template.jinja").read_text() == held
    with pytest.raises(RecipeError, match=r"^recipe: chat_template: wanted auto, one of alpaca, .*, got 'chatlm'"):
        merge_recipe(asked("chat", "code", chat_template="chatlm", tokenizer_source="union"), "bad")


def test_a_token_is_added_as_its_model_has_it(toys):
    merge_recipe(asked("code", tokenizer_source="union"), "out")
    added = json.loads((toys / "out" / "tokenizer.json").read_text())["added_tokens"]
    assert added == [entry(3, "<b>"), entry(4, "<a>")]


@pytest.mark.filterwarnings("ignore")  # of mergekit's dependencies
@pytest.mark.parametrize("source", ["union", "base", "two", "padded"])
def test_mergekit_gives_every_token_the_same_row(tmp_path, monkeypatch, source):
    pytest.importorskip("mergekit")
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    LoaderCache().loaders.clear()
    monkeypatch.chdir(tmp_path)
    for seed, (name, added) in enumerate([("base", []), ("one", ["<a>", "<b>"]), ("two", ["<b>", "<c>"])]):
        save_llama(tmp_path / name, make_tokenizer("BPE", added), seed)
    tokenizer = {"source": source}
    if source == "padded":
        tokens = {"<b>": {"source": "two", "force": True}, "<new>": {"source": {"kind": "zero"}}}
        tokenizer = {"source": "union", "tokens": tokens, "pad_to_multiple_of": 8}
    recipe = asked("one", "two", tokenizer=tokenizer, dtype="float32", parameters={"lambda": 0.75})
    run_merge(MergeConfiguration.model_validate(recipe), "theirs", MergeOptions(quiet=True, write_model_card=False))
    merge_recipe(recipe, "ours")
    ours, theirs = opened("ours"), opened("theirs")
    assert set(ours.embedding) == set(theirs.embedding)
    for token in ours.embedding:
        for layer in ("embedding", "head"):
            torch.testing.assert_close(getattr(ours, layer)[token], getattr(theirs, layer)[token], rtol=0, atol=2e-6)
    assert len(ours.model.lm_head.weight) == len(theirs.model.lm_head.weight)
    text = "to be <b> or not <c> bento"
    said = [each.tokenizer.convert_ids_to_tokens(each.tokenizer(text)["input_ids"]) for each in (ours, theirs)]
    assert said[0] == said[1]
