"""The drop-in as PEFT's users meet it: errors, patching, saved adapters, quantised bases, and the merging guide."""

import copy
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from peft_zoo import (
    LAYERS,
    STOCK,
    Spec,
    Zoo,
    assert_same_factors,
    both,
    build,
    factors,
    has_doubled_svd_scaling,
    layers,
    product,
)

import merge_engine
from merge_engine.errors import AdapterError, MergeError, RecipeError
from merge_engine.peft_backend import layers as peft_backend_layers
from merge_engine.peft_backend.drop_in import add_weighted_adapter, disable, enable, enabled
from merge_engine.peft_backend.layers import _holding

CALL = {"combination_type": "ties", "density": 0.5}


def snapshot(model):
    """All that an error may not change: tensors, who is trainable, configurations, slots, active adapters."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: copy.deepcopy(config.to_dict()) for name, config in model.peft_config.items()},
        {
            name: {slot: list(getattr(layer, slot)) for slot in (*layer.adapter_layer_names, *layer.other_param_names)}
            for name, layer in layers(model).items()
        },
        {name: list(layer.active_adapters) for name, layer in layers(model).items()},
        list(model.active_adapters),
        [name for name, _ in model.named_modules()],
    )


def assert_unchanged(model, before):
    now = snapshot(model)
    assert now[1:] == before[1:]
    assert now[0].keys() == before[0].keys() and all(torch.equal(now[0][name], before[0][name]) for name in now[0])


def test_the_result_is_not_active_not_trainable_and_the_rest_is_as_it_was():
    """Stock freezes "alpha" too if the merge is named "a"."""
    spec = Spec(call=CALL)
    model = build(spec)
    before = snapshot(model)
    add_weighted_adapter(model, spec.names, spec.weights, "adapter", **CALL)
    assert not any(p.requires_grad for pair in factors(model, "adapter").values() for p in pair)
    model.delete_adapter("adapter")
    assert_unchanged(model, before)


STOCK_ERRORS = {
    "unknown adapter": (["adapter0", "nobody"], [1, 1], CALL),
    "different ranks": (["adapter0", "larger"], [1, 1], CALL),
    "no adapters": ([], [], {"combination_type": "linear"}),
    "no adapters to stack": ([], [], {"combination_type": "cat"}),
    "unknown type": (["adapter0", "adapter1"], [1, 1], {"combination_type": "average"}),
    "mixed targets": (["adapter0", "regex"], [1, 1], CALL),
    "unknown vote": (["adapter0", "adapter1"], [1, 1], {**CALL, "majority_sign_method": "loudest"}),
    "negative density": (["adapter0", "adapter1"], [1, 1], {**CALL, "density": -0.5}),
    "negative rank": (["adapter0", "adapter1"], [1, 1], {"combination_type": "svd", "svd_rank": -1}),
}


@pytest.mark.parametrize("case", STOCK_ERRORS)
def test_errors_are_stocks_by_type_and_text_and_change_nothing(case):
    names, weights, call = STOCK_ERRORS[case]
    spec = Spec(call=CALL)
    model = build(spec)
    model.add_adapter("larger", LoraConfig(r=5, target_modules=list(LAYERS)))
    model.add_adapter("regex", LoraConfig(r=3, target_modules="one|two"))
    with pytest.raises(Exception) as theirs:
        STOCK(copy.deepcopy(model).base_model, names, weights, "merged", **call)
    before = snapshot(model)
    with pytest.raises(Exception) as ours:
        add_weighted_adapter(model, names, weights, "merged", **call)
    assert (type(ours.value), str(ours.value)) == (type(theirs.value), str(theirs.value))
    assert_unchanged(model, before)


def test_two_adapters_that_save_one_module_are_stocks_error():
    model = build(Spec(configs=({"target_modules": ["one"], "modules_to_save": ["two"]},) * 2, weights=(1, 1)))
    arguments = (["adapter0", "adapter1"], [1, 1], "merged")
    with pytest.raises(ValueError) as theirs:
        STOCK(model.base_model, *arguments)
    with pytest.raises(ValueError) as ours:
        add_weighted_adapter(model, *arguments)
    assert str(ours.value) == str(theirs.value)


def test_parameters_as_targets_are_stocks_error():
    model = get_peft_model(Zoo("linear"), LoraConfig(target_parameters=["one.weight"], target_modules=[]), "p")
    with pytest.raises(ValueError) as theirs:
        STOCK(model.base_model, ["p"], [1], "merged")
    with pytest.raises(ValueError) as ours:
        add_weighted_adapter(model, ["p"], [1], "merged")
    assert str(ours.value) == str(theirs.value)


REFUSALS = {
    "no weight for an adapter": ({}, [1.0], {}, "weights: wanted 2"),
    "weight NaN": ({}, [1.0, float("nan")], {}, "weights: wanted a finite number"),
    "weight no number": ({}, [1.0, "much"], {}, "weights: wanted a number"),
    "density missing": ({}, [1, 1], {"density": None}, "density: ties needs a number"),
    "density NaN": ({}, [1, 1], {"density": float("nan")}, "density: wanted a finite"),
    "density 0 of DARE": ({}, [1, 1], {"combination_type": "dare_ties", "density": 0}, "divides by it"),
    "made-up svd type": ({}, [1, 1], {"combination_type": "foo_svd"}, "Invalid combination_type: foo_svd"),
    "no type": ({}, [1, 1], {"combination_type": None}, "Invalid combination_type: None"),
    "rank no number": (
        {},
        [1, 1],
        {"combination_type": "ties_svd", "svd_rank": "3"},
        "svd_rank: wanted a whole number",
    ),
    "clamp no number": ({}, [1, 1], {"svd_clamp": "x"}, "svd_clamp: wanted a number, got 'x'"),
    "unknown driver": ({}, [1, 1], {"svd_driver": "fast"}, "svd_driver: wanted one of None, gesvd, gesvdj, gesvda"),
    "unknown generator": ({}, [1, 1], {"rng": "dice"}, "rng: wanted one of philox, torch"),
    "unknown svd": ({}, [1, 1], {"svd": "fast"}, "svd: wanted one of subspace, exact"),
    "unknown backend": ({}, [1, 1], {"combination_type": "ties_svd", "backend": "abacus"}, "backend: wanted one of"),
    "clamp above 1": ({}, [1, 1], {"svd_clamp": 1.5}, "svd_clamp: wanted a quantile"),
    "seed": ({}, [1, 1], {"seed": -1}, "seed: wanted a whole number"),
    "DoRA": ({"use_dora": True}, [1, 1], {}, "use_dora is set"),
    "lora_bias": ({"lora_bias": True}, [1, 1], {}, "lora_bias is set"),
    "bias": ({"bias": "all"}, [1, 1], {}, "bias is set"),
    "saved modules": ({"target_modules": ["one"], "modules_to_save": ["two"]}, [1, 1], {}, "modules_to_save is set"),
    "ranks within a layer": ({"r": 2, "rank_pattern": {"one": 3}}, [1, 1], {}, "different ranks cannot be merged"),
    "NaN": ({}, [1, 1], {}, "adapter1: lora_A of two holds NaN"),
    "Inf in a delta": ({}, [1, 1], {"combination_type": "ties_svd"}, "adapter1: lora_A of two holds Inf"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_stock_gets_wrong_is_refused_and_changes_nothing(case):
    config, weights, call, text = REFUSALS[case]
    first = {"target_modules": ["one"]} if "modules_to_save" in config else {}
    model = build(Spec(configs=(first, config), weights=(1, 1)))
    if "holds" in text:
        layers(model)["base_model.model.two"].lora_A["adapter1"].weight.data[1, 2] = float(text[-3:])
    before = snapshot(model)
    with pytest.raises(ValueError, match=text):
        add_weighted_adapter(model, ["adapter0", "adapter1"], weights, "merged", **{**CALL, **call})
    if "holds" not in text:
        assert_unchanged(model, before)
    assert "merged" not in model.peft_config and not factors(model, "merged")


def test_every_refusal_is_a_value_error():
    assert issubclass(MergeError, ValueError) and issubclass(AdapterError, MergeError)
    assert issubclass(RecipeError, MergeError)


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


def test_an_existing_name_is_left_alone():
    spec = Spec(call=CALL)
    model = build(spec)
    before = snapshot(model)
    assert add_weighted_adapter(model, ["nobody"], [], "adapter1") is None
    assert_unchanged(model, before)


def test_one_adapter_is_linear_whatever_is_asked():
    spec = Spec(configs=({},), weights=(0.7,), call={"combination_type": "ties_svd", "density": 0.1, "svd_rank": 1})
    assert_same_factors(both(spec))


def test_other_tuners_are_stocks_business():
    config = AdaLoraConfig(target_modules=["one"], total_step=10)
    model = get_peft_model(Zoo("linear"), config, "sql")
    for add in (model.add_weighted_adapter, lambda *rest: add_weighted_adapter(model, *rest)):
        with enabled(), pytest.raises(TypeError, match="AdaLoraModel does not support"):
            add(["sql"], [1.0], "merged")


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


@pytest.mark.parametrize("how", CHOSEN)
def test_targets_reach_the_merged_layers_and_no_others(how):
    """Stock's union of the targets reaches what neither adapter has, or leaves out what the second one has."""
    model = get_peft_model(Stack(), LoraConfig(**CHOSEN[how]), "sql")
    model.add_adapter("chat", LoraConfig(**CHOSEN[how]))
    add_weighted_adapter(model, ["sql", "chat"], [1, 1], "merged", "linear")
    assert list(factors(model, "merged")) == ["base_model.model.model.layers.1.one"]
    again = get_peft_model(Stack(), replace(model.peft_config["merged"]), "merged")
    assert list(factors(again, "merged")) == ["base_model.model.model.layers.1.one"]


# Patching.


def test_enabling_and_disabling_twice_leaves_peft_as_it_was():
    for _ in range(2):
        enable()
    assert LoraModel.add_weighted_adapter is add_weighted_adapter
    with enabled():
        pass
    assert LoraModel.add_weighted_adapter is add_weighted_adapter
    for _ in range(2):
        disable()
    assert LoraModel.add_weighted_adapter is STOCK


def test_an_exception_inside_the_block_leaves_peft_as_it_was():
    with pytest.raises(KeyError), enabled():
        raise KeyError
    assert LoraModel.add_weighted_adapter is STOCK


def test_blocks_overlap_between_threads():
    inside, leave, seen = threading.Barrier(3), threading.Event(), []

    def early():
        with enabled():
            inside.wait()

    def late():
        with enabled():
            inside.wait()
            leave.wait()
            seen.append(LoraModel.add_weighted_adapter)

    threads = [threading.Thread(target=early), threading.Thread(target=late)]
    for thread in threads:
        thread.start()
    inside.wait()
    threads[0].join()
    leave.set()
    threads[1].join()
    assert seen == [add_weighted_adapter]
    assert LoraModel.add_weighted_adapter is STOCK


def test_two_models_merge_at_once():
    specs = [Spec(kind=kind, call={"combination_type": "ties_svd", "density": 0.5}) for kind in ("linear", "conv2d")]
    alone = [both(spec, svd="exact") for spec in specs]
    models = [build(spec) for spec in specs]
    with enabled():
        threads = [
            threading.Thread(
                target=model.add_weighted_adapter,
                args=(spec.names, spec.weights, "ours"),
                kwargs={**spec.call, "svd": "exact"},
            )
            for spec, model in zip(specs, models, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for model, want in zip(models, alone, strict=True):
        for name, (A, B) in factors(want, "ours").items():
            torch.testing.assert_close(product(*factors(model, "ours")[name]), product(A, B))


# Saved adapters, quantised bases, and the guide.


def test_it_imports_without_peft():
    script = "import sys; sys.modules['peft'] = None; import merge_engine.peft_backend"
    root = Path(merge_engine.__file__).parent.parent
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root)


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


@pytest.mark.parametrize("combination", ["ties_svd", "dare_ties_svd", "svd"])
def test_both_backends_merge_the_same_deltas(combination):
    spec = Spec(kind="conv2d", call={"combination_type": combination, "density": 0.5, "svd_rank": 2})
    model = build(spec)
    for backend in ("torch", "triton"):
        add_weighted_adapter(model, spec.names, spec.weights, backend, **spec.call, seed=1, backend=backend)
    for name, pair in factors(model, "torch").items():
        other = factors(model, "triton")[name]
        torch.testing.assert_close(product(*other), product(*pair), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("combination", ["linear", "cat", "svd", "ties", "ties_svd", "dare_linear"])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding", "attention"])
def test_the_saved_adapter_reloads_in_stock_peft_with_the_same_factors(kind, combination, tmp_path):
    """Ranks by pattern: stock's own result would not load again."""
    patterns = {"rank_pattern": {"one": 2}, "alpha_pattern": {"two": 9}}
    spec = Spec(kind=kind, configs=(patterns, {**patterns, "use_rslora": True}), weights=(1.0, -0.5))
    model = build(spec)
    call = {"combination_type": combination, "density": 0.5}
    add_weighted_adapter(model, spec.names, spec.weights, "merged", **call, seed=1)
    for config in model.peft_config.values():
        config.base_model_name_or_path = "zoo"
    model.save_pretrained(tmp_path, selected_adapters=["merged"], save_embedding_layers=False)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Zoo(kind), tmp_path / "merged", adapter_name="merged")
    want = factors(model, "merged")
    assert factors(again, "merged").keys() == want.keys()
    for name, pair in factors(again, "merged").items():
        assert all(torch.equal(one, other) for one, other in zip(pair, want[name], strict=True))
        assert layers(again)[name].scaling["merged"] == 1.0


def llama(folder):
    """A local base model in the Llama architecture, and three adapters of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for name in ("norobots", "sql", "adcopy"):
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        adapter = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), lora)
        adapter.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("llama"))


def quantized(folder, bits):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = {
        4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32, "bnb_4bit_quant_type": "nf4"},
        8: {"load_in_8bit": True},
    }[bits]
    return AutoModelForCausalLM.from_pretrained(
        folder / "base", device_map="cpu", quantization_config=BitsAndBytesConfig(**quantization)
    )


def guide(folder, bits, drop_in, **call):
    """The script of PEFT's model merging guide; what it generates."""
    model = PeftModel.from_pretrained(quantized(folder, bits), folder / "norobots", adapter_name="norobots")
    model.load_adapter(folder / "sql", adapter_name="sql")
    model.load_adapter(folder / "adcopy", adapter_name="adcopy")
    if drop_in:
        enable()  # the one added line
    try:
        if "rng" not in call:
            torch.manual_seed(5)
        model.add_weighted_adapter(["norobots", "adcopy", "sql"], [2.0, 1.0, 1.0], "merge", **call)
    finally:
        disable()
    model.set_adapter("merge")
    prompt = torch.tensor([[1, 5, 7, 11]])
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options).tolist()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("combination", ["ties", "dare_linear", "dare_ties", "cat", "svd", "ties_svd"])
def test_the_merging_guide_generates_what_stock_generates(local, bits, combination):
    pytest.importorskip("bitsandbytes")
    if "svd" in combination and has_doubled_svd_scaling():
        pytest.skip("this PEFT multiplies the scaling into svd types twice")
    call = {"combination_type": combination, "density": 0.2}
    ours = {"rng": "torch", "seed": 5} if "dare" in combination else {}
    theirs = guide(local, bits, False, **call)
    assert guide(local, bits, True, **call, **ours) == theirs


def test_the_saved_merge_generates_the_same_without_merge_engine(local, tmp_path):
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(local / "base"), local / "sql", adapter_name="sql"
    )
    model.load_adapter(local / "adcopy", adapter_name="adcopy")
    add_weighted_adapter(model, ["sql", "adcopy"], [1.0, -0.5], "merge", "ties_svd", density=0.4)
    model.set_adapter("merge")
    model.save_pretrained(tmp_path, selected_adapters=["merge"])
    prompt = torch.tensor([[1, 5, 7, 11]])
    torch.save(model(input_ids=prompt).logits.detach(), tmp_path / "logits")
    script = (
        "import sys, torch\n"
        "sys.modules['merge_engine'] = None\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "model = PeftModel.from_pretrained(base, sys.argv[2] + '/merge')\n"
        "logits = model(input_ids=torch.tensor([[1, 5, 7, 11]])).logits\n"
        "assert torch.equal(logits, torch.load(sys.argv[2] + '/logits'))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(local / "base"), str(tmp_path)], check=True, cwd=tmp_path)
