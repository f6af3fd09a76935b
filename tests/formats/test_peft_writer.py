"""Merged adapters as PEFT loads them."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from peft_models import KEY, NAMES, Q0, SCORE, TOY_NAMES, classifier, edit, gpt2, llama, peft_delta, saved, toy
from safetensors.torch import load_file
from torch.nn.functional import pad
from transformers import LlamaForSequenceClassification

from merge_engine.errors import OutputError
from merge_engine.formats.adapter import Adapter
from merge_engine.formats.open import open_adapter
from merge_engine.formats.peft_writer import AdapterWriter

pytestmark = [
    # transformers reads its own deprecated attribute when PEFT asks whether a model checkpoints gradients.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT announces that it saves a targeted embedding's base weight as well.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]


def merged(
    folder: Path, adapters: list[Adapter], ranks: dict[str, int], dtype: torch.dtype = torch.float32, form: str = "one"
) -> dict:
    """Write random factors of the given ranks for every module; the factors that are to be read, by module."""
    modules = {name: module for adapter in adapters for name, module in adapter.modules.items()}
    folder.mkdir()
    writer = AdapterWriter(folder, adapters, modules, dtype, form)
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
    largest = max(len(a) for a, _ in factors.values())
    return factors if form == "own" else {name: with_zeros(*pair, largest) for name, pair in factors.items()}


def with_zeros(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A with rows of zeros below it, B with columns of zeros to its right, as one rank is written."""
    return pad(a, (0, 0, 0, rank - len(a))), pad(b, (0, rank - len(a)))


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


@pytest.mark.parametrize("form", ["one", "own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_peft_loads_every_kind_of_layer_whatever_the_ranks(tmp_path, dtype, form):
    adapter = open_adapter(saved(tmp_path / "a", toy, r=2, lora_alpha=5, use_rslora=True))
    ranks = {"emb": 6, "fc": 5, "block.fc": 1, "layers.1": 3, "layers.11": 2, "conv2d": 4, "conv1d": 1, "conv3d": 3}
    factors = merged(tmp_path / "out", [adapter], ranks, dtype, form)
    assert {t.dtype for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {dtype}
    assert_loads_as(PeftModel.from_pretrained(toy(), tmp_path / "out"), factors)
    again = open_adapter(tmp_path / "out")
    assert {name: module.scaling for name, module in again.modules.items()} == dict.fromkeys(TOY_NAMES, 1.0)
    for name, (a, b) in factors.items():
        assert all(torch.equal(x, y) for x, y in zip(again.factors(name), (a, b), strict=True))


@pytest.mark.quick
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
        path = saved(tmp_path / str(number), gpt2, r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
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


@pytest.mark.quick
@pytest.mark.parametrize("form", ["one", "own"])
def test_the_configuration(tmp_path, form):
    for name in ("one", "two"):
        config = {"task_type": "CAUSAL_LM", "revision": "v2", "lora_dropout": 0.1, "exclude_modules": ["k_proj"]}
        path = saved(
            tmp_path / name, r=4, layers_to_transform=[0, 1], layers_pattern="layers", use_rslora=True, **config
        )
        edit(path, base_model_name_or_path="org/base")
    two = tmp_path / "two"
    edit(two, revision="v3")
    merged(tmp_path / "out", [open_adapter(tmp_path / "one"), open_adapter(two)], {Q0: 6}, form=form)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    own = {r"^(model\.layers\.0\.self_attn\.q_proj)": 6}
    assert config.pop("rank_pattern") == config.pop("alpha_pattern") == (own if form == "own" else {})
    rank = 4 if form == "own" else 6
    assert config == {
        "peft_type": "LORA",
        "base_model_name_or_path": "org/base",
        "task_type": "CAUSAL_LM",
        "revision": None,
        "auto_mapping": None,
        "r": rank,
        "lora_alpha": rank,
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
        "recipe.yaml",
    ]
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["recipe"] == {"method": "linear", "weights": [0.5, 0.5], "seed": 0}
    assert report["modules"][Q0] == {"rank": 6, "kept_energy": 0.5}
    assert report["rank"] == 6
    assert report["modules"].keys() == adapters[0].modules.keys()
    assert report["seconds"] == 1.5
    assert report["versions"].keys() == {"merge-engine", "torch", "safetensors"}

    import yaml

    _, front, card = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "tags": ["lora", "merge", "merge-engine"],
    }
    told = {"method": "linear", "weights": [0.5, 0.5], "space": "delta", "scale": 1.0, "rank": "auto", "ranks": "one"}
    told |= {"dtype": "float32"}
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0]) == told
    sources = {"adapters": [str(tmp_path / name) for name in ("one", "two")]}
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text()) == sources | told
    assert "| one | 0.5 |" in card and str(tmp_path) not in card


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
    try:
        with pytest.raises(OutputError, match=rf"{KEY}.lora_B.weight reaches 7e\+04, which overflows torch.float16"):
            writer.add(Q0, torch.ones(3, 32), torch.full((32, 3), 7e4))
    finally:
        writer.abandon()


def test_a_full_disk_while_the_adapter_is_written(tmp_path):
    adapter = open_adapter(saved(tmp_path / "a", r=4))
    (tmp_path / "adapter_model.safetensors").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"adapter_model.safetensors cannot be written: No space left on device"):
        AdapterWriter(tmp_path, [adapter], adapter.modules, torch.float16)
