"""What is refused: in PEFT's words where PEFT refuses it too, and without a change to the model."""

import copy

import pytest
from peft import LoraConfig, get_peft_model
from peft_zoo import LAYERS, STOCK, Spec, Zoo, build, factors, layers
from unchanged import assert_unchanged, snapshot

from merge_engine.peft_backend.drop_in import add_weighted_adapter

CALL = {"combination_type": "ties", "density": 0.5}
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
    "ranks within a layer": ({"r": 2, "rank_pattern": {"one": 3}}, [1, 1], {}, "different ranks cannot be merged"),
    "NaN": ({}, [1, 1], {}, "adapter1: lora_A of two holds NaN"),
    "Inf in a delta": ({}, [1, 1], {"combination_type": "ties_svd"}, "adapter1: lora_A of two holds Inf"),
}


@pytest.mark.quick
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
