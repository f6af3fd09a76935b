"""What editors and docstrings say of a recipe is what a recipe has."""

import inspect
import re
from dataclasses import fields
from typing import get_type_hints

import pytest

import merge_engine
from merge_engine.rules import guesses
from merge_engine.rules.fields import BoundFields, RecipeFields
from merge_engine.rules.recipe import Recipe


def test_editors_know_every_field_and_peft_s_names():
    own = {each.name for each in fields(Recipe)}
    assert set(get_type_hints(RecipeFields)) == own | set(guesses.FIELDS) | {"combination_type"}
    assert set(get_type_hints(BoundFields)) == set(get_type_hints(RecipeFields)) | {"adapters"}


@pytest.mark.parametrize("field", fields(Recipe), ids=lambda field: field.name)
def test_the_docstring_of_merge_has_every_field_with_its_default(field):
    text = " ".join(inspect.getdoc(merge_engine.merge).partition("Fields of the recipe")[2].split())
    found = re.search(rf"\b{field.name}(?:, \w+)*: (\"?[\w.]+\"?)", text)
    assert found, "not in the docstring"
    default = f'"{field.default}"' if isinstance(field.default, str) else str(field.default)
    assert found[1].rstrip(".") == default


@pytest.mark.parametrize("function", [merge_engine.merge, merge_engine.merge_into, merge_engine.merge_models])
def test_functions_have_typed_fields(function):
    recipe = inspect.signature(function).parameters["recipe"]
    assert recipe.kind is inspect.Parameter.VAR_KEYWORD
    assert "RecipeFields" in str(recipe.annotation)
