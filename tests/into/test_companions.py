"""What lies beside the weights of a merged model: shards' index, configuration, card and report."""

import json

import torch
from safetensors.torch import load_file
from toy_models import WEIGHTS, bytes_of, weights_of

import merge_engine


def test_shards_and_what_lies_beside_them(base, three, tmp_path):
    merge_engine.merge_into(base, three, tmp_path / "one", weights=WEIGHTS)
    merge_engine.merge_into(base, three, tmp_path / "many", weights=WEIGHTS, shard_size=900)
    one, many = tmp_path / "one", tmp_path / "many"
    beside = {"config.json", "tokenizer.json", "chat_template.jinja", "modeling_toy.py", "README.md"}
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
    for source, named in ((base, []), ("org/base", ["base_model: org/base"])):
        merge_engine.merge_into(source, three, tmp_path / "out", overwrite=True)
        front = (tmp_path / "out" / "README.md").read_text().split("---\n")[1]
        assert [line for line in front.splitlines() if line.startswith("base_model")] == named
