"""What a search varies, and the recipes that its values stand for, by hand."""

import math
import re

import pytest

from merge_engine.errors import RecipeError
from merge_engine.rules.recipe import Recipe
from merge_engine.searches.space import DEFAULT, OF_KINDS, make_space, parse_space

NAMES = ["sql", "chat"]
MODULES = ["layers.0.q", "layers.1.q", "layers.2.q", "layers.10.q", "head"]


def drawn(space, method, at=0.5):
    return space.suggest(
        lambda name, low, high, by_ratio: low + at * (high - low),
        lambda name, choices: method if name == "method" else choices[0],
    )


@pytest.mark.quick
def test_a_method_has_only_the_parameters_that_it_looks_at():
    space = make_space(None, {}, NAMES, MODULES)
    weights = ["weight of sql", "weight of chat"]
    assert list(drawn(space, "linear")) == ["method", *weights, "gain"]
    assert list(drawn(space, "actmat")) == ["method", *weights, "gain", "ridge"]
    ties = make_space({"method": ["ties", "linear"], "density": (0.1, 0.9)}, {"seed": 3}, NAMES, MODULES)
    assert drawn(ties, "ties") == {"method": "ties", "density": 0.5}
    assert ties.recipe(drawn(ties, "ties")) == {"method": "ties", "density": 0.5, "seed": 3, "scale": "auto"}
    assert ties.recipe({"method": "linear"}) == {"method": "linear", "seed": 3, "scale": "auto"}


@pytest.mark.parametrize(
    ("over", "wanted"), [((0.0, 2.0), False), ((-1.0, 2.0), False), ((0.5, 1.0), False), ((0.25, 1.0), True)]
)
def test_a_wide_span_above_0_is_searched_by_ratio(over, wanted):
    by_ratio = []
    space = make_space({"weights": over}, {}, NAMES, MODULES)
    space.suggest(lambda name, low, high, ratio: by_ratio.append(ratio) or low, lambda name, choices: choices[0])
    assert by_ratio == [wanted] * 2


def test_values_become_recipes():
    space = make_space({"weights": (0.0, 2.0), "scale": [0.5, 1]}, {"method": "linear"}, NAMES, MODULES)
    assert space.recipe(drawn(space, None)) == {"method": "linear", "weights": [1.0, 1.0], "scale": 0.5}
    assert not space.automatic
    same = make_space({"weights": (0.0, 2.0)}, {}, ["a", "b", "a"], MODULES)
    assert list(drawn(same, None)) == ["weight of a #1", "weight of b", "weight of a #3"]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_layer_is_in_a_group(count):
    """Whatever the number of groups: as many layers each, or one more."""
    modules = [f"layers.{layer}.q" for layer in range(11)]
    space = make_space({"weights": (0.0, 2.0)}, {"method": "tsv"}, NAMES, modules, groups=count)
    assert sorted(module for group in space.groups.values() for module in group) == sorted(modules)
    assert {len(group) for group in space.groups.values()} <= {11 // count, 11 // count + 1}


def test_groups_of_layers_have_their_own_weights():
    space = make_space({"weights": (0.0, 2.0)}, {"method": "tsv"}, NAMES, MODULES, groups=2)
    values = {name: float(number) for number, name in enumerate(drawn(space, None))}
    assert list(values)[:3] == [
        "weight of sql in layers 0-1",
        "weight of chat in layers 0-1",
        "weight of sql in layers 2-10",
    ]
    recipe = space.recipe(values)
    assert recipe["module_weights"] == {
        "layers.0.q": [0, 1],
        "layers.1.q": [0, 1],
        "layers.2.q": [2, 3],
        "layers.10.q": [2, 3],
        "head": [4, 5],
    }
    Recipe.from_mapping(recipe)
    for count, message in [(5, "wanted at most 4"), (0, "wanted 'kinds', or a whole number"), (True, "wanted 'kinds'")]:
        with pytest.raises(RecipeError, match=f"^groups: {message}"):
            make_space(None, {}, NAMES, MODULES, groups=count)


def test_kinds_of_modules_have_gains_of_their_own():
    modules = ["h.0.attn.q", "h.1.attn.q", "h.0.attn.to_out.0", "head", "h.12"]
    space = make_space(None, {}, NAMES, modules, groups="kinds")
    names = ["gain of h.12", "gain of head", "gain of q", "gain of to_out.0"]
    assert space.varied == OF_KINDS
    assert space.sober() == [{"method": "tsv", **dict.fromkeys(names, gain)} for gain in (1.0, math.sqrt(2.0))]
    recipe = space.recipe({"method": "tsv"} | {name: float(number) for number, name in enumerate(names)})
    assert recipe == {"method": "tsv", "scale": "auto", "gain": {r"h\.12": 0, "head": 1, "q": 2, r"to_out\.0": 3}}
    assert [Recipe.from_mapping(recipe).gain_for(module) for module in modules] == [2, 2, 3, 1, 0]
    both = make_space({"gain": (1.0, 2.0), "weights": (0.5, 2.0)}, {"method": "tsv"}, NAMES, modules, groups="kinds")
    assert list(drawn(both, None)) == [*names, "weight of sql", "weight of chat"]
    assert both.describe()["kinds"] == ["h.12", "head", "q", "to_out.0"]
    assert "kinds" not in make_space(None, {}, NAMES, modules).describe()
    for varied, names, message in [
        ({"weights": (0.5, 2.0)}, modules, "kinds have gains of their own, wanted a span of gain, got none"),
        (None, [f"lora_unet_{number}" for number in range(33)], "wanted modules of up to 32 kinds, got 33"),
    ]:
        with pytest.raises(RecipeError, match=f"^groups: {message}"):
            make_space(varied, {}, NAMES, names, groups="kinds")


def test_the_first_trials_are_sober():
    space = make_space(None, {}, NAMES, MODULES)
    plain = {"weight of sql": 1.0, "weight of chat": 1.0, "gain": 1.0}
    assert space.sober() == [
        {"method": "linear", **plain},
        {"method": "tsv", **plain},
        {"method": "actmat", **plain, "ridge": 1.0},
    ]
    assert all(space.recipe(values)["scale"] == "auto" for values in space.sober())
    narrow = make_space({"method": ["ties", "dare_ties"], "gain": (2.0, 3.0)}, {}, NAMES, MODULES)
    assert narrow.sober() == [{"method": "ties", "gain": 2.0}]
    assert "gain" not in make_space(None, {"scale": 0.5}, NAMES, MODULES).varied
    assert set(DEFAULT) == {"method", "weights", "gain", "ridge", "density"}


def test_spans_and_lists_on_the_command_line():
    assert parse_space(["method=tsv,ties", "gain=0.5..2", "trim-ties=exact"]) == {
        "method": ["tsv", "ties"],
        "gain": (0.5, 2.0),
        "trim_ties": ["exact"],
    }
    for text, message in [("gain", "FIELD=LOW..HIGH"), ("gain=", "FIELD=LOW..HIGH"), ("gain=a..2", "with two numbers")]:
        with pytest.raises(RecipeError, match=rf"^vary: wanted .*{re.escape(message)}.*got '{text}'"):
            parse_space([text])
    with pytest.raises(RecipeError, match=r"^vary: wanted each field once, got gain twice"):
        parse_space(["gain=1..2", "gain=2"])


@pytest.mark.parametrize(
    ("varied", "fixed", "message"),
    [
        ({"densiti": [1]}, {}, "space: wanted one of method, "),
        ({"gain": (1, 2)}, {"gain": 1}, "gain: wanted one value of it, or several in the space, got both"),
        ({"gain": (2, 1)}, {}, "space: gain: wanted (lowest, highest), got (2, 1)"),
        ({"gain": (1, float("nan"))}, {}, "space: gain: wanted (lowest, highest)"),
        ({"gain": []}, {}, "space: gain: wanted a list of values"),
        ({"density": [[0.1, 0.2]]}, {}, "space: density: wanted plain values"),
        ({"method": ["best"]}, {}, "method: wanted one of linear"),
        ({"density": (0.5, 2.0)}, {}, "density: wanted a number from 0 to 1, got 2.0"),
        ({"gain": (0.5, 2.0)}, {"rank": 0}, "rank: wanted auto or a whole number"),
        ({}, {}, "space: wanted a field to vary, got none"),
    ],
)
def test_mistakes(varied, fixed, message):
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}"):
        make_space(varied, fixed, NAMES, MODULES)
