"""Small models with LoRA adapters as PEFT trains and saves them, and adapters in folders, damaged on purpose."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from merge_engine.errors import AdapterError
from merge_engine.formats.adapter import Adapter
from merge_engine.formats.open import open_adapter

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


def llama_classifier() -> nn.Module:
    return llama(LlamaForSequenceClassification)


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


_folder = tempfile.TemporaryDirectory(prefix="saved_by_peft_")
_saved: dict[str, Path] = {}


def saved(path: Path, base: nn.Module | Callable[[], nn.Module] = llama, seed: int = 0, **config: Any) -> Path:
    """The folder with an adapter as PEFT saves it: a copy, where a test has had the same one before.

    base: a model, or a function that makes one.
    """
    config.setdefault("target_modules", TOY_NAMES if base is toy else ["q_proj", "v_proj"])
    if isinstance(base, nn.Module):
        return _save(path, base, seed, config)
    key = repr((base.__name__, seed, config))
    if key not in _saved:
        _saved[key] = _save(Path(_folder.name, str(len(_saved))), base(), seed, config)
    shutil.copytree(_saved[key], path, dirs_exist_ok=True)
    return path


def _save(path: Path, base: nn.Module, seed: int, config: dict[str, Any]) -> Path:
    of_saving = {key: config[key] for key in ("safe_serialization", "save_embedding_layers") if key in config}
    of_lora = {key: value for key, value in config.items() if key not in of_saving}
    trained(base, seed, **of_lora).save_pretrained(str(path), **of_saving)
    return path


SCORE = "base_model.model.score.weight"


def classifier(path: Path, seed: int = 0, **config: Any) -> Path:
    config = {"r": 4, "task_type": "SEQ_CLS", "target_modules": ["q_proj"], **config}
    return saved(path, llama_classifier, seed, **config)


Q0 = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q0}"


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


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


def assert_same_factors(one: Adapter, two: Adapter) -> None:
    assert one.modules == two.modules
    for name in one.modules:
        assert all(torch.equal(x, y) for x, y in zip(one.factors(name), two.factors(name), strict=True))


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


NAME_PARTS = ["fc", "fc2", "block", "layers", "1", "11", "q_proj", "a_fc"]
NAMES = st.lists(st.sampled_from(NAME_PARTS), min_size=1, max_size=4).map(".".join)
