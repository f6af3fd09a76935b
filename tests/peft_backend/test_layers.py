"""The layers of a live model: which get the merged adapter, and its configuration."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_zoo import LAYERS, Spec, Zoo, assert_same_factors, both, build, factors, layers, product
from unchanged import assert_unchanged, snapshot

from merge_engine.errors import AdapterError
from merge_engine.peft_backend import layers as peft_backend_layers
from merge_engine.peft_backend.drop_in import add_weighted_adapter
from merge_engine.peft_backend.layers import _holding, find_layers

CALL = {"combination_type": "ties", "density": 0.5}


@pytest.mark.parametrize("place", range(1, 4))
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_an_error_while_layers_are_added_leaves_the_model_as_it_was(place, error, monkeypatch):
    spec = Spec(kind="attention", call=CALL)
    model, calls, right = build(spec), [], _holding

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 2 * place:
            raise error
        return right(*arguments)

    before = snapshot(model)
    monkeypatch.setattr(peft_backend_layers, "_holding", failing)
    with pytest.raises(error):
        add_weighted_adapter(model, spec.names, spec.weights, "merged", **CALL)
    assert_unchanged(model, before)
    monkeypatch.undo()
    assert_same_factors(both(spec, model))  # and a second try works: stock's would be all zeros


def test_a_block_that_two_names_share_is_merged_once():
    inner = torch.nn.Module()
    inner.one = inner.two = torch.nn.Sequential(torch.nn.Linear(6, 4))
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(inner, config, adapter_name="x")
    model.add_adapter("y", config)
    found, names = find_layers(inner, ["x", "y"])
    assert [layer.name for layer in found] == ["one.0"] and names.count("one.0") == 1 and "two.0" not in names
    want = sum(product(*factors(inner, name)["one.0"]) for name in "xy")
    add_weighted_adapter(model, ["x", "y"], [1.0, 1.0], "merged", combination_type="cat")
    assert torch.allclose(product(*factors(inner, "merged")["one.0"]), inner.one[0].scaling["x"] * want, atol=1e-6)


# Configurations of the first adapter that stock lets through into the result.
LEAKS = {
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.5},
    "excluded": {"exclude_modules": ["two"]},
    "start": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_the_first_adapters_configuration_does_not_leak(leak, combination):
    spec = Spec(configs=(LEAKS[leak], {}), weights=(1.0, 0.5))
    model = build(spec)
    call = {"combination_type": combination, "svd_rank": 5}
    singles = {name: factors(model, name) for name in spec.names}
    add_weighted_adapter(model, spec.names, spec.weights, "merged", **call)
    config = model.peft_config["merged"]
    assert not config.use_rslora and not config.lora_dropout and not config.exclude_modules
    assert config.init_lora_weights is True
    merged = factors(model, "merged")
    assert len(merged) == 3
    for name, layer in layers(model).items():
        assert layer.scaling["merged"] == 1.0
        if combination != "linear":
            want = sum(
                weight * layer.scaling[adapter] * product(*singles[adapter][name])
                for adapter, weight in zip(spec.names, spec.weights, strict=True)
                if name in singles[adapter]
            )
            torch.testing.assert_close(product(*merged[name]), want, rtol=1e-5, atol=1e-5)


def test_a_start_that_changes_base_weights_does_not_change_them_again():
    spec = Spec(configs=({"init_lora_weights": "pissa", "r": 2}, {"r": 2}), weights=(1.0, 0.5))
    model = build(spec)
    before = {name: value.clone() for name, value in model.state_dict().items() if "base_layer" in name}
    with pytest.warns(UserWarning, match="changed the base weights"):
        add_weighted_adapter(model, spec.names, spec.weights, "merged", "cat")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert model.peft_config["merged"].init_lora_weights is True


class Stack(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(Zoo("linear") for _ in range(3))})


CHOSEN = {
    "by number": {"target_modules": ["one"], "layers_to_transform": [1]},
    "by exclusion": {"target_modules": ["one"], "exclude_modules": r".*\.[02]\.one"},
    "by pattern": {"target_modules": r".*\.1\.one"},
}


@pytest.mark.quick
@pytest.mark.parametrize("how", CHOSEN)
def test_targets_reach_the_merged_layers_and_no_others(how):
    """Stock's union of the targets reaches what neither adapter has, or leaves out what the second one has."""
    model = get_peft_model(Stack(), LoraConfig(**CHOSEN[how]), "sql")
    model.add_adapter("chat", LoraConfig(**CHOSEN[how]))
    add_weighted_adapter(model, ["sql", "chat"], [1, 1], "merged", "linear")
    assert list(factors(model, "merged")) == ["base_model.model.model.layers.1.one"]
    again = get_peft_model(Stack(), replace(model.peft_config["merged"]), "merged")
    assert list(factors(again, "merged")) == ["base_model.model.model.layers.1.one"]


@pytest.mark.parametrize("combination", ["ties", "dare_linear", "cat", "svd", "ties_svd"])
def test_layers_that_have_factors_only(combination):
    """GPTQ's layer, as AWQ's and others, has no delta of its own: stock's svd types fail on it."""
    from peft.tuners.lora.gptq import GPTQLoraLinear

    spec = Spec(call={"combination_type": combination, "density": 0.5})
    models = []
    for layer in (None, GPTQLoraLinear):
        base, adapted = Zoo("linear"), None
        for name in spec.names:
            config = LoraConfig(r=3, lora_alpha=4, target_modules=list(LAYERS))
            if layer is not None:
                config._register_custom_module({torch.nn.Linear: layer})
            if adapted is None:
                adapted = get_peft_model(base, config, name)
            else:
                adapted.add_adapter(name, config)
        models.append(adapted)
    torch.manual_seed(0)
    for (_, one), (_, other) in zip(*(sorted(factors_of_all(model, spec).items()) for model in models), strict=True):
        for mine, yours in zip(one, other, strict=True):
            mine.data = torch.randn(mine.shape)
            yours.data = mine.data.clone()
    for model in models:
        add_weighted_adapter(model, spec.names, spec.weights, "ours", **spec.call, seed=2)
    assert type(layers(models[1])["base_model.model.one"]) is GPTQLoraLinear
    for name, pair in factors(models[0], "ours").items():
        assert all(torch.equal(mine, yours) for mine, yours in zip(pair, factors(models[1], "ours")[name], strict=True))


def factors_of_all(model, spec):
    return {(adapter, name): pair for adapter in spec.names for name, pair in factors(model, adapter).items()}


@pytest.mark.parametrize("combination", ["ties", "cat", "svd"])
def test_adapters_that_are_merged_into_the_base(combination):
    spec = Spec(call={"combination_type": combination, "density": 0.5})
    model, plain = build(spec), build(spec)
    model.merge_adapter([spec.names[0]])
    for each in (model, plain):
        add_weighted_adapter(each, spec.names, spec.weights, "ours", **spec.call)
    for name, pair in factors(plain, "ours").items():
        assert all(torch.equal(a, b) for a, b in zip(pair, factors(model, "ours")[name], strict=True))


@pytest.mark.parametrize("combination", ["linear", "ties", "dare_linear", "magnitude_prune", "svd", "ties_svd", "cat"])
def test_layers_that_are_prepared_for_hotswaps(combination, tmp_path):
    """Ranks are filled up beyond the configuration's, and scalings are tensors. Stock's cat fails then."""
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    spec = Spec(call={"combination_type": combination, "density": 0.5})
    model = build(spec)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    if combination == "cat":
        add_weighted_adapter(model, spec.names, spec.weights, "ours", **spec.call)
        for name, layer in layers(model).items():
            want = sum(
                weight * float(layer.scaling[adapter]) * product(*factors(model, adapter)[name])
                for adapter, weight in zip(spec.names, spec.weights, strict=True)
            )
            torch.testing.assert_close(product(*factors(model, "ours")[name]), want, rtol=1e-5, atol=1e-5)
    elif "svd" in combination:
        both(spec, model)
        for name, theirs in factors(model, "theirs").items():
            torch.testing.assert_close(product(*factors(model, "ours")[name]), product(*theirs), rtol=1e-3, atol=1e-3)
    else:
        assert_same_factors(both(spec, model))
    for A, B in factors(model, "ours").values():
        assert A.shape[0] == B.shape[1] == model.peft_config["ours"].r


@pytest.mark.parametrize("combination", ["linear", "dare_ties", "cat", "svd", "ties_svd"])
def test_a_model_on_the_meta_device_is_refused(combination):
    with torch.device("meta"):
        base = Zoo("linear")
    model = get_peft_model(base, LoraConfig(r=3, target_modules=list(LAYERS)), "sql")
    model.add_adapter("chat", LoraConfig(r=3, target_modules=list(LAYERS)))
    with pytest.raises(AdapterError, match=r"^sql: lora_A of one is on the meta device"):
        add_weighted_adapter(model, ["sql", "chat"], [1, 1], "merged", combination, density=0.5)
    assert list(model.peft_config) == ["sql", "chat"]
