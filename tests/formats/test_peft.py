"""Adapters as PEFT saves and loads them: the deltas are PEFT's own, and what cannot be merged is refused by name."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lora_files import save_factors
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from merge_engine.errors import AdapterError, OutputError
from merge_engine.files.locate import is_hub_id
from merge_engine.files.weights import StoredTensor
from merge_engine.formats.adapter import Adapter, shared_extras
from merge_engine.formats.open import open_adapter
from merge_engine.formats.peft_config import KEPT, READ, REFUSED, RESET
from merge_engine.formats.peft_writer import AdapterWriter

pytestmark = [
    # transformers reads its own deprecated attribute when PEFT asks whether a model checkpoints gradients.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT announces that it saves a targeted embedding's base weight as well.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

LLAMA = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}


class Toy(nn.Module):
    """A layer of every kind that can be merged, and names that are each other's ends and beginnings."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.fc = nn.Linear(6, 5)
        self.block = nn.ModuleDict({"fc": nn.Linear(5, 7), "fc2": nn.Linear(7, 5, bias=False)})
        self.layers = nn.ModuleList([nn.Linear(5, 5) for _ in range(12)])
        self.conv1d = nn.Conv1d(3, 4, 3)
        self.conv2d = nn.Conv2d(3, 4, (2, 3), stride=2)
        self.pointwise = nn.Conv2d(3, 4, 1)
        self.conv3d = nn.Conv3d(2, 3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


TOY_NAMES = ["emb", "fc", "block.fc", "block.fc2", "layers.1", "layers.11", "conv1d", "conv2d", "pointwise", "conv3d"]


def toy() -> nn.Module:
    torch.manual_seed(7)
    return Toy()


def llama(kind: type = LlamaForCausalLM) -> nn.Module:
    torch.manual_seed(7)
    return kind(LlamaConfig(**LLAMA))


def gpt2() -> nn.Module:
    torch.manual_seed(7)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=24, n_layer=2, n_head=2))


def trained(base: nn.Module, seed: int = 0, **config: Any) -> PeftModel:
    """A PEFT model whose factors are all random: by default one of the two is zero."""
    model = get_peft_model(base, LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def saved(path: Path, base: nn.Module | None = None, seed: int = 0, **config: Any) -> Path:
    save = {key: config.pop(key) for key in ("safe_serialization", "save_embedding_layers") if key in config}
    config.setdefault("target_modules", ["q_proj", "v_proj"] if base is None else TOY_NAMES)
    trained(base or llama(), seed, **config).save_pretrained(str(path), **save)
    return path


def peft_delta(model: PeftModel, name: str) -> torch.Tensor:
    """PEFT's delta in our layout: [out, in], [dim, num] of an embedding, [out, in * kernel] of a convolution."""
    layer = model.base_model.model.get_submodule(name)
    delta = layer.get_delta_weight("default").detach()
    if "default" in layer.lora_embedding_A or getattr(layer, "fan_in_fan_out", False):
        delta = delta.T
    return delta.flatten(1)


def assert_deltas_are_pefts(adapter: Adapter, model: PeftModel) -> None:
    """Same products of the same numbers, so only the order of the sum over the rank may differ."""
    for name, module in adapter.modules.items():
        a, b = adapter.factors(name)
        assert a.shape == (module.rank, module.columns) and b.shape == (module.rows, module.rank)
        assert a.is_contiguous() and b.is_contiguous() and a.dtype == b.dtype == module.dtype
        exact = module.scaling * b.double() @ a.double()
        bound = (module.rank + 3) * 2**-24 * module.scaling * b.double().abs() @ a.double().abs()
        assert ((peft_delta(model, name).double() - exact).abs() <= bound).all(), name


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def refused(source: Path | str, *, match: str) -> None:
    """Opening says what is wrong, in one line, and changes nothing on the disk."""
    folder = Path(source).parent

    def listing() -> list[tuple[Path, int, int]]:
        found = [(path, path.lstat()) for path in sorted(folder.rglob("*"))] if folder.is_dir() else []
        return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in found]

    before = listing()
    with pytest.raises(AdapterError, match=match) as caught:
        open_adapter(source)
    assert "\n" not in str(caught.value)
    assert listing() == before


Q0 = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q0}"

# --- reading ---


def test_every_field_of_pefts_configuration_is_decided():
    """A field that PEFT adds fails here until someone has decided what it does to a delta."""
    tables = [READ, KEPT, RESET, REFUSED.keys()]
    for field in dataclasses.fields(LoraConfig):
        assert sum(field.name in table for table in tables) == 1, field.name


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"rank_pattern": {"fc": 3, "^layers.1": 2, ".*conv.d": 6}, "alpha_pattern": {"block.*": 5, "emb": 0.75}},
    ],
    ids=["plain", "patterns"],
)
def test_deltas_of_every_kind_of_layer(tmp_path, use_rslora, patterns):
    model = trained(toy(), r=4, lora_alpha=9, use_rslora=use_rslora, target_modules=TOY_NAMES, **patterns)
    model.save_pretrained(tmp_path / "a")
    adapter = open_adapter(tmp_path / "a")
    assert list(adapter.modules) == sorted(TOY_NAMES)
    assert {name: module.kind for name, module in adapter.modules.items() if module.kind != "linear"} == {
        "emb": "embedding",
        **dict.fromkeys(["conv1d", "conv2d", "conv3d", "pointwise"], "conv"),
    }
    assert_deltas_are_pefts(adapter, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_deltas_of_a_language_model_in_its_dtype(tmp_path, dtype):
    saved(tmp_path / "a", r=4, lora_alpha=7, rank_pattern={"layers.1.self_attn.q_proj": 6})
    edit_tensors(tmp_path / "a", lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items()}))
    adapter = open_adapter(tmp_path / "a")
    assert {module.dtype for module in adapter.modules.values()} == {dtype}
    assert adapter.size_bytes == sum(t.nbytes for t in load_file(tmp_path / "a" / "adapter_model.safetensors").values())
    # PEFT loads half factors as float32, so its delta has the precision that the bound asks for.
    assert_deltas_are_pefts(adapter, PeftModel.from_pretrained(llama(), tmp_path / "a"))


def test_deltas_of_layers_that_store_fan_in_first(tmp_path):
    targets = ["c_attn", "c_proj", "c_fc", "wte"]
    model = trained(gpt2(), r=4, lora_alpha=6, fan_in_fan_out=True, target_modules=targets)
    model.save_pretrained(tmp_path / "a")
    adapter = open_adapter(tmp_path / "a")
    module = adapter.modules["transformer.h.0.attn.c_attn"]
    assert (module.rows, module.columns) == (72, 24)  # its base weight is [24, 72]
    assert_deltas_are_pefts(adapter, model)


@pytest.mark.parametrize("config", [{}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal"}])
def test_starts_that_leave_the_base_alone_are_harmless(tmp_path, config):
    model = trained(llama(), r=4, target_modules=["q_proj"], **config)
    model.save_pretrained(tmp_path / "a")
    assert_deltas_are_pefts(open_adapter(tmp_path / "a"), model)


def test_what_is_kept_for_the_backward_pass_only_is_ignored(tmp_path):
    from peft import VeloraConfig

    model = trained(llama(), r=4, target_modules=["q_proj"], velora_config=VeloraConfig(num_groups=4))
    model.save_pretrained(tmp_path / "a")
    assert any("lora_velora" in key for key in load_file(tmp_path / "a" / "adapter_model.safetensors"))
    adapter = open_adapter(tmp_path / "a")
    assert not adapter.extras
    assert_deltas_are_pefts(adapter, model)


NAME_PARTS = ["fc", "fc2", "block", "layers", "1", "11", "q_proj", "a_fc"]
NAMES = st.lists(st.sampled_from(NAME_PARTS), min_size=1, max_size=4).map(".".join)
PATTERN_KEYS = NAMES | st.sampled_from(["^fc", ".*fc", r"block\..*", "^layers.1", "fc|q_proj", "f", r".*\.1\..*", "."])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example({"block.fc"}, {"fc": 2, ".*": 3}, {"block.*": 5, ".*": 6}, False)  # the first that matches decides
@given(
    names=st.sets(NAMES, min_size=1, max_size=6),
    rank_pattern=st.dictionaries(PATTERN_KEYS, st.integers(1, 5), max_size=4),
    alpha_pattern=st.dictionaries(PATTERN_KEYS, st.integers(1, 40) | st.floats(0.5, 40), max_size=4),
    rslora=st.booleans(),
)
def test_patterns_resolve_as_in_peft(tmp_path, names, rank_pattern, alpha_pattern, rslora):
    factors, expected = {}, {}
    for name in names:
        rank = rank_pattern.get(get_pattern_key(rank_pattern.keys(), name), 7)
        alpha = alpha_pattern.get(get_pattern_key(alpha_pattern.keys(), name), 3)
        expected[name] = (rank, alpha / (rank**0.5 if rslora else rank))
        factors[name] = torch.ones(rank, 2), torch.ones(2, rank)
    patterns = {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    save_factors(tmp_path, factors, r=7, lora_alpha=3, use_rslora=rslora, **patterns)
    modules = open_adapter(tmp_path).modules
    assert {name: (module.rank, module.scaling) for name, module in modules.items()} == expected


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


def test_threads_read_the_same_adapter(tmp_path):
    adapter = open_adapter(saved(tmp_path / "a", r=8))
    names = list(adapter.modules) * 50
    alone = {name: adapter.factors(name) for name in adapter.modules}
    with ThreadPoolExecutor(8) as pool:
        for name, (a, b) in zip(names, pool.map(adapter.factors, names), strict=True):
            assert torch.equal(a, alone[name][0]) and torch.equal(b, alone[name][1])


def shard(folder: Path, count: int = 3) -> dict[str, str]:
    """Split the weights as huggingface_hub does; the map of tensors to files."""
    tensors = load_file(folder / "adapter_model.safetensors")
    files = {key: f"adapter_model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, key in enumerate(tensors)}
    for name in set(files.values()):
        save_file({key: tensors[key] for key in tensors if files[key] == name}, folder / name)
    (folder / "adapter_model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": files}
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    return files


def assert_same_factors(one: Adapter, two: Adapter) -> None:
    assert one.modules == two.modules
    for name in one.modules:
        assert all(torch.equal(x, y) for x, y in zip(one.factors(name), two.factors(name), strict=True))


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


# --- the hub ---


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
    """Configuration, weights, and the files that say which tokens were added; a model card or an optimizer is not."""
    wanted = {"adapter_config.json", "adapter_model.safetensors"}
    wanted |= {"tokenizer.json", "tokenizer_config.json", "added_tokens.json"}
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


@pytest.mark.parametrize(
    "source", ["user/repo", "User-1/r.e-p_o", "_user/_repo", "-user/repo", "user/-repo", "user/.repo"]
)
def test_a_hub_id_is_what_the_hub_takes_for_one(source):
    try:
        validate_repo_id(source)
    except HFValidationError:
        assert not is_hub_id(source)
    else:
        assert is_hub_id(source)


# --- bad inputs ---


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


def test_a_full_model(tmp_path):
    llama().save_pretrained(tmp_path / "a")
    refused(tmp_path / "a", match=r"a: .* is a full model \(config.json\), wanted an adapter \(adapter_config.json\)")


def test_missing_parts(tmp_path):
    path = saved(tmp_path / "a", r=4)
    (path / "adapter_model.safetensors").unlink()
    refused(path, match=r"a: .* has no weights, wanted adapter_model.safetensors, .*index.json or adapter_model.bin")
    (path / "adapter_config.json").unlink()
    refused(path, match=r"a: .* has no adapter_config.json")


@pytest.mark.parametrize("text, match", [("{", "cannot be read"), ("[]", "holds a list"), ("\xff", "cannot be read")])
def test_a_damaged_configuration(tmp_path, text, match):
    path = saved(tmp_path / "a", r=4)
    (path / "adapter_config.json").write_text(text, encoding="latin-1")
    refused(path, match=rf"a: adapter_config.json {match}")


def test_a_truncated_file_at_every_kind_of_place(tmp_path):
    path = saved(tmp_path / "a", r=4) / "adapter_model.safetensors"
    whole = path.read_bytes()
    data = 8 + int.from_bytes(whole[:8], "little")
    for size in (0, 1, 7, 8, 9, data - 1, data, data + 1, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path.parent, match=rf"a: adapter_model.safetensors is truncated.*: {size} bytes")
    path.write_bytes(whole + b"x")
    refused(path.parent, match=rf"is damaged: {len(whole) + 1} bytes, wanted {len(whole)} from its header")


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    adapter = open_adapter(saved(tmp_path / "a", r=4))
    path = tmp_path / "a" / "adapter_model.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors ends inside tensor .*, \d+ bytes short"):
        adapter.check_finite()
    path.unlink()
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors cannot be read: No such file"):
        adapter.factors(Q0)


@pytest.mark.parametrize(
    "header, match",
    [
        (b"{", "header of adapter_model.safetensors is damaged"),
        (b"[1]", "header of adapter_model.safetensors is damaged"),
        (b'{"x": 3}', "header of adapter_model.safetensors is damaged"),
        (b'{"x": {"dtype": "F32", "shape": [1]}}', "header of adapter_model.safetensors is damaged"),
        (b'{"x": {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}}', "tensor x is F3, which cannot be read"),
        (b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', r"x has 4 bytes, wanted 8 for \[2\]"),
        (b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}', "is damaged"),
        (b'{"x": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}', "is damaged"),
        (b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "overlap or leave holes"),
    ],
)
def test_a_damaged_header(tmp_path, header, match):
    path = saved(tmp_path / "a", r=4) / "adapter_model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refused(path.parent, match=rf"^a: .*{match}")


@pytest.mark.parametrize("place", ["../a.safetensors", "/etc/a.safetensors", "..", "sub/a.safetensors", "", 3, None])
def test_an_index_that_leads_out_of_its_folder(tmp_path, place):
    path = saved(tmp_path / "a", r=4)
    shutil.copy(path / "adapter_model.safetensors", tmp_path / "a.safetensors")
    files = shard(path)
    files[f"{KEY}.lora_A.weight"] = place
    (path / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    refused(
        path, match=r"a: adapter_model.safetensors.index.json (names .*, wanted a file in the same folder|is damaged)"
    )


def test_an_index_that_disagrees_with_its_files(tmp_path):
    path = saved(tmp_path / "a", r=4)
    index = path / "adapter_model.safetensors.index.json"
    files = shard(path)
    index.write_text(json.dumps({"weight_map": {**files, "more": files[f"{KEY}.lora_A.weight"]}}))
    refused(path, match=r"a: adapter_model-0000\d-of-00003.safetensors lacks tensor more, against .*index.json")
    fewer = {key: file for key, file in files.items() if key != f"{KEY}.lora_A.weight"}
    index.write_text(json.dumps({"weight_map": fewer}))
    refused(path, match=rf"holds the unlisted tensor {KEY}.lora_A.weight")
    index.write_text(json.dumps({"weight_map": files}))
    (path / files[f"{KEY}.lora_A.weight"]).unlink()
    refused(
        path, match=rf"a: {files[f'{KEY}.lora_A.weight']} is missing, wanted by adapter_model.safetensors.index.json"
    )
    index.write_text("{}")
    refused(path, match=r"index.json is damaged: wanted a weight_map")


class Surprise:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("content", [{"x": Surprise()}, b"", b"PK\x03\x04 not really", b"\x80\x02."])
def test_a_bin_file_that_is_damaged_or_runs_code(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "a", r=4, safe_serialization=False) / "adapter_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    refused(path.parent, match=r"a: adapter_model.bin is damaged or holds more than tensors")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "content, match", [([torch.ones(1)], "holds a list"), ({"x": 3}, "x in adapter_model.bin is a int")]
)
def test_a_bin_file_of_something_else(tmp_path, content, match):
    path = saved(tmp_path / "a", r=4, safe_serialization=False) / "adapter_model.bin"
    torch.save(content, path)
    refused(path.parent, match=match)


def test_a_truncated_bin_file(tmp_path):
    path = saved(tmp_path / "a", r=4, safe_serialization=False) / "adapter_model.bin"
    os.truncate(path, path.stat().st_size // 2)
    refused(path.parent, match=r"a: adapter_model.bin is damaged")


@pytest.mark.parametrize("value, name", [(float("nan"), "NaN"), (float("inf"), "Inf"), (float("-inf"), "Inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_values_that_are_not_finite(tmp_path, value, name, dtype):
    path = saved(tmp_path / "a", r=4)
    edit_tensors(path, lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items()}))
    open_adapter(path).check_finite()

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        spoilt = tensors[f"{KEY}.lora_B.weight"].float()
        spoilt[-1, -1] = value
        tensors[f"{KEY}.lora_B.weight"] = spoilt.to(dtype)

    edit_tensors(path, spoil)
    with pytest.raises(
        AdapterError, match=rf"^a: tensor {KEY}.lora_B.weight in .*a/adapter_model.safetensors holds {name}"
    ):
        open_adapter(path).check_finite()


def change_shape(key: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({key: torch.ones(shape)})


@pytest.mark.parametrize(
    "change, match",
    [
        (
            change_shape(f"{KEY}.lora_A.weight", 8, 32),
            rf"a: lora_A of {Q0} is \[8, 32\], wanted rank 4 from adapter_config",
        ),
        (
            change_shape(f"{KEY}.lora_B.weight", 32, 8),
            rf"a: lora_B of {Q0} is \[32, 8\], wanted rank 4 from adapter_config",
        ),
        (change_shape(f"{KEY}.lora_A.weight", 128), rf"a: lora_A of {Q0} is \[128\], wanted a factor of a linear"),
        (change_shape(f"{KEY}.lora_A.weight", 0), rf"a: lora_A of {Q0} is \[0\], wanted a factor of a linear"),
        (change_shape(f"{KEY}.lora_A.weight", 4, 0), rf"a: lora_A of {Q0} is \[4, 0\], wanted a factor of a linear"),
        (change_shape(f"{KEY}.lora_B.weight", 32, 4, 1), rf"a: lora_B of {Q0} is \[32, 4, 1\], wanted a factor"),
        (
            change_shape("model.x.lora_A.weight", 4, 2),
            r"a: tensor model.x.lora_A.weight is unknown, wanted base_model.model",
        ),
        (change_shape("base_model.model.x", 4), r"a: tensor base_model.model.x is unknown"),
        (change_shape(f"{KEY}.lora_A.default.weight", 4, 2), r"a: tensor .*lora_A.default.weight is unknown"),
        (change_shape(f"{KEY}.lora_magnitude_vector", 32), r"a: tensor .*lora_magnitude_vector is DoRA's"),
        (change_shape(f"{KEY}.lora_B.bias", 32), r"a: tensor .*lora_B.bias is a lora_bias"),
        (change_shape(f"{KEY}.lora_embedding_A", 4, 3), rf"a: {Q0} has two A factors"),
        (
            change_shape(f"{KEY}.base_layer.lora_A.weight", 4, 3),
            r"belongs to a nested layer \(torch.nn.MultiheadAttention",
        ),
        (lambda tensors: tensors.pop(f"{KEY}.lora_A.weight"), rf"a: {KEY}.lora_B.weight has no lora_A beside it"),
        (lambda tensors: tensors.pop(f"{KEY}.lora_B.weight"), rf"a: {KEY}.lora_A.weight has no lora_B beside it"),
        (
            lambda tensors: tensors.update({f"{KEY}.lora_embedding_B": tensors.pop(f"{KEY}.lora_B.weight")}),
            rf"a: {Q0} has factors of a linear layer and of an embedding",
        ),
        (lambda tensors: tensors.clear(), r"a: .* holds no LoRA tensors"),
        (
            lambda tensors: tensors.update({f"{KEY}.lora_A.weight": torch.ones(4, 32, dtype=torch.int8)}),
            rf"a: lora_A of {Q0} is \[4, 32\] int8, wanted floating point",
        ),
        (
            lambda tensors: tensors.update({f"{KEY}.lora_A.weight": torch.ones(4, 32, dtype=torch.float16)}),
            rf"a: {Q0} has A in float16 and B in float32, wanted one dtype",
        ),
    ],
)
def test_wrong_tensors(tmp_path, change, match):
    path = saved(tmp_path / "a", r=4)
    edit_tensors(path, change)
    refused(path, match=match)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"r": 8}, r"a: lora_A of .* is \[4, 32\], wanted rank 8 from adapter_config.json"),
        ({"rank_pattern": {"layers.1.self_attn.v_proj": 2}}, r"layers.1.self_attn.v_proj is \[4, 32\], wanted rank 2"),
        ({"rank_pattern": {"(": 2}}, r"a: rank_pattern has '\(', which is no regular expression"),
        (
            {"rank_pattern": {"x": 2.5}},
            r"a: rank_pattern\['x'\] is 2.5 in adapter_config.json, wanted a positive integer",
        ),
        ({"alpha_pattern": {"x": "8"}}, r"a: alpha_pattern\['x'\] is '8' in adapter_config.json, wanted a number"),
        ({"r": 0}, r"a: r is 0 in adapter_config.json, wanted a positive integer"),
        ({"r": True}, r"a: r is True in adapter_config.json, wanted a positive integer"),
        ({"lora_alpha": float("nan")}, r"a: lora_alpha is nan in adapter_config.json, wanted a number"),
        ({"lora_alpha": None}, r"a: lora_alpha is None in adapter_config.json, wanted a number"),
        ({"rank_pattern": [3]}, r"a: rank_pattern is \[3\] in adapter_config.json, wanted a dict"),
        ({"modules_to_save": "score"}, r"a: modules_to_save is 'score' in adapter_config.json, wanted a list"),
        ({"peft_type": "ADALORA"}, r"a: peft_type is ADALORA, wanted LORA"),
        ({"use_dora": True}, r"a: use_dora is set in adapter_config.json; DoRA rescales the base weight"),
        ({"lora_bias": True}, r"a: lora_bias is set in adapter_config.json; its bias is not part of the delta"),
        ({"bias": "lora_only"}, r"a: bias is set in adapter_config.json; biases of the base model were trained"),
        ({"target_parameters": ["w"]}, r"a: target_parameters is set"),
        ({"layer_replication": [[0, 2]]}, r"a: layer_replication is set"),
        ({"alora_invocation_tokens": [1]}, r"a: alora_invocation_tokens is set"),
        ({"use_qalora": True}, r"a: use_qalora is set"),
        ({"use_bdlora": {"nblocks": 2}}, r"a: use_bdlora is set"),
        ({"arrow_config": {"top_k": 3}}, r"a: arrow_config is set"),
        ({"kasa_config": {"beta": 1}}, r"a: kasa_config is set"),
        ({"monteclora_config": {"num_samples": 8}}, r"a: monteclora_config is set"),
        ({"megatron_config": {"x": 1}}, r"a: megatron_config is set"),
        ({"init_lora_weights": "pissa_niter_16"}, r"a: init_lora_weights is pissa_niter_16, which changed the base"),
        ({"init_lora_weights": "OLoRA"}, r"a: init_lora_weights is OLoRA, which changed the base"),
        ({"init_lora_weights": "corda"}, r"path_initial_model_for_weight_conversion to make it a plain LoRA"),
        ({"init_lora_weights": "loftq"}, r"a: init_lora_weights is loftq"),
        ({"init_lora_weights": "lora_ga"}, r"a: init_lora_weights is lora_ga"),
    ],
)
def test_wrong_configurations(tmp_path, changes, match):
    path = saved(tmp_path / "a", r=4)
    edit(path, **changes)
    refused(path, match=match)


@pytest.mark.parametrize(
    "config", [{"use_dora": True}, {"bias": "all"}, {"lora_bias": True}, {"init_lora_weights": "pissa"}]
)
@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor")  # PEFT takes a lora_bias for a damaged factor
def test_variants_that_peft_really_saved(tmp_path, config):
    path = saved(tmp_path / "a", toy(), r=4, target_modules=["fc"], **config)
    refused(path, match=rf"a: {next(iter(config))} is ")
    if "init_lora_weights" not in config:
        edit(path, use_dora=False, bias="none", lora_bias=False)
        refused(path, match=r"a: tensor .* is (DoRA's|a lora_bias|unknown)")


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")  # PEFT loads the start beside the result
def test_a_converted_pissa_adapter_is_a_plain_one(tmp_path):
    """What the refusal advises: PEFT rewrites the adapter relative to the unchanged base."""
    base = llama()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) / 4)
    x = torch.arange(8)[None]
    wanted = model(x).logits
    model.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    adapter = open_adapter(tmp_path / "a")
    fresh = llama()
    with torch.no_grad():
        for name, module in adapter.modules.items():
            a, b = adapter.factors(name)
            fresh.get_submodule(name).weight += module.scaling * b @ a
        # float32 noise through two layers of weights of order 1; the delta itself moves the logits by far more.
        assert (fresh(x).logits - wanted).abs().max() < 1e-4
        assert (llama()(x).logits - wanted).abs().max() > 1e-2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


def test_convolutions_in_groups(tmp_path):
    base = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3, groups=2)})
    with pytest.warns(UserWarning, match="groups > 1"):
        path = saved(tmp_path / "a", base, r=4, target_modules=["conv"])
    refused(
        path, match=r"a: lora_B of conv is \[6, 2, 1, 1\] at rank 4: a convolution in 2 groups, which cannot be merged"
    )


def test_an_unknown_field_is_mentioned(tmp_path, caplog):
    path = saved(tmp_path / "a", r=4)
    edit(path, use_future_lora=True, use_other_lora=False)
    open_adapter(path)
    assert [record.getMessage() for record in caplog.records] == [
        "a: use_future_lora in adapter_config.json is not known and ignored"
    ]


# --- tensors beside the factors ---

SCORE = "base_model.model.score.weight"


def classifier(path: Path, seed: int = 0, **config: Any) -> Path:
    config = {"r": 4, "task_type": "SEQ_CLS", "target_modules": ["q_proj"], **config}
    return saved(path, llama(LlamaForSequenceClassification), seed, **config)


def test_trained_heads_are_extras(tmp_path):
    one = open_adapter(classifier(tmp_path / "one"))
    assert list(one.extras) == [SCORE]
    assert torch.equal(one.extras[SCORE].read(), load_file(tmp_path / "one" / "adapter_model.safetensors")[SCORE])
    assert list(shared_extras([one, open_adapter(classifier(tmp_path / "two"))])) == [SCORE]
    assert shared_extras([open_adapter(saved(tmp_path / "plain", r=4))]) == {}


@pytest.mark.parametrize(
    "change, match",
    [
        (
            lambda t: t.update({SCORE: t[SCORE] + 1}),
            rf"^{SCORE} differs between one and two; such tensors cannot be merged",
        ),
        (
            lambda t: t.update({SCORE: torch.ones(3, 32)}),
            rf"^{SCORE} differs: one has \[2, 32\] float32, two has \[3, 32\] float32",
        ),
        (lambda t: t.update({SCORE: t[SCORE].half()}), rf"^{SCORE} differs: one has .* float32, two has .* float16"),
        (lambda t: t.pop(SCORE), rf"^one has {SCORE} but two has not; such tensors cannot be merged"),
    ],
)
def test_extras_that_differ_are_refused(tmp_path, change, match):
    one = open_adapter(classifier(tmp_path / "one"))
    edit_tensors(classifier(tmp_path / "two"), change)
    two = open_adapter(tmp_path / "two")
    with pytest.raises(AdapterError, match=match):
        shared_extras([one, two])
    with pytest.raises(AdapterError, match=SCORE):
        AdapterWriter(tmp_path, [two, one], one.modules, torch.float32)
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_a_head_that_is_not_finite(tmp_path):
    edit_tensors(classifier(tmp_path / "a"), lambda tensors: tensors[SCORE][0].fill_(float("nan")))
    with pytest.raises(AdapterError, match=rf"a: tensor {SCORE} in .* holds NaN"):
        open_adapter(tmp_path / "a").check_finite()


def test_trained_tokens(tmp_path):
    for name, indices in (("one", [1, 5]), ("two", [1, 5]), ("three", [1, 6])):
        saved(tmp_path / name, r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": indices})
    one, two, three = (open_adapter(tmp_path / name) for name in ("one", "two", "three"))
    assert list(one.extras) == ["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    assert shared_extras([one, two]) == one.extras
    with pytest.raises(AdapterError, match="trainable_token_indices differ between one and three"):
        shared_extras([one, three])


def test_frozen_copies_of_an_embedding_need_not_be_everywhere(tmp_path):
    """PEFT saves the base weight of a targeted embedding; an adapter without that target has none: no conflict."""
    one = open_adapter(saved(tmp_path / "one", r=4, target_modules=["q_proj", "embed_tokens"]))
    two = open_adapter(saved(tmp_path / "two", r=4))
    copy = "base_model.model.model.embed_tokens.base_layer.weight"
    assert list(shared_extras([two, one])) == list(shared_extras([one, two])) == [copy]
    edit_tensors(saved(tmp_path / "other", r=4, target_modules=["embed_tokens"]), lambda tensors: tensors[copy].add_(1))
    with pytest.raises(AdapterError, match=rf"^{copy} differs between one and other"):
        shared_extras([one, two, open_adapter(tmp_path / "other")])


def test_resized_embeddings(tmp_path):
    base = llama()
    base.resize_token_embeddings(66)
    one = open_adapter(saved(tmp_path / "one", base, r=4, target_modules=["q_proj"], save_embedding_layers=True))
    assert sorted(one.extras) == ["base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"]
    with pytest.raises(AdapterError, match="but two has not"):
        shared_extras([one, open_adapter(saved(tmp_path / "two", r=4))])


def test_tied_heads_are_refused(tmp_path):
    path = classifier(tmp_path / "a")
    edit(path, ensure_weight_tying=True)
    refused(path, match=rf"a: ensure_weight_tying with saved layers \({SCORE}\) is not supported")


# --- writing ---


def merged(folder: Path, adapters: list[Adapter], ranks: dict[str, int], dtype: torch.dtype = torch.float32) -> dict:
    """Write random factors of the given ranks for every module; the factors, by module."""
    modules = {name: module for adapter in adapters for name, module in adapter.modules.items()}
    folder.mkdir()
    writer = AdapterWriter(folder, adapters, modules, dtype)
    generator = torch.Generator().manual_seed(3)
    factors = {}
    for name in sorted(modules, key=lambda name: name[::-1]):
        rank = ranks.get(name, 4)
        a = torch.randn(rank, modules[name].columns, generator=generator)
        b = torch.randn(modules[name].rows, rank, generator=generator)
        writer.add(name, a, b)
        factors[name] = (a.to(dtype), b.to(dtype))
    recipe = {"method": "linear", "weights": [0.5] * len(adapters), "seed": 0}
    writer.finish(recipe, {"modules": {name: {"kept_energy": 0.5} for name in modules}, "seconds": 1.5})
    return factors


def assert_loads_as(model: PeftModel, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Exactly these factors, with scaling 1, in exactly these layers."""
    layers = {name: layer for name, layer in model.base_model.model.named_modules() if isinstance(layer, LoraLayer)}
    assert layers.keys() == factors.keys()
    for name, layer in layers.items():
        a, b = factors[name]
        assert layer.scaling["default"] == 1.0
        assert layer.r["default"] == len(a)
        embedding = "default" in layer.lora_embedding_A
        got_a = layer.lora_embedding_A["default"] if embedding else layer.lora_A["default"].weight
        got_b = layer.lora_embedding_B["default"] if embedding else layer.lora_B["default"].weight
        assert torch.equal(got_a.detach().flatten(1), a.float()), name
        assert torch.equal(got_b.detach().flatten(1), b.float()), name
        exact = b.double() @ a.double()
        bound = (len(a) + 3) * 2**-24 * b.double().abs() @ a.double().abs()
        assert ((peft_delta(model, name).double() - exact).abs() <= bound).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_peft_loads_every_kind_of_layer_whatever_the_ranks(tmp_path, dtype):
    adapter = open_adapter(saved(tmp_path / "a", toy(), r=2, lora_alpha=5, use_rslora=True))
    ranks = {"emb": 6, "fc": 5, "block.fc": 1, "layers.1": 3, "layers.11": 2, "conv2d": 4, "conv1d": 1, "conv3d": 3}
    factors = merged(tmp_path / "out", [adapter], ranks, dtype)
    assert {t.dtype for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {dtype}
    assert_loads_as(PeftModel.from_pretrained(toy(), tmp_path / "out"), factors)
    again = open_adapter(tmp_path / "out")
    assert {name: module.scaling for name, module in again.modules.items()} == dict.fromkeys(TOY_NAMES, 1.0)
    for name, (a, b) in factors.items():
        assert all(torch.equal(x, y) for x, y in zip(again.factors(name), (a, b), strict=True))


def test_adapters_that_cover_different_modules(tmp_path):
    one = open_adapter(saved(tmp_path / "one", r=4, target_modules=["q_proj", "embed_tokens"]))
    two = open_adapter(saved(tmp_path / "two", r=8, target_modules=["q_proj", "up_proj"], layers_to_transform=[1]))
    ranks = {Q0: 12, "model.layers.1.mlp.up_proj": 32, "model.embed_tokens": 32}
    factors = merged(tmp_path / "out", [one, two], ranks)
    assert set(factors) == {*one.modules, "model.layers.1.mlp.up_proj"}
    assert_loads_as(PeftModel.from_pretrained(llama(), tmp_path / "out"), factors)


@pytest.mark.parametrize("flags", [(True, True), (True, False), (False, False)])
def test_layers_that_store_fan_in_first_load_whatever_the_flags(tmp_path, flags):
    """The delta does not depend on the flag; where it is wrong for a layer PEFT corrects it, with a warning."""
    adapters = []
    for number, flag in enumerate(flags):
        path = saved(tmp_path / str(number), gpt2(), r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
        edit(path, fan_in_fan_out=flag)
        adapters.append(open_adapter(path))
    factors = merged(tmp_path / "out", adapters, {"transformer.h.0.attn.c_attn": 9})
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"] is any(flags)
    if any(flags):
        assert_loads_as(PeftModel.from_pretrained(gpt2(), tmp_path / "out"), factors)
    else:
        with pytest.warns(UserWarning, match="Setting fan_in_fan_out to True"):
            assert_loads_as(PeftModel.from_pretrained(gpt2(), tmp_path / "out"), factors)


def test_heads_are_carried_over(tmp_path):
    adapters = [open_adapter(classifier(tmp_path / name)) for name in ("one", "two")]
    factors = merged(tmp_path / "out", adapters, {Q0: 7})
    model = PeftModel.from_pretrained(llama(LlamaForSequenceClassification), tmp_path / "out")
    assert_loads_as(model, factors)
    head = model.base_model.model.score.modules_to_save["default"].weight
    assert torch.equal(head.detach(), adapters[0].extras[SCORE].read())
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["score"]
    assert config["task_type"] == "SEQ_CLS"


def test_trained_tokens_are_carried_over(tmp_path):
    tokens = {"embed_tokens": [1, 5]}
    for name in ("one", "two"):
        saved(tmp_path / name, r=4, target_modules=["q_proj"], trainable_token_indices=tokens)
    adapters = [open_adapter(tmp_path / name) for name in ("one", "two")]
    factors = merged(tmp_path / "out", adapters, {})
    model = PeftModel.from_pretrained(llama(), tmp_path / "out")
    assert_loads_as(model, factors)
    delta = model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"]
    assert torch.equal(delta.detach(), next(iter(adapters[0].extras.values())).read())


def test_the_configuration(tmp_path):
    for name in ("one", "two"):
        config = {"task_type": "CAUSAL_LM", "revision": "v2", "lora_dropout": 0.1, "exclude_modules": ["k_proj"]}
        path = saved(
            tmp_path / name, r=4, layers_to_transform=[0, 1], layers_pattern="layers", use_rslora=True, **config
        )
        edit(path, base_model_name_or_path="org/base")
    two = tmp_path / "two"
    edit(two, revision="v3")
    merged(tmp_path / "out", [open_adapter(tmp_path / "one"), open_adapter(two)], {Q0: 6})
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config.pop("rank_pattern") == config.pop("alpha_pattern") == {r"^(model\.layers\.0\.self_attn\.q_proj)": 6}
    assert config == {
        "peft_type": "LORA",
        "base_model_name_or_path": "org/base",
        "task_type": "CAUSAL_LM",
        "revision": None,
        "auto_mapping": None,
        "r": 4,
        "lora_alpha": 4,
        "target_modules": [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"],
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranks=st.dictionaries(NAMES | st.sampled_from(["a+b", "a.b", "aXb", "(", "é"]), st.integers(1, 4), min_size=1),
    others=st.sets(NAMES, max_size=5),
)
def test_patterns_match_their_own_modules_only(tmp_path, ranks, others):
    from merge_engine.formats.peft_writer import adapter_config

    config = adapter_config([Adapter("a", "a", tmp_path, {}, {}, {}, {})], ranks)
    for name in {*ranks, *others, *(f"x.{name}" for name in ranks), *(f"{name}.x" for name in ranks)}:
        for patterns, default in (
            (config["rank_pattern"], config["r"]),
            (config["alpha_pattern"], config["lora_alpha"]),
        ):
            assert patterns.get(get_pattern_key(patterns.keys(), name), default) == ranks.get(name, config["r"])


def test_the_report_and_the_card(tmp_path):
    adapters = [open_adapter(saved(tmp_path / name, r=4)) for name in ("one", "two")]
    for adapter in adapters:
        adapter.config["base_model_name_or_path"] = "org/base"
    merged(tmp_path / "out", adapters, {Q0: 6})
    assert sorted(os.listdir(tmp_path / "out")) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "merge_report.json",
    ]
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["recipe"] == {"method": "linear", "weights": [0.5, 0.5], "seed": 0}
    assert report["modules"][Q0] == {"rank": 6, "kept_energy": 0.5}
    assert report["modules"].keys() == adapters[0].modules.keys()
    assert report["seconds"] == 1.5
    assert report["versions"].keys() == {"merge-engine", "torch", "safetensors"}

    import yaml

    _, front, card = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "org/base",
        "library_name": "peft",
        "tags": ["lora", "merge", "merge-engine"],
    }
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0]) == report["recipe"]
    assert f"| {tmp_path / 'one'} | 0.5 |" in card


def test_factors_of_a_wrong_shape_or_name(tmp_path):
    adapter = open_adapter(saved(tmp_path / "a", r=4))
    writer = AdapterWriter(tmp_path, [adapter], adapter.modules, torch.float32)
    with pytest.raises(ValueError, match=rf"{Q0}: factors are \[3, 32\] and \[32, 4\], wanted \[k, 32\] and \[32, k\]"):
        writer.add(Q0, torch.ones(3, 32), torch.ones(32, 4))
    with pytest.raises(ValueError, match=r"factors are \[0, 32\]"):
        writer.add(Q0, torch.ones(0, 32), torch.ones(32, 0))
    with pytest.raises(ValueError, match="nothing: this module was not planned"):
        writer.add("nothing", torch.ones(3, 32), torch.ones(32, 3))
    writer.add(Q0, torch.ones(3, 32), torch.ones(32, 3))
    with pytest.raises(ValueError, match="added twice"):
        writer.add(Q0, torch.ones(3, 32), torch.ones(32, 3))
    with pytest.raises(ValueError, match="planned tensors never came"):
        writer.finish({}, {})
    writer.abandon()


def test_values_that_the_dtype_does_not_hold(tmp_path):
    adapter = open_adapter(saved(tmp_path / "a", r=4))
    writer = AdapterWriter(tmp_path, [adapter], adapter.modules, torch.float16)
    with pytest.raises(OutputError, match=rf"{KEY}.lora_B.weight reaches 7e\+04, which torch.float16 does not hold"):
        writer.add(Q0, torch.ones(3, 32), torch.full((32, 3), 7e4))
    writer.abandon()


def test_a_full_disk_while_the_adapter_is_written(tmp_path):
    adapter = open_adapter(saved(tmp_path / "a", r=4))
    (tmp_path / "adapter_model.safetensors").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"adapter_model.safetensors cannot be written: No space left on device"):
        AdapterWriter(tmp_path, [adapter], adapter.modules, torch.float16)
