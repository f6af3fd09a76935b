"""Recipes: what is wrong in one is said by field, wanted and got."""

import re

import numpy as np
import pytest
import torch
from plain_adapters import save_three

import merge_engine
from merge_engine.errors import RecipeError
from merge_engine.rules.recipe import Recipe


@pytest.fixture
def three(tmp_path):
    return save_three(tmp_path)


def bad(**kwargs):
    """A mistake in the recipe, and the one line that names it."""
    message = kwargs.pop("message")
    return pytest.param(kwargs, message, id=message[:40])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        bad(method="tiez", message="method: wanted one of linear, cat, magnitude_prune, ties, dare_linear, dare_ties"),
        bad(weights=[1, 2], message="weights: wanted 3, one for each of sql, chat, ads, got 2"),
        bad(weights=[1, 2, float("nan")], message="weights: wanted a finite number, got nan"),
        bad(weights="1 2 3", message="weights: wanted a list of numbers, got '1 2 3'"),
        bad(density=1.5, message="density: wanted a number from 0 to 1, got 1.5"),
        bad(density=-0.1, message="density: wanted a number from 0 to 1, got -0.1"),
        bad(density="half", message="density: wanted a number from 0 to 1, got 'half'"),
        bad(density={"(": 0.5}, message=r"density: pattern '\(' is no regular expression: "),
        bad(density={"q": 2}, message="density: wanted a number from 0 to 1, got 2"),
        bad(density={"k_proj": 0.2}, message=r"density: no pattern of k_proj matches layers.0.q_proj; '\.\*' matches"),
        bad(density=[0.1, 0.2], message="density: wanted one number or 3, got 2"),
        bad(
            method="dare_ties",
            density=0.0,
            message="density: dare_ties divides by it, wanted a number above 0, got 0.0",
        ),
        bad(
            scope="model",
            density={"layers.0.*": 0.1, ".*": 0.2},
            message="density: scope='model' has one threshold for all of sql, wanted one density, got 0.1, 0.2",
        ),
        bad(space="deltas", message="space: wanted one of delta, factors, core, knots, got 'deltas'"),
        bad(convention="peff", message="convention: wanted one of peft, mergekit, paper, got 'peff'"),
        bad(scale=float("inf"), message="scale: wanted a finite number, got inf"),
        bad(scale="auto", gain={"k_proj": 2}, message="gain: no pattern of k_proj matches layers.0.q_proj;"),
        bad(scale="auto", gain={"(": 2}, message=r"gain: pattern '\(' is no regular expression: "),
        bad(scale="auto", gain={".*": "2"}, message=r"gain: \.\*: wanted a finite number, got '2'; write it as 2\.0"),
        bad(
            scale="auto", gain={}, message="gain: wanted a number, or a table of patterns and numbers, got an empty one"
        ),
        bad(gain={".*": 2}, message="gain: multiplies scale='auto', wanted that with it, got scale 1.0"),
        bad(scale=1e39, message=r"scale: wanted a number that float32 holds, got 1e\+39"),
        bad(weights=[1, 2, -1e300], message=r"weights: wanted a number that float32 holds, got -1e\+300"),
        bad(seed=True, message="seed: wanted a whole number from 0 to"),
        bad(method=["ties"], message=r"method: wanted one of .*, got \['ties'\]"),
        bad(dtype=torch.float64, message="dtype: wanted one of float32, float16, bfloat16, got 'float64'"),
        bad(seed=-1, message=r"seed: wanted a whole number from 0 to 2\*\*64 - 1, got -1"),
        bad(rank=0, message="rank: wanted auto or a whole number of at least 1, got 0"),
        bad(rank="8", message="rank: wanted auto or a whole number of at least 1, got '8'"),
        bad(energy=0.0, message="energy: wanted a number above 0 and up to 1, got 0.0"),
        bad(dtype="int8", message="dtype: wanted one of float32, float16, bfloat16, got 'int8'"),
        bad(ranks="two", message="ranks: wanted one of one, own, got 'two'"),
        bad(ranks=["one"], message=r"ranks: wanted one of one, own, got \['one'\]"),
        bad(method="cat", rank=4, message="rank: cat stacks the factors"),
        bad(lambda_=1, message="recipe: wanted one of method, .*, got 'lambda_'"),
    ],
)
def test_mistakes_in_the_recipe(three, tmp_path, recipe, message):
    with pytest.raises(RecipeError, match=f"^{message}"):
        merge_engine.merge(three, tmp_path / "out", **recipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ads", "chat", "sql"]


def test_arrays_and_tensors_are_numbers(three):
    """What a search over weights holds."""
    plain = merge_engine.merge(three, method="ties", weights=[2.0, 1.0, -0.5], density=[0.25, 0.5, 0.75], scale=0.5)
    given = {"weights": [np.float32(2), np.array(1), -0.5], "density": torch.tensor([0.25, 0.5, 0.75])}
    merged = merge_engine.merge(three, method="ties", scale=np.float32(0.5), seed=np.int64(3), **given)
    assert merged.plan.recipe.weights == (2.0, 1.0, -0.5) and merged.plan.recipe.density == [0.25, 0.5, 0.75]
    for name, module in plain.modules.items():
        assert torch.equal(merged.modules[name].A, module.A) and torch.equal(merged.modules[name].B, module.B)
    assert len(repr(merged)) < 200


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"normalize": True, "method": "linear"}, "normalize: wanted true or false, of ties or dare_ties, got True"),
        ({"normalize": 1}, "normalize: wanted true or false, of ties or dare_ties, got 1"),
        ({"rescale": "l1"}, "rescale: wanted density or l1, of random drops, got 'l1'"),
        ({"rescale": "l2", "method": "dare_ties"}, "rescale: wanted density or l1, of random drops, got 'l2'"),
        (
            {"method": "dare_linear", "density": 1e-11},
            "density: dare_linear divides by it, wanted a number above 0, got 1e-11",
        ),
        ({"module_weights": {"a": 1.0}}, "module_weights: a: wanted a list of numbers, got 1.0"),
        ({"module_weights": {"a": [float("inf")]}}, "module_weights: a: wanted a finite number, got inf"),
        ({"module_densities": {"a": [2.0]}}, "density: wanted a number from 0 to 1, got 2.0"),
        ({"module_densities": {}, "density": 0.5}, "density: wanted density or module_densities, got both"),
    ],
)
def test_mistakes_in_the_fields_behind_it(fields, message):
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
        Recipe(**fields)


@pytest.mark.quick
def test_weights_of_a_module_multiply_those_of_its_block_or_else_of_the_model():
    fields = {
        "weights": [3, -1],
        "block_weights": {"sql": {".*mlp": 0.5}},
        "module_weights": {"mlp": (2, 5), "q": (7, 1)},
    }
    recipe = Recipe(method="linear", **fields)
    wanted = {None: (3, -1), "mlp": (0.5 * 2, -1 * 5), "q": (3 * 7, -1)}
    assert {module: recipe.weights_for(["sql", "chat"], module) for module in wanted} == wanted


@pytest.mark.parametrize("value", [0, [], "", False])
@pytest.mark.parametrize("field", ["scope", "trim_ties"])
def test_what_counts_as_false_is_no_way_to_leave_a_field_out(field, value):
    with pytest.raises(RecipeError, match=rf"{field}: wanted one of "):
        Recipe(method="ties", **{field: value}).rule()
