"""Which merges a sweep or a pool asks for, and what their folders are called."""

import json
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import merge_engine
from merge_engine.errors import RecipeError
from merge_engine.rules.methods import _LOOKS, METHODS
from merge_engine.sweeps.trials import Trial, parse_axes, pool_trials, sweep_trials, text_of


def test_axes_by_hand():
    assert parse_axes(["density=0.1,2e-1", "weights=2:1:-0.5,1:1:1", "trim-ties=exact,keep", "rank=8,auto"]) == {
        "density": [0.1, 0.2],
        "weights": [[2, 1, -0.5], [1, 1, 1]],
        "trim_ties": ["exact", "keep"],
        "rank": [8, "auto"],
    }
    assert parse_axes(["normalize=true,false,none"]) == {"normalize": [True, False, None]}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["density"], "sweep: wanted FIELD=VALUE,VALUE as density=0.1,0.2, got 'density'"),
        (["density=0.1,"], "sweep: wanted FIELD=VALUE,VALUE"),
        (["density="], "sweep: wanted FIELD=VALUE,VALUE"),
        (["scale=1", "scale=2"], "sweep: wanted each field once, got scale twice"),
        (["densty=1"], "sweep: wanted one of method, .*, got 'densty'"),
        (["seed=1"], "seed: wanted one value of it, or several in the sweep, got both"),
        (["density=0.1,1.5"], "density: wanted a number from 0 to 1, got 1.5"),
        (["method=ties,tiez"], "method: wanted one of linear, .*, got 'tiez'"),
        (["weights=1:x:1"], "weights: wanted a finite number, got 'x'"),
    ],
)
def test_mistakes_in_a_sweep(axes, message):
    with pytest.raises(RecipeError, match=f"^{message}"):
        sweep_trials(parse_axes(axes), {"seed": 0}, 3)


@pytest.mark.quick
def test_names_by_hand():
    axes = parse_axes(["density=0.1,0.2", "method=ties,linear", "scale=0.5,1", "weights=2:1"])
    assert [trial.name for trial in sweep_trials(axes, {}, 2)] == [
        "ties,density=0.1,scale=0.5,weights=2_1",
        "ties,density=0.1,scale=1,weights=2_1",
        "linear,scale=0.5,weights=2_1",
        "linear,scale=1,weights=2_1",
        "ties,density=0.2,scale=0.5,weights=2_1",
        "ties,density=0.2,scale=1,weights=2_1",
    ]
    assert [trial.name for trial in sweep_trials({"density": [0.1, 0.2]}, {"method": "cat"}, 2)] == ["cat"]
    (table,) = sweep_trials({"density": [{".*q_proj": 0.3, ".*": 0.2}]}, {}, 2)
    assert re.fullmatch("density=[0-9a-f]{8}", table.name)
    assert table.recipe == {"density": {".*q_proj": 0.3, ".*": 0.2}}


VALUES = {
    "scale": st.floats(allow_nan=False, allow_infinity=False, width=32),
    "weights": st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30),
    "density": st.one_of(st.floats(0.01, 1), st.dictionaries(st.text("abc.*/", max_size=8), st.floats(0, 1))),
    "election": st.sampled_from(["total", "frequency"]),
}


@given(st.fixed_dictionaries({name: st.lists(values, min_size=1, max_size=3) for name, values in VALUES.items()}))
def test_names_are_safe_and_tell_trials_apart(axes):
    for axis in axes["density"]:
        if isinstance(axis, dict):
            for pattern in axis:
                try:
                    re.compile(pattern)
                except re.error:
                    return
    trials = sweep_trials(axes, {}, 2)
    names = [trial.name for trial in trials]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9=.,_+-]{1,200}", name) for name in names), names
    distinct = math.prod(len({json.dumps(value) for value in values}) for values in axes.values())
    assert len(trials) == distinct


@given(st.one_of(VALUES["scale"], VALUES["weights"], st.integers(), st.booleans(), st.none()))
def test_a_value_is_read_as_it_is_written(value):
    assert parse_axes([f"field={text_of(value)}"]) == {"field": [value]}


PAIRS = {
    "density": [0.3, 0.6],
    "convention": ["peft", "mergekit", "paper"],
    "scope": ["tensor", "model"],
    "trim_ties": ["exact", "keep"],
    "seed": [0, 1],
    "rescale": ["density", "l1"],
    "election": ["total", "frequency"],
    "normalize": [True, False],
    "space": ["delta", "factors"],
    "gamma": [0.0, 0.3],
    "mask": [0.3, 2.0],
    "min_tasks": [1, 3],
    "ridge": [0.0, 1.0],
    "balance": [None, "pico"],
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_ignores_what_it_is_said_to_ignore(three, method):
    """Merges that differ in one field only: made once if, and only if, their bits are the same."""
    assert PAIRS.keys() == _LOOKS.keys() - {"module_densities"}
    for field, values in PAIRS.items():
        fixed = {"method": method, "weights": [-2.0, 1.0, -1.0]}
        if field not in ("density", "convention", "scope") and METHODS[method].keep != "all":
            fixed["density"] = 0.3
        recipes = [{**fixed, field: value} for value in values]
        try:
            made = len(sweep_trials({field: values}, fixed, 3))
        except RecipeError:  # the method takes one of the values only
            made = 1
        try:
            results = [merge_engine.merge(three, **recipe).modules for recipe in recipes]
        except RecipeError:
            assert made == 1, field
            continue
        first, *others = [torch.cat([(each.B @ each.A).flatten() for each in result.values()]) for result in results]
        assert made == (1 if all(torch.equal(first, other) for other in others) else len(values)), field


@pytest.mark.quick
def test_a_pool_by_hand(three):
    pool = {"s": three[0], "c": three[1], "a": three[2]}
    merges = [
        {"name": "one", "adapters": ["a", "s"], "method": "linear", "weights": [2, 1]},
        {"name": "two", "density": 0.3},
    ]
    sources, (one, two) = pool_trials(merges, pool, {"density": 0.1, "scale": 2})
    assert sources == list(map(str, three))
    told = {"adapters": "a+s", "method": "linear", "weights": [2, 1]}
    recipe = {"density": 0.1, "scale": 2, "method": "linear", "weights": [2, 1]}
    assert one == Trial("one", told, recipe, (2, 0))
    assert two == Trial("two", {"adapters": "s+c+a", "density": 0.3}, {"density": 0.3, "scale": 2}, (0, 1, 2))
    assert pool_trials([{"name": "x", "adapters": ["ads"]}], three, {})[1][0].adapters == (2,)


@pytest.mark.parametrize(
    ("merges", "message"),
    [
        ([], "merges: wanted a list of merges, got \\[\\]"),
        ([{"method": "ties"}], "merges: wanted a table with the name of a folder as entry 1, got {'method': 'ties'}"),
        ([{"name": "../x"}], "merges: wanted a table with the name of a folder as entry 1"),
        ([{"name": ""}], "merges: wanted a table with the name of a folder as entry 1"),
        ([{"name": "x"}, {"name": "x"}], "merges: wanted each name once, got x twice"),
        ([{"name": "x", "adapters": "sql"}], "merges: x: adapters: wanted a list of names, got 'sql'"),
        ([{"name": "x", "adapters": ["sq"]}], "merges: x: adapters: wanted one of sql, chat, sql, got 'sq'"),
        ([{"name": "x", "adapters": ["sql"]}], "merges: x: adapters: .*, got 'sql', the name of 2"),
        ([{"name": "x", "densty": 1}], "merges: x: recipe: wanted one of method, .*, got 'densty'"),
    ],
)
def test_mistakes_in_a_pool(merges, message):
    with pytest.raises(RecipeError, match=f"^{message}"):
        pool_trials(merges, ["here/sql", "chat", "there/sql"], {})


def test_a_sweep_over_methods_leaves_out_what_a_method_would_refuse():
    axes = {"method": ["ties", "tsv", "actmat"], "scale": [1, "auto"], "gain": [1.0, 1.4]}
    trials = sweep_trials(axes, {"density": 0.3, "ridge": 0.5, "rank": 8}, 3)
    recipes = {trial.name: trial.recipe for trial in trials}
    assert recipes["ties,scale=1"] == {"method": "ties", "scale": 1, "density": 0.3, "rank": 8}
    assert recipes["tsv,scale=auto,gain=1.4"] == {"method": "tsv", "scale": "auto", "gain": 1.4, "rank": 8}
    assert recipes["actmat,scale=1"] == {"method": "actmat", "scale": 1, "ridge": 0.5, "rank": 8}
    assert len(trials) == 9  # three methods, each at scale 1 and at two gains
    with pytest.raises(RecipeError, match="density: tsv does not know it"):
        sweep_trials({"scale": [1, 2]}, {"method": "tsv", "density": 0.3}, 3)


def test_millions_of_combinations_are_refused_before_they_are_made():
    axes = {"density": [(i + 1) / 4000 for i in range(2000)], "seed": list(range(2000))}
    with pytest.raises(RecipeError, match="sweep: wanted at most 20000 combinations, got 4000000"):
        sweep_trials(axes, {}, 2)
