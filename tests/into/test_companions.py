"""What lies beside the weights of a merged model: shards' index, configuration, card and report."""

import json

import pytest
import torch
from safetensors.torch import load_file
from toy_models import WEIGHTS, bytes_of, weights_of
from toy_vocabularies import entry, numbered, report_of, rewrite, save_toy, union_folder

import merge_engine


@pytest.mark.quick
def test_shards_and_what_lies_beside_them(base, three, tmp_path):
    merge_engine.merge_into(base, three, tmp_path / "one", weights=WEIGHTS)
    merge_engine.merge_into(base, three, tmp_path / "many", weights=WEIGHTS, shard_size=900)
    one, many = tmp_path / "one", tmp_path / "many"
    beside = {"config.json", "tokenizer.json", "chat_template.jinja", "modeling_toy.py", "README.md", "recipe.yaml"}
    assert set(bytes_of(one)) == {*beside, "merge_report.json", "model.safetensors"}
    shards = sorted(path.name for path in many.glob("model-*.safetensors"))
    assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 2
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    whole, parts = weights_of(one), weights_of(many)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in whole.values())
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    for shard in shards:
        assert sum(t.numel() * t.itemsize for t in load_file(many / shard).values()) <= 900
    assert (one / "config.json").read_bytes() == (base / "config.json").read_bytes()
    report = json.loads((one / "merge_report.json").read_text())
    assert report["recipe"]["weights"] == WEIGHTS and report["inputs"] == [str(path) for path in three]
    card = (one / "README.md").read_text()
    assert "method: ties" in card and "module_" not in card
    assert {path.name for path in tmp_path.iterdir()} == {"base", "sql", "chat", "ads", "one", "many"}


def test_the_card_names_a_base_of_the_hub(base, three, tmp_path, repositories):
    """Its front matter, that is: the hub takes no local path there."""
    repositories["org/base"] = base
    for source, named in ((base, []), ("org/base", ["base_model: org/base", "base_model_relation: merge"])):
        merge_engine.merge_into(source, three, tmp_path / "out", overwrite=True)
        front = (tmp_path / "out" / "README.md").read_text().split("---\n")[1]
        assert [line for line in front.splitlines() if line.startswith("base_model")] == named


def test_every_tokenizer_file_tells_of_the_added_tokens(toys):
    """As transformers 4 saves them; what else they hold stays, and the card and the report list the tokens."""
    base, models = toys
    decoder = {"0": {key: value for key, value in entry(0, "to").items() if key != "id"}}
    rewrite(base, "tokenizer_config.json", added_tokens_decoder=decoder, model_max_length=9, pad_token="to")
    rewrite(base, "special_tokens_map.json", additional_special_tokens=["be"], pad_token="to")
    rewrite(base, "added_tokens.json", to=0)
    rewrite(models[1], "added_tokens.json", **{"<plain>": 5})  # nothing more is known of it
    out = union_folder(toys)
    config, special, added, whole = (
        json.loads((out / name).read_text())
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")
    )
    assert config["model_max_length"] == 9 and config["additional_special_tokens"] == ["<a>", "<b>"]
    assert list(config["added_tokens_decoder"]) == ["0", "3", "4", "5"]
    assert config["added_tokens_decoder"]["4"] == {key: value for key, value in entry(4, "<b>").items() if key != "id"}
    assert special == {"additional_special_tokens": ["be", "<a>", "<b>"], "pad_token": "to"}
    assert added == {"to": 0, "<a>": 3, "<b>": 4, "<plain>": 5}
    assert whole["added_tokens"] == [entry(3, "<a>"), entry(4, "<b>"), entry(5, "<plain>", special=False)]
    assert whole["model"] == json.loads((base / "tokenizer.json").read_text())["model"]
    assert report_of(out)["added_tokens"] == {"<a>": 3, "<b>": 4, "<plain>": 5}
    card = (out / "README.md").read_text()
    assert "vocab: union" in card and '| `"<b>"` | 4 |' in card


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"text_config": {"vocab_size": 1}}, {"text_config": {"vocab_size": 2}}),
        ({"vocab_size": 1, "text_config": {"vocab_size": 7}}, {"vocab_size": 2, "text_config": {"vocab_size": 7}}),
    ],
    ids=["inside", "another inside"],
)
def test_vocabularies_inside_a_part_of_the_configuration(tmp_path, before, after):
    """What is as long as the embeddings grows with them, and no other vocabulary."""
    folders = [
        save_toy(tmp_path / str(i), numbered("to", *added), 1 + len(added), seed=i)
        for i, added in enumerate([[], ["<a>"]])
    ]
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        del config["vocab_size"]
        (folder / "config.json").write_text(json.dumps(config | before))
    merge_engine.merge_models(folders[0], folders[1:], tmp_path / "out", vocab="union")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"tie_word_embeddings": False, **after}


def test_more_added_tokens_than_a_card_can_list(tmp_path):
    names = [f"<|{number}`|>" for number in range(70)]
    base = save_toy(tmp_path / "base", numbered("to"), 1)
    tuned = save_toy(tmp_path / "tuned", numbered("to", *names), 71, seed=1)
    card = (union_folder((base, [tuned])) / "README.md").read_text()
    assert '| `"<\\u007c63\\u0060\\u007c>"` | 64 |' in card and "and 6 more, listed in" in card
    assert report_of(tmp_path / "out")["added_tokens"] == {name: 1 + i for i, name in enumerate(names)}
