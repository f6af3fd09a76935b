"""What a recipe comes to: values in place of None, and a recipe of them that is the same merge."""

import json

import pytest
import yaml

from merge_engine.rules.conventions import CONVENTIONS
from merge_engine.rules.methods import METHODS, looks_at
from merge_engine.rules.recipe import Recipe
from merge_engine.rules.resolved import OF_ADAPTERS, resolved

ODD = {"density": 0.4, "scope": "tensor", "trim_ties": "keep", "normalize": False, "rescale": "l1", "seed": 7}


def recipes(method):
    """Recipes of a method: as they are, and with its options given."""
    for convention in CONVENTIONS if looks_at(method, "convention") else ["peft"]:
        yield Recipe(method=method, convention=convention)
        yield Recipe(method=method, convention=convention, scale="auto", gain=0.5)
        given = {name: value for name, value in ODD.items() if looks_at(method, name)}
        if "density" in given:
            given["density"] = {".*q": [0.4, 0.5], ".*": 0.1}
        yield Recipe(method=method, convention=convention, scale=0.3, **given)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_told_is_the_same_merge(method):
    """Through YAML and back: the same arithmetic, and the same value of every field that has an effect."""
    for recipe in recipes(method):
        told = resolved(recipe, [2.0, 1.0])
        again = Recipe.from_mapping(yaml.safe_load(yaml.safe_dump(told, sort_keys=False)))
        assert again.rule() == recipe.rule()
        assert None not in told.values() and json.dumps(told)
        assert again.weights == (2.0, 1.0) and (again.scale, again.gain) == (recipe.scale, recipe.gain)
        for module in ("a.q", "a.v"):
            assert again.densities_for(module, ["a", "b"]) == recipe.densities_for(module, ["a", "b"])
        for name in ("space", "rank", "energy", "ranks", "balance", "ridge", "gamma", "mask", "min_tasks"):
            assert getattr(again, name) == getattr(recipe, name) or not looks_at(method, name)
        assert resolved(again, [2.0, 1.0]) == told


def test_values_take_the_place_of_none():
    told = resolved(Recipe(method="ties"), [1.0, 1.0])
    assert (told["density"], told["scope"], told["trim_ties"], told["normalize"]) == (0.2, "tensor", "exact", True)
    assert "gain" not in told and "seed" not in told and "gamma" not in told
    paper = resolved(Recipe(method="ties", convention="paper"), [1.0])
    assert (paper["scope"], paper["trim_ties"]) == ("model", "keep")
    drops = [resolved(Recipe(method="dare_ties", convention=name), [1.0]) for name in ("peft", "mergekit")]
    assert [(each["rescale"], each["normalize"]) for each in drops] == [("density", True), ("l1", False)]
    linear = resolved(Recipe(method="linear", density=0.3), [1.0])
    assert linear == {"method": "linear", "weights": [1.0], "space": "delta", "scale": 1.0} | {
        "rank": "auto",
        "ranks": "one",
    }


def test_tables_of_modules_and_fields_that_are_left_out():
    recipe = Recipe(method="ties", module_densities={"a": (0.5, 1.0)}, module_weights={"a": (1.0, 2.0)}, rank=4)
    told = resolved(recipe, [1.0, 1.0], leave_out=OF_ADAPTERS)
    assert told["module_densities"] == {"a": [0.5, 1.0]} and told["module_weights"] == {"a": [1.0, 2.0]}
    assert "density" not in told and not set(OF_ADAPTERS) & set(told)
