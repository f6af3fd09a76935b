"""What an error advises, done: PEFT converts what is said to convert, and the result is merged."""

import copy
import json

import peft
import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft_models import edit, refused, saved
from safetensors.torch import save_file
from torch import nn

import merge_engine
from merge_engine.formats.open import open_adapter
from merge_engine.formats.ways_out import OTHER_METHODS, STARTS, way_out

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, about shapes of a model this small
OPTIONS = {
    "VBLORA": {"vector_length": 8},
    "FOURIERFT": {"n_frequency": 5},
    "C3A": {"block_size": 8},
    "WAVEFT": {"n_frequency": 5},
    "GRALORA": {"r": 4},
    "PSOFT": {"r": 4},
    "ADALORA": {"total_step": 10},
    "MISS": {"r": 4},
    "BOFT": {"boft_block_size": 4},
    "OFT": {"oft_block_size": 4, "r": 0},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "IA3": {"feedforward_modules": []},
}
TO_LORA = [name for name, text in OTHER_METHODS.items() if "save_as_lora" in text]
INTO_BASE = [name for name, text in OTHER_METHODS.items() if "merge_and_unload" in text and name != "LN_TUNING"]


class Two(nn.Module):
    """Two linear layers of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x))


def adapted(method):
    """(the base, the model with an adapter of random values)."""
    torch.manual_seed(0)
    base = Two()
    config = PEFT_TYPE_TO_CONFIG_MAPPING[method](target_modules=["one", "two"], **OPTIONS.get(method, {}))
    model = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return base, model.eval()


@pytest.mark.parametrize("method", TO_LORA)
def test_what_is_said_to_convert_does(tmp_path, method):
    """By the function that the error names; the LoRA gives the adapter's outputs, and is merged."""
    base, model = adapted(method)
    x = torch.randn(3, 16)
    with torch.no_grad():
        wanted = model(x)
        model.save_pretrained(tmp_path / "own")
        refused(tmp_path / "own", match=rf"^own: peft_type is {method}, wanted LORA; .*peft.save_as_lora\(path, model")
        peft.save_as_lora(tmp_path / "lora", model, rank=16)
        merge_engine.merge([tmp_path / "lora"], tmp_path / "merged", method="linear")
        got = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "merged").eval()(x)
        assert (got - wanted).abs().max() <= 2e-5 * wanted.abs().max() < (base(x) - wanted).abs().max()


@pytest.mark.parametrize("method", INTO_BASE)
def test_what_is_said_to_go_into_its_base_does(method):
    """PEFT has merge_and_unload for it, and no conversion."""
    _, model = adapted(method)
    x = torch.randn(3, 16)
    with pytest.raises((TypeError, ValueError)):
        peft.convert_to_lora(model, rank=16)
    with torch.no_grad():
        wanted = model(x)
        whole = model.merge_and_unload()
        assert type(whole) is Two and (whole(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_model_with_an_adapter_in_it_is_merged_with_an_adapter(tmp_path):
    """AdaLoRA, by the way that its error names."""
    base, model = adapted("ADALORA")
    change = {
        name: layer.get_delta_weight("default").detach() for name, layer in (("one", model.one), ("two", model.two))
    }
    whole = model.merge_and_unload()
    for folder, each in (("base", base), ("tuned", whole)):
        (tmp_path / folder).mkdir()
        save_file(each.state_dict(), tmp_path / folder / "model.safetensors", {"format": "pt"})
        (tmp_path / folder / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    merge_engine.merge_models(tmp_path / "base", [tmp_path / "tuned"], tmp_path / "out", method="linear", weights=[0.5])
    merged = merge_engine.open_checkpoint(tmp_path / "out").tensors
    for name, delta in change.items():
        got = merged[f"{name}.weight"].read() - base.get_submodule(name).weight.detach()
        assert (got - delta / 2).abs().max() <= 2**-22


@pytest.mark.parametrize("method", OTHER_METHODS)
def test_every_row_is_a_method_of_pefts(tmp_path, method):
    assert method in {kind.value for kind in PeftType}
    path = saved(tmp_path / "a", r=4)
    edit(path, peft_type=method)
    refused(path, match=rf"^a: peft_type is {method}, wanted LORA; \w")


def test_methods_without_a_row_are_refused_without_advice(tmp_path):
    path = saved(tmp_path / "a", r=4)
    edit(path, peft_type="SOMETHING")
    refused(path, match=r"^a: peft_type is SOMETHING, wanted LORA$")
    assert way_out(OTHER_METHODS, None) == ""


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {"init_lora_weights": "pissa_niter_4"},
            r"PEFT's path_initial_model_for_weight_conversion to make it a plain",
        ),
        (
            {"init_lora_weights": "loftq"},
            r"fits that quantized base alone; put it into its base with PEFT's merge_and_",
        ),
        ({"alora_invocation_tokens": [1]}, r"aLoRA\) acts after its invocation tokens only, a merged delta always"),
        ({"peft_type": "XLORA"}, r"it is no one delta: merge the adapters that it mixes$"),
        ({"arrow_config": {"top_k": 3}}, r"so it is no one delta; merge the adapters$"),
    ],
)
def test_why_not_and_what_instead(tmp_path, change, why):
    path = saved(tmp_path / "a", r=4)
    edit(path, **change)
    refused(path, match=why)


@pytest.mark.parametrize("start", [start for start in STARTS if start not in ("loftq", "corda", "lora_ga")])
def test_a_start_is_converted_to_twice_the_rank(tmp_path, start):
    """By the argument that the error names: CorDA and LoRA-GA need data to begin with."""
    torch.manual_seed(0)
    base = Two()
    config = peft.LoraConfig(r=3, target_modules=["one", "two"], init_lora_weights=start)
    model = get_peft_model(copy.deepcopy(base), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) / 8)
        x = torch.randn(3, 16)
        wanted = model.eval()(x)
    model.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert {module.rank for module in open_adapter(tmp_path / "a").modules.values()} == {6}
    merge_engine.merge([tmp_path / "a"], tmp_path / "merged", method="linear")
    with torch.no_grad():
        got = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "merged").eval()(x)
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max() < (base(x) - wanted).abs().max()
