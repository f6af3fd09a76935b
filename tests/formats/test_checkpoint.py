"""Full models on disk: what is read, and what is refused."""

import json
import struct

import pytest
import torch
from lora_files import save_factors
from safetensors.torch import save_file

import merge_engine
from merge_engine.errors import MergeError, ModelError
from merge_engine.formats.checkpoint import open_checkpoint

KEYS = ("model.layers.0.q_proj.weight", "lm_head.weight")


def save_model(folder, name="model.safetensors", save=save_file):
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    save({key: torch.randn(6, 4, generator=generator) for key in KEYS}, folder / name)
    (folder / "config.json").write_text('{"vocab_size": 6, "tie_word_embeddings": false}')
    return folder


def save_adapter(folder):
    return save_factors(folder, {"model.layers.0.q_proj": (torch.ones(2, 4), torch.ones(6, 2))})


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


FILES = {
    "the header is longer than the file": (raw({}, length=10**9), "is truncated or damaged"),
    "the header is longer than any memory": (raw({}, length=2**63), "is truncated or damaged"),
    "offsets overlap": (
        raw({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, bytes(6)),
        "tensors overlap or leave holes",
    ),
    "a key twice": (
        raw(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
            bytes(2),
        ),
        "names a twice",
    ),
    "a billion elements": (raw({"a": entry([10**9], 0, 4 * 10**9)}, bytes(8)), "is truncated: "),
    "a billion elements in no bytes": (
        raw({"a": entry([10**9, 10**9], 0, 4)}, bytes(4)),
        "has 4 bytes, wanted 4000000",
    ),
    "a negative shape": (raw({"a": entry([-1, -1], 0, 4)}, bytes(4)), "is damaged"),
    "deep nesting": (raw(b"[" * 100_000), "is damaged"),
}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("sharded", [False, True])
def test_malicious_weights(tmp_path, case, sharded):
    data, message = FILES[case]
    base, adapter = save_model(tmp_path / "base"), save_adapter(tmp_path / "sql")
    (base / "model.safetensors").unlink()
    (base / ("shard.safetensors" if sharded else "model.safetensors")).write_bytes(data)
    if sharded:
        index = {"weight_map": {"a": "shard.safetensors", "b": "shard.safetensors"}}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MergeError, match=message) as error:
        merge_engine.merge_into(base, [adapter], tmp_path / "out")
    assert "\n" not in str(error.value) and str(error.value).startswith("base: ")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "sql"}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            '{"weight_map": {"a": "../model.safetensors"}}',
            r"names '\.\./model\.safetensors', wanted a file in the same",
        ),
        ('{"weight_map": {"a": "/etc/passwd"}}', "names '/etc/passwd', wanted a file in the same folder"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "names a twice"),
        ('{"weight_map": 3}', "wanted a weight_map"),
        ("{", "wanted a weight_map"),
        ('{"weight_map": {"a": "missing"}}', "missing is missing"),
    ],
)
def test_malicious_indexes(tmp_path, index, message):
    base, adapter = save_model(tmp_path / "base"), save_adapter(tmp_path / "sql")
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(index)
    with pytest.raises(MergeError, match=message):
        merge_engine.merge_into(base, [adapter], tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "sql"}


@pytest.mark.parametrize("config", [{"vocab_size": "5"}, {"vocab_size": -1}, {"text_config": {"vocab_size": True}}])
def test_a_number_of_tokens_that_is_none(tmp_path, config):
    base = save_model(tmp_path / "base")
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"^base: vocab_size is .* in config\.json, wanted a number of tokens"):
        open_checkpoint(base)


def test_a_link_that_leads_out_of_a_base_is_not_copied(tmp_path):
    (tmp_path / "secret").write_text("mine")
    base = save_model(tmp_path / "base")
    (base / "tokenizer.model").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=r"^base: \S+tokenizer\.model is a link to \S+secret, outside of its folder"):
        open_checkpoint(base).companions()
    adapter = save_adapter(tmp_path / "sql")
    with pytest.raises(ModelError, match="outside of its folder"):
        merge_engine.merge_into(base, [adapter], tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "secret", "sql"}
    (base / "tokenizer.model").unlink()
    (base / "tokenizer.model").symlink_to("config.json")
    assert "tokenizer.model" in open_checkpoint(base).companions()


def test_links_of_the_hubs_cache_are_copied(tmp_path):
    for name in ("snapshots", "blobs"):
        (tmp_path / "models--user--base" / name).mkdir(parents=True)
    snapshot = save_model(tmp_path / "models--user--base" / "snapshots" / "abc")
    (tmp_path / "models--user--base" / "blobs" / "1").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/1")
    assert "tokenizer.json" in open_checkpoint(snapshot).companions()


@pytest.mark.parametrize("text", ["not JSON", "[1]", "[" * 100_000, ""])
def test_malicious_configurations(tmp_path, text):
    base = save_model(tmp_path / "base")
    (base / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"^base: config\.json "):
        open_checkpoint(base)


def test_a_bin_file_with_more_elements_than_bytes(tmp_path):
    base = save_model(tmp_path / "base", "pytorch_model.bin", torch.save)
    torch.save({"a": torch.zeros(1).expand(10**9)}, base / "pytorch_model.bin")
    with pytest.raises(MergeError, match=r"^base: a in pytorch_model\.bin is \[1000000000\], more than the file has"):
        open_checkpoint(base)
    torch.save({"a": print}, base / "pytorch_model.bin")
    with pytest.raises(MergeError, match="is damaged or holds more than tensors"):
        open_checkpoint(base)


@pytest.mark.quick
def test_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    for source, message in [
        (tmp_path / "none", "does not exist"),
        (tmp_path / "empty", r"has no config\.json"),
        (save_adapter(tmp_path / "sql"), "is an adapter"),
        (save_model(tmp_path / "other", "weights.safetensors"), "has no weights, wanted model.safetensors, "),
    ]:
        with pytest.raises(ModelError, match=message):
            open_checkpoint(source)


@pytest.mark.quick
def test_companions_are_no_weights(tmp_path):
    base = save_model(tmp_path / "base")
    wanted = {"tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja"}
    wanted |= {"generation_config.json", "modeling_x.py", "LICENSE.md", "additional_chat_templates/tool.jinja"}
    (base / "additional_chat_templates").mkdir()
    for name in [*wanted, "tokenizer.bin", "consolidated.00.pth", "README.md", "x.gguf", ".env", "training_args.bin"]:
        (base / name).write_text("x")
    assert set(open_checkpoint(base).companions()) == wanted


def test_a_model_from_the_hub(tmp_path, repositories):
    """Weights in safetensors if there are any, else those of torch.save; and what else makes a model of them."""
    repositories["org/model-1"] = save_model(tmp_path / "model")
    names = {"config.json", "tokenizer.json", "additional_chat_templates/tool.jinja", "README.md"}
    for name in (*names, "pytorch_model.bin", "original/model.safetensors"):
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).open("a").close()

    def fetched(model):
        return {str(file.relative_to(model.path)) for file in model.path.rglob("*") if file.is_file()}

    model = open_checkpoint("org/model-1", revision="main")
    assert (model.name, model.source) == ("model-1", "org/model-1") and fetched(model) == {*names, "model.safetensors"}
    repositories["org/bin"] = save_model(tmp_path / "bin", "pytorch_model.bin", torch.save)
    model = open_checkpoint("org/bin")
    assert fetched(model) == {"config.json", "pytorch_model.bin"} and list(model.tensors) == list(KEYS)
    with pytest.raises(ModelError, match=r"^org/none is no local folder and could not be fetched from the hub: "):
        open_checkpoint("org/none")
    with pytest.raises(ModelError, match=r"config.json is a file, wanted a folder with config.json$"):
        open_checkpoint(tmp_path / "bin" / "config.json")


def test_shared_weights_of_a_bin_file(tmp_path):
    base = save_model(tmp_path / "base")
    (base / "model.safetensors").unlink()
    weight = torch.randn(6, 4)
    torch.save({"a.weight": weight, "b.weight": weight, "c.weight": weight.clone()}, base / "pytorch_model.bin")
    assert open_checkpoint(base).twins == {"b.weight": "a.weight"}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("config", "ties"),
    [
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, True),
        ({"text_config": {"tie_word_embeddings": True}, "decoder": {"tie_word_embeddings": False}}, True),
        ({"tie_word_embeddings": None, "decoder": {"tie_word_embeddings": True}}, True),
        ({}, False),
    ],
)
def test_the_whole_model_says_first_whether_its_embeddings_are_tied(tmp_path, config, ties):
    (save_model(tmp_path / "a") / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(tmp_path / "a").ties_embeddings == ties


@pytest.mark.quick
@pytest.mark.parametrize("differs", [False, True])
def test_a_head_is_tied_to_the_embedding_that_has_its_bits(tmp_path, differs):
    folder = save_model(tmp_path / "a")
    embedding = torch.arange(24.0).view(6, 4)
    head = embedding.clone()
    head[-1, -1] += differs
    save_file({"lm_head.weight": head, "model.embed_tokens.weight": embedding}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"tie_word_embeddings": true}')
    twins = open_checkpoint(folder).twins
    assert twins == ({} if differs else {"lm_head.weight": "model.embed_tokens.weight"})
