"""lora_bias: against PEFT's own forward pass, the textbook on vectors, and PEFT's merge into the base."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_files import STEM, save_factors
from peft import PeftModel
from peft_models import saved, toy
from safetensors.torch import load_file, save_file
from torch import nn

import merge_engine
from merge_engine.errors import AdapterError, MergeError, RecipeError
from merge_engine.formats.open import open_adapter
from merge_engine.rules import reference
from merge_engine.rules.rule import make_rule

# PEFT says of every bias that it saves that it has an invalid shape.
pytestmark = pytest.mark.filterwarnings("ignore:.*have invalid shape.*lora_B.bias:peft.utils.warning.PeftWarning")
LAYERS = ["fc", "block.fc", "conv2d"]
INPUTS = {"fc": (3, 6), "block.fc": (3, 5), "conv2d": (2, 3, 4, 5)}
WEIGHTS = [0.9, -0.4, 1.3]


def three(tmp_path):
    """With a bias, one with another rank and alpha, and one without."""
    configs = [
        {"r": 3, "lora_alpha": 6, "lora_bias": True},
        {"r": 2, "lora_alpha": 5, "lora_bias": True, "use_rslora": True},
        {"r": 3, "lora_alpha": 3},
    ]
    return [
        saved(tmp_path / str(number), toy, number, target_modules=LAYERS, **config)
        for number, config in enumerate(configs)
    ]


def outputs(folder=None):
    """{layer: what it gives for a fixed input}, of the toy model, with an adapter loaded by PEFT."""
    model = toy() if folder is None else PeftModel.from_pretrained(toy(), folder).base_model.model
    generator = torch.Generator().manual_seed(5)
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in INPUTS.items()}
    with torch.no_grad():
        return {name: model.get_submodule(name)(x).double() for name, x in inputs.items()}


@pytest.mark.quick
@pytest.mark.parametrize("recipe", [{"method": "linear"}, {"method": "cat"}, {"method": "linear", "ranks": "own"}])
def test_layers_give_the_weighted_sum_of_what_the_adapters_add(tmp_path, recipe):
    folders = three(tmp_path)
    merge_engine.merge(folders, tmp_path / "out", weights=WEIGHTS, **recipe)
    start, each, got = outputs(), [outputs(folder) for folder in folders], outputs(tmp_path / "out")
    for name, y in start.items():
        want = y + sum(weight * (own[name] - y) for weight, own in zip(WEIGHTS, each, strict=True))
        torch.testing.assert_close(got[name], want, rtol=0, atol=2e-6 * float(want.abs().max()))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_bias"] is True and config["target_modules"] == sorted(LAYERS)


def biases(folder):
    """{layer: s b}, as PEFT stores and scales it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    stored = load_file(folder / "adapter_model.safetensors")
    return {
        key.removeprefix(STEM).removesuffix(".lora_B.bias"): scaling * tensor.double()
        for key, tensor in stored.items()
        if key.endswith(".bias")
    }


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "ties", "density": 0.5},
        {"method": "magnitude_prune", "density": 0.3},
        {"method": "elect_max"},
        {"method": "ties", "density": 0.5, "convention": "mergekit"},
    ],
)
def test_a_bias_is_merged_as_a_tensor_of_its_own(tmp_path, recipe):
    folders = three(tmp_path)
    merge_engine.merge(folders, tmp_path / "out", weights=WEIGHTS, **recipe)
    tasks = {}
    for number, folder in enumerate(folders):
        for name, bias in biases(folder).items():
            tasks.setdefault(name, {})[number] = bias[None]
    rule = make_rule(recipe["method"], convention=recipe.get("convention", "peft"))
    want = reference.merge_model(tasks, WEIGHTS, {name: [recipe.get("density", 0.2)] * 3 for name in tasks}, rule)
    got = biases(tmp_path / "out")
    assert got.keys() == want.keys() == set(LAYERS)
    for name, bias in got.items():
        torch.testing.assert_close(bias, want[name][0], rtol=0, atol=1e-6 * float(want[name].abs().max()))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    alphas=st.lists(st.sampled_from([None, 1, 2.5, 16]), min_size=4, max_size=4),
    rows=st.integers(1, 9),
    seed=st.integers(0, 10**6),
)
def test_biases_add_up_whatever_ranks_and_alphas_are(tmp_path_factory, ranks, alphas, rows, seed):
    """Of a missing lora_alpha PEFT takes 8."""
    root, generator = tmp_path_factory.mktemp("biases"), torch.Generator().manual_seed(seed)
    folders, want, total = [], torch.zeros(rows, dtype=torch.float64), 0.0
    for number, (rank, alpha) in enumerate(zip(ranks, alphas, strict=False)):
        factors = {"fc": (torch.randn(rank, 5, generator=generator), torch.randn(rows, rank, generator=generator))}
        bias = torch.randn(rows, generator=generator)
        config = {"lora_bias": True, **({} if alpha is None else {"lora_alpha": alpha})}
        folder = save_factors(root / str(number), factors, {f"{STEM}fc.lora_B.bias": bias}, **config)
        if alpha is None:
            values = json.loads((folder / "adapter_config.json").read_text())
            del values["lora_alpha"]
            (folder / "adapter_config.json").write_text(json.dumps(values))
        scaling, weight = (8 if alpha is None else alpha) / rank, 0.5 - 0.3 * number
        want += weight * scaling * bias.double()
        total += abs(weight * scaling) * float(bias.abs().max())
        folders.append(folder)
    weights = [0.5 - 0.3 * number for number in range(len(ranks))]
    result = merge_engine.merge(folders, method="linear", weights=weights).modules["fc.bias"]
    torch.testing.assert_close((result.B.double() @ result.A.double())[0], want, rtol=0, atol=8 * 2**-24 * total)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_into_a_base_as_peft_merges_and_unloads(tmp_path, method):
    folder = three(tmp_path)[0]
    base = toy()
    (tmp_path / "base").mkdir()
    save_file({key: t.contiguous() for key, t in base.state_dict().items()}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    merge_engine.merge_into(tmp_path / "base", [folder], tmp_path / "out", method=method, density=1.0)
    want = PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        torch.testing.assert_close(got[key], tensor, rtol=0, atol=1e-6 * float(tensor.abs().max()), msg=key)
    assert not torch.equal(got["fc.bias"], toy().state_dict()["fc.bias"])


def test_what_is_refused(tmp_path):
    folders = three(tmp_path)
    for recipe, message in (
        ({"method": "tsv"}, r"^method: 0 has lora_bias, which is a vector; wanted one of linear, cat, .*, got tsv"),
        ({"space": "core"}, r"^space: 0 has lora_bias, which is a vector; wanted delta, got core"),
        ({"balance": "pico"}, r"^balance: 0 has lora_bias, which is a vector; wanted none, got pico"),
    ):
        with pytest.raises(RecipeError, match=message):
            merge_engine.merge(folders, tmp_path / "no", **recipe)
    embedding = saved(tmp_path / "emb", toy, target_modules=["emb"])
    with pytest.raises(AdapterError, match=r"^0 has lora_bias, and emb adapts emb; PEFT loads no adapter with lora_b"):
        merge_engine.merge([folders[0], embedding], tmp_path / "no", method="linear")
    assert not (tmp_path / "no").exists()
    factors = {"fc": (torch.ones(2, 3), torch.ones(4, 2))}
    wrong = save_factors(tmp_path / "wrong", factors, {f"{STEM}fc.lora_B.bias": torch.ones(3)})
    with pytest.raises(AdapterError, match=r"^wrong: \S+fc\.lora_B\.bias is \[3\], wanted \[4\]"):
        open_adapter(wrong)
    bare = nn.Linear(6, 5, bias=False)
    (tmp_path / "base").mkdir()
    save_file({"fc.weight": bare.weight.detach()}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    alone = saved(tmp_path / "alone", toy, target_modules="fc", lora_bias=True)
    with pytest.raises(MergeError, match=r"^alone: wanted tensor fc\.bias in base for module fc\.bias, got none"):
        merge_engine.merge_into(tmp_path / "base", [alone], tmp_path / "no", method="linear")
