"""Adapters opened from folders and from the hub."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft_models import KEY, Q0, assert_same_factors, edit, llama, refused, saved, shard

from merge_engine.errors import AdapterError
from merge_engine.files.weights import StoredTensor
from merge_engine.formats.open import open_adapter


def test_opening_reads_no_tensor(tmp_path, monkeypatch):
    saved(tmp_path / "a", r=4)
    # A header that promises 512 GB, over a file with a hole of that size: nothing but the header can have been read.
    header = {
        f"{KEY}.lora_A.weight": {"dtype": "F32", "shape": [4, 2**35], "data_offsets": [0, 2**39]},
        f"{KEY}.lora_B.weight": {"dtype": "F32", "shape": [8, 4], "data_offsets": [2**39, 2**39 + 128]},
    }
    encoded = json.dumps(header).encode()
    with open(tmp_path / "a" / "adapter_model.safetensors", "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + 2**39 + 128)
    monkeypatch.setattr(StoredTensor, "read", lambda self: pytest.fail("a tensor was read"))
    assert open_adapter(tmp_path / "a").modules[Q0].columns == 2**35


def test_an_adapter_is_called_by_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(saved(tmp_path / "sql", r=4))
    assert open_adapter(".").name == open_adapter(Path("../sql/")).name == "sql"


@pytest.mark.quick
def test_sharded_weights(tmp_path):
    whole = open_adapter(saved(tmp_path / "whole", r=4))
    saved(tmp_path / "shards", r=4)
    shard(tmp_path / "shards")
    assert_same_factors(open_adapter(tmp_path / "shards"), whole)


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_weights(tmp_path, zipped):
    whole = open_adapter(saved(tmp_path / "whole", r=4))
    path = saved(tmp_path / "bin", r=4, safe_serialization=False) / "adapter_model.bin"
    assert not (tmp_path / "bin" / "adapter_model.safetensors").exists()
    if not zipped:
        torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    adapter = open_adapter(tmp_path / "bin")
    assert_same_factors(adapter, whole)
    a, _ = adapter.factors(Q0)
    a.zero_()  # what a caller does with its copy does not reach the file's mapping
    assert_same_factors(adapter, whole)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An offline cache in the hub's own layout: blobs, and a snapshot of links to them."""
    from huggingface_hub import constants

    root = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def publish(repo: str, folder: Path, commit: str = "0123456789abcdef0123456789abcdef01234567") -> None:
        place = root / f"models--{repo.replace('/', '--')}"
        snapshot = place / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (place / "blobs").mkdir()
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(commit)
        for file in folder.iterdir():
            shutil.copy(file, place / "blobs" / file.name)
            (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))

    return publish


def test_an_adapter_from_the_hub(tmp_path, hub):
    whole = open_adapter(saved(tmp_path / "whole", r=4))
    hub("user/repo-1", tmp_path / "whole")
    adapter = open_adapter("user/repo-1")
    assert (adapter.name, adapter.source) == ("repo-1", "user/repo-1")
    assert_same_factors(adapter, whole)
    assert_same_factors(open_adapter("user/repo-1", revision="0123456789abcdef0123456789abcdef01234567"), whole)


def test_a_sharded_adapter_from_the_hub(tmp_path, hub):
    whole = open_adapter(saved(tmp_path / "whole", r=4))
    saved(tmp_path / "shards", r=4)
    shard(tmp_path / "shards")
    hub("user/shards", tmp_path / "shards")
    assert_same_factors(open_adapter("user/shards"), whole)


def test_what_is_fetched_from_the_hub(tmp_path, repositories):
    """Configuration, weights, and the files that say which tokens were added and which licence; an optimizer is not."""
    wanted = {"adapter_config.json", "adapter_model.safetensors"}
    wanted |= {"tokenizer.json", "tokenizer_config.json", "added_tokens.json", "README.md"}
    repositories["user/repo"] = saved(tmp_path / "whole", r=4)
    for name in (*wanted, "optimizer.pt", "training_args.bin", "checkpoint-9/adapter_model.safetensors"):
        (tmp_path / "whole" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "whole" / name).open("a").close()
    assert {file.name for file in open_adapter("user/repo").path.iterdir()} == wanted
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    (tmp_path / "full" / "model.safetensors").write_text("")
    repositories["user/full"] = tmp_path / "full"
    with pytest.raises(AdapterError, match=r"^full: .* is a full model \(config.json\), wanted an adapter"):
        open_adapter("user/full")
    assert [file.name for file in (tmp_path / "hub" / "user" / "full").iterdir()] == ["config.json"]


def test_a_folder_wins_over_the_hub(tmp_path, hub, monkeypatch):
    saved(tmp_path / "whole", r=4)
    hub("user/repo", tmp_path / "whole")
    saved(tmp_path / "user" / "repo", r=2)
    monkeypatch.chdir(tmp_path)
    assert open_adapter("user/repo").modules[Q0].rank == 2


def test_what_the_hub_does_not_have(hub):
    refused("user/nothing", match=r"^user/nothing is no local folder and could not be fetched from the hub: \w+")


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nowhere", "nowhere", "a/b/c", "user/..", "../nowhere", "é/a"])
def test_a_source_that_is_neither_folder_nor_hub_id(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match=r"does not exist, wanted a folder with adapter_config.json or a hub id"):
        open_adapter(source)


def test_a_file_is_no_adapter(tmp_path):
    path = saved(tmp_path / "a", r=4) / "adapter_model.safetensors"
    refused(path, match=r"adapter_model.safetensors is a file, wanted a folder with adapter_config.json")


def test_an_empty_folder(tmp_path):
    (tmp_path / "a").mkdir()
    refused(tmp_path / "a", match=r"a: .* is empty, wanted adapter_config.json")


@pytest.mark.quick
def test_a_full_model(tmp_path):
    llama().save_pretrained(tmp_path / "a")
    refused(tmp_path / "a", match=r"a: .* is a full model \(config.json\), wanted an adapter \(adapter_config.json\)")


def test_missing_parts(tmp_path):
    path = saved(tmp_path / "a", r=4)
    (path / "adapter_model.safetensors").unlink()
    refused(path, match=r"a: .* has no weights, wanted adapter_model.safetensors, .*index.json or adapter_model.bin")
    (path / "adapter_config.json").unlink()
    refused(path, match=r"a: .* has no adapter_config.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.dictionaries(
        st.sampled_from([field.name for field in dataclasses.fields(LoraConfig)]), JSON, max_size=3
    ),
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3),
    cut=st.none() | st.integers(0, 400),
)
def test_damage_is_an_adapter_error_or_nothing(tmp_path, changes, flips, cut):
    if not (tmp_path / "whole").exists():
        saved(tmp_path / "whole", r=4)
    shutil.copytree(tmp_path / "whole", tmp_path / "a", dirs_exist_ok=True)
    edit(tmp_path / "a", **changes)
    weights = bytearray((tmp_path / "a" / "adapter_model.safetensors").read_bytes())
    for place, byte in flips:
        weights[place] = byte
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(weights[:cut])
    try:
        open_adapter(tmp_path / "a").check_finite()
    except AdapterError as error:
        assert "\n" not in str(error)
