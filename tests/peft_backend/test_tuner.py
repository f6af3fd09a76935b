"""Models that have LoRA adapters, whatever is around them, and what enabling the drop-in gives them."""

import copy

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from peft_zoo import LAYERS, Spec, Zoo, build, factors
from transformers import LlamaConfig, LlamaForCausalLM

from merge_engine.errors import AdapterError
from merge_engine.peft_backend import add_weighted_adapter, disable, enable, enabled

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
SHAPE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 2}
CALL = {"combination_type": "ties", "density": 0.5}
NAMES, WEIGHTS = ["sql", "chat"], [1.0, -0.5]


@pytest.fixture(autouse=True)
def any_peft(monkeypatch):
    """transformers asks for a PEFT that is not released when it is newer than PEFT."""
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)


def config(**values):
    return LoraConfig(**{"r": 3, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **values})


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def twins():
    """A model of transformers with two adapters, without and with a PeftModel."""
    plain, wrapped = llama(), get_peft_model(llama(), config(), NAMES[0])
    plain.add_adapter(config(), NAMES[0])
    plain.add_adapter(config(), NAMES[1])
    wrapped.add_adapter(NAMES[1], config())
    with torch.no_grad():
        for name in NAMES:
            pairs = zip(factors(plain, name).values(), factors(wrapped, name).values(), strict=True)
            for one, other in pairs:
                for mine, yours in zip(one, other, strict=True):
                    mine.copy_(yours)
    return plain, wrapped


def same(plain, wrapped, name="merged"):
    mine, yours = factors(plain, name), factors(wrapped, name)
    assert mine and list(mine) == [key.removeprefix("base_model.model.") for key in yours]
    for one, other in zip(mine.values(), yours.values(), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.quick
@pytest.mark.parametrize("combination", ["ties", "dare_ties", "cat", "svd"])
def test_models_of_transformers_after_add_adapter(combination, tmp_path):
    plain, wrapped = twins()
    call = {"combination_type": combination, "density": 0.5, "seed": 1}
    for model in (plain, wrapped):
        add_weighted_adapter(model, NAMES, WEIGHTS, "merged", **call)
    same(plain, wrapped)
    plain.set_adapter("merged")
    wrapped.set_adapter("merged")
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(plain(tokens).logits, wrapped(tokens).logits)
    plain.save_pretrained(tmp_path)
    loaded = llama()
    loaded.load_adapter(str(tmp_path), adapter_name="merged")
    same(loaded, wrapped)


def test_any_model_with_injected_layers():
    spec = Spec(configs=({}, {}), weights=(1.0, 0.5))
    wrapped = build(spec)
    plain = Zoo("linear")
    for name in spec.names:
        inject_adapter_in_model(LoraConfig(r=3, lora_alpha=4, target_modules=list(LAYERS)), plain, name)
        for mine, yours in zip(factors(plain, name).values(), factors(wrapped, name).values(), strict=True):
            for one, other in zip(mine, yours, strict=True):
                one.data = other.data.clone()
    for model in (plain, wrapped):
        add_weighted_adapter(model, spec.names, spec.weights, "merged", "ties_svd", density=0.5)
    same(plain, wrapped)


def test_wrappers_around_a_model_do_not_matter():
    spec = Spec(configs=({}, {}), weights=(1.0, 0.5))
    inner, plain = build(spec), build(spec)
    for model in (torch.nn.Sequential(inner), plain):
        add_weighted_adapter(model, spec.names, spec.weights, "merged", **CALL)
    for one, other in zip(factors(inner, "merged").values(), factors(plain, "merged").values(), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_enabling_gives_models_of_transformers_the_method_and_disabling_takes_it():
    plain, wrapped = twins()
    fresh = llama()
    loha = llama()
    loha.add_adapter(LoHaConfig(r=2, target_modules=["q_proj"]), "loha")
    enable()
    try:
        plain.add_weighted_adapter(NAMES, WEIGHTS, "merged", **CALL)
        wrapped.add_weighted_adapter(NAMES, WEIGHTS, "merged", **CALL)
        same(plain, wrapped)
        assert not hasattr(fresh, "add_weighted_adapter")  # it has no adapters yet
        assert not hasattr(loha, "add_weighted_adapter")
        assert not hasattr(get_peft_model(llama(), LoHaConfig(target_modules=["q_proj"])), "add_weighted_adapter")
        with enabled():
            pass
        assert hasattr(plain, "add_weighted_adapter")
    finally:
        disable()
    assert not hasattr(plain, "add_weighted_adapter") and not hasattr(type(plain), "add_weighted_adapter")


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_ia3_is_left_alone():
    """Its own method, which takes three arguments, gives the same with the drop-in enabled."""
    ia3 = IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = get_peft_model(llama(), ia3, NAMES[0])
    model.add_adapter(NAMES[1], ia3)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_" in name:
                parameter.copy_(torch.rand(parameter.shape))
    twin = copy.deepcopy(model)
    model.add_weighted_adapter(NAMES, WEIGHTS, "merged")
    with enabled():
        twin.add_weighted_adapter(NAMES, WEIGHTS, "merged")
        with pytest.raises(TypeError):
            twin.add_weighted_adapter(NAMES, WEIGHTS, "other", combination_type="ties", density=0.5)
    mine, yours = (dict(each.named_parameters()) for each in (model, twin))
    assert any("merged" in name for name in mine)
    assert mine.keys() == yours.keys() and all(torch.equal(mine[name], yours[name]) for name in mine)


class Pipeline:
    def __init__(self, **components):
        self.components = components


def test_models_without_adapters_say_so():
    plain, _ = twins()
    other, _ = twins()
    for model, text in (
        (Zoo("linear"), "^model: wanted one with LoRA adapters, got a Zoo without any"),
        (torch.nn.ModuleList([plain, other]), "got several: LlamaForCausalLM, LlamaForCausalLM"),
        (Pipeline(unet=plain, vae=Zoo("linear")), r"wanted one of its models with adapters \(unet\), got a Pipeline"),
        ("sql", "^model: wanted a model with LoRA adapters, got a str"),
    ):
        with pytest.raises(AdapterError, match=text):
            add_weighted_adapter(model, NAMES, WEIGHTS, "merged", **CALL)
    loha = llama()
    loha.add_adapter(LoHaConfig(r=2, target_modules=["q_proj"]), "loha")
    with pytest.raises(TypeError, match=r"^LlamaForCausalLM does not support add_weighted"):
        add_weighted_adapter(loha, ["loha"], [1], "merged")


def test_a_unet_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    shape = {"block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8, "in_channels": 4}
    shape |= {"out_channels": 4, "cross_attention_dim": 8, "attention_head_dim": 2, "norm_num_groups": 4}
    shape |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    shape |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**shape)
    for name in NAMES:
        unet.add_adapter(config(target_modules=["to_q", "to_v"]), name)
    with enabled():
        unet.add_weighted_adapter(NAMES, WEIGHTS, "merged", "cat")
    for (A, B), (A0, B0), (A1, B1) in zip(*(factors(unet, name).values() for name in ("merged", *NAMES)), strict=True):
        want = B0.double() @ A0.double() * 8 / 3 - 0.5 * 8 / 3 * B1.double() @ A1.double()
        torch.testing.assert_close(B.double() @ A.double(), want, rtol=1e-5, atol=1e-5)
    unet.set_adapters("merged")
    noise = torch.randn(1, 4, 8, 8)
    text = torch.randn(1, 3, 8)
    with torch.no_grad():
        merged = unet(noise, 1, text).sample
        unet.set_adapters(NAMES, WEIGHTS)
        torch.testing.assert_close(merged, unet(noise, 1, text).sample, rtol=1e-4, atol=1e-4)
