"""A recipe with what its fields come to: what was left out is said, and what has no effect is not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from merge_engine.rules.methods import looks_at
from merge_engine.rules.recipe import DEFAULT_DENSITY, Recipe
from merge_engine.rules.rule import Rule

# What None stands for, in the fields where it stands for something.
_STANDS_FOR: dict[str, Callable[[Rule], Any]] = {
    "density": lambda rule: DEFAULT_DENSITY,
    "scope": lambda rule: rule.scope,
    "trim_ties": lambda rule: rule.trim_ties,
    "normalize": lambda rule: rule.divisor != "one",
    "rescale": lambda rule: "l1" if rule.l1_rescale else "density",
}
OF_ADAPTERS = ("rank", "energy", "ranks")  # fields that a merge into a base has not


def resolved(recipe: Recipe, weights: Sequence[float], leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """{field: value} of every field that has a value and that the method looks at; a `Recipe` of them is the same.

    weights: one an input, as they were merged. leave_out: fields that are not told. Values are plain, as in YAML.
    """
    rule = recipe.rule()
    fields = replace(recipe, weights=tuple(weights)).as_dict()
    if recipe.module_densities is not None:
        del fields["density"]
    if recipe.scale != "auto":
        del fields["gain"]
    found = {}
    for name, value in fields.items():
        if name in leave_out or not looks_at(recipe.method, name):
            continue
        if value is None and name in _STANDS_FOR:
            value = _STANDS_FOR[name](rule)
        if value is not None:
            found[name] = dict(value) if isinstance(value, Mapping) else value
    return found
