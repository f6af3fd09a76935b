"""The factor types and cat: stock PEFT and the drop-in side by side on one model, bit for bit."""

import warnings
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from peft_zoo import KINDS, LAYERS, Spec, assert_same_factors, both, build, factors, layers

import merge_engine
from merge_engine.peft_backend import drop_in as peft_backend_drop_in
from merge_engine.peft_backend import factors as peft_backend_factors
from merge_engine.peft_backend import layers as peft_backend_layers
from merge_engine.peft_backend.drop_in import add_weighted_adapter
from merge_engine.peft_backend.factors import combine, strengths
from merge_engine.peft_backend.layers import _parts
from merge_engine.peft_backend.torch_masks import draw_factor_masks

FACTOR_TYPES = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
CALM = settings(deadline=None, derandomize=True, max_examples=80)
pytestmark = [
    pytest.mark.filterwarnings("ignore:The density:UserWarning"),
    # of PEFT: rank and alpha patterns of layers that this adapter does not target
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]
WEIGHT = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 2]), st.floats(-2, 2, width=32))


@st.composite
def specs(draw):
    """Adapters of equal ranks, layer by layer, over any of the layers, and any call of a factor type or cat."""
    combination = draw(st.sampled_from([*FACTOR_TYPES, "cat"]))
    count = draw(st.integers(1, 6))
    ranks = draw(st.sampled_from([{}, {"two": 4}, {"one": 1, "three": 5}]))
    configs = tuple(
        {
            "r": draw(st.integers(1, 5)) if combination == "cat" else 3,
            "lora_alpha": draw(st.integers(1, 9)),
            "rank_pattern": ranks,
            "alpha_pattern": draw(st.sampled_from([{}, {"two": 7}])),
            "use_rslora": draw(st.booleans()),
            "target_modules": draw(st.lists(st.sampled_from(LAYERS), min_size=1, max_size=3, unique=True)),
        }
        for _ in range(count)
    )
    if ranks:  # PEFT goes by the largest pattern, whether a layer has it or not
        configs = tuple({**config, "target_modules": list(LAYERS)} for config in configs)
    density = draw(st.one_of(st.sampled_from([0.0, 0.5, 1, 1.5]), st.floats(0.01, 0.99)))
    call = {"combination_type": combination, "density": 0.5 if "dare" in combination and not density else density}
    call["majority_sign_method"] = draw(st.sampled_from(["total", "frequency"]))
    return Spec(
        kind=draw(st.sampled_from(list(KINDS))),
        configs=configs,
        weights=tuple(draw(WEIGHT) for _ in range(count)),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16])),
        scales=tuple(draw(st.sampled_from([1.0, 0.5, -2.0])) for _ in range(count)),
        call=call,
    )


@CALM
@given(specs())
def test_any_configuration_equals_stock_bit_for_bit(spec):
    model = both(spec)
    assert_same_factors(model)
    for layer in layers(model).values():
        if "ours" in layer.r:
            assert layer.scaling["ours"] == 1.0 and layer.r["ours"] == model.peft_config["ours"].r
    for A, B in factors(model, "ours").values():
        for factor in (A, B):
            assert factor.dtype == spec.dtype and factor.is_contiguous() and not factor.requires_grad
            assert factor.untyped_storage().nbytes() == factor.numel() * factor.element_size()


@pytest.mark.quick
@pytest.mark.parametrize("combination", ["ties", "magnitude_prune"])
def test_equal_magnitudes_exactly_k_stay_and_the_first_of_them(combination):
    spec = Spec(configs=({},), weights=(1.0,), call={"combination_type": "linear"})
    model = build(spec)
    layer = layers(model)["base_model.model.one"]
    A = layer.lora_A["adapter0"].weight.data
    A[:] = 1.0
    A[2, 3] = -2.0
    model.add_adapter("adapter1", model.peft_config["adapter0"])
    arguments = (["adapter0", "adapter1"], [1.0, 0.0], "merged")
    add_weighted_adapter(model, *arguments, combination_type=combination, density=0.5)
    kept = layer.lora_A["merged"].weight != 0
    k = int(0.5 * A.numel())
    assert int(kept.sum()) == k and kept[2, 3]
    assert kept.flatten()[: k - 1].all()


def test_philox_masks_are_those_of_a_merge_of_files(tmp_path):
    spec = Spec(call={"combination_type": "dare_ties", "density": 0.4})
    model = build(spec)
    with torch.no_grad():
        for config in model.peft_config.values():
            config.base_model_name_or_path = "zoo"
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    add_weighted_adapter(model, spec.names, spec.weights, "merged", **spec.call, seed=7, rng="philox")
    folders = [tmp_path / name for name in spec.names]
    recipe = {"method": "dare_ties", "density": 0.4, "space": "factors", "weights": spec.weights, "seed": 7}
    merged = merge_engine.merge(folders, **recipe).modules
    for name, (A, B) in factors(model, "merged").items():
        other = merged[name.removeprefix("base_model.model.")]
        torch.testing.assert_close(A, other.A, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(B, other.B, rtol=1e-6, atol=1e-6)


def test_a_seed_decides_and_torchs_seed_decides_where_there_is_none():
    spec = Spec(call={"combination_type": "dare_linear", "density": 0.5})
    model = build(spec)
    before = torch.get_rng_state()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        add_weighted_adapter(model, spec.names, spec.weights, name, **spec.call, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("d", "e", "f"):
        if name != "f":
            torch.manual_seed(5)
        add_weighted_adapter(model, spec.names, spec.weights, name, **spec.call)
    A = {name: factors(model, name)["base_model.model.one"][0] for name in "abcdef"}
    assert torch.equal(A["a"], A["b"]) and torch.equal(A["d"], A["e"])
    assert not torch.equal(A["a"], A["c"]) and not torch.equal(A["e"], A["f"])


def _combine_with(change):
    right = combine
    return lambda x, weights, rule: change(right, x, weights, rule)


def _without_election(right, x, weights, rule):
    return right(x, weights, replace(rule, elect="none"))


def _mean_over_all(right, x, weights, rule):
    if rule.elect == "none":
        return right(x, weights, rule)
    count = torch.where(x.sum(0) >= 0, x > 0, x < 0).sum(0).clamp(min=1)
    return right(x, weights, rule) * count / len(x)


def _at_least_the_threshold(x, k):
    if k:
        x[x.abs() < x.abs().sort(descending=True).values[:, k - 1 : k]] = 0


def _same_mask_for_all(layers, density):
    drawn = _right_masks(layers, density)
    return lambda layer, place, side: drawn(layer, 0, side)


_right_masks = draw_factor_masks
_right_strengths = strengths
_right_parts = _parts


def _plain_strengths(layer, weights, side):
    return tuple(abs(x) * x if side == "A" else x * x for x in _right_strengths(layer, weights, side))


def _scaling_twice(*arguments):
    return [part._replace(scaling=part.scaling**2) for part in _right_parts(*arguments)]


BREAKS = {
    "no trim": (peft_backend_factors, "trim", lambda x, k: None, ["ties", "magnitude_prune"]),
    "no election": (peft_backend_factors, "combine", _combine_with(_without_election), ["ties", "dare_ties"]),
    "mean over N": (peft_backend_factors, "combine", _combine_with(_mean_over_all), ["ties", "dare_ties"]),
    "not rescaled": (peft_backend_factors, "drop", lambda x, keep, density: x.mul_(keep), ["dare_linear", "dare_ties"]),
    "same mask for all": (peft_backend_drop_in, "draw_factor_masks", _same_mask_for_all, ["dare_linear", "dare_ties"]),
    "scaling twice": (peft_backend_layers, "_parts", _scaling_twice, [*FACTOR_TYPES, "cat"]),
    "no sqrt": (peft_backend_factors, "strengths", _plain_strengths, FACTOR_TYPES),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_backend_is_noticed(name, monkeypatch):
    where, what, broken, types = BREAKS[name]
    for combination in types:
        spec = Spec(call={"combination_type": combination, "density": 0.5})
        assert_same_factors(both(spec))
    monkeypatch.setattr(where, what, broken)
    for combination in types:
        spec = Spec(call={"combination_type": combination, "density": 0.5})
        with pytest.raises(AssertionError):
            assert_same_factors(both(spec))


def test_a_threshold_in_place_of_exact_k_is_noticed(monkeypatch):
    monkeypatch.setattr(peft_backend_factors, "trim", _at_least_the_threshold)
    with pytest.raises(AssertionError):
        test_equal_magnitudes_exactly_k_stay_and_the_first_of_them("magnitude_prune")


def test_one_warning_of_a_density_that_prunes_nothing():
    spec = Spec(call={"combination_type": "ties", "density": 2})
    model = build(spec)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        add_weighted_adapter(model, spec.names, spec.weights, "ours", **spec.call)
    assert [str(each.message) for each in seen] == [
        "The density 2 is greater than or equal to 1, no pruning will be performed."
    ]
    assert seen[0].filename == __file__
