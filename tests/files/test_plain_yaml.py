"""YAML that a stranger has written: what is read, and what is refused at once."""

import os
import time

import pytest
import yaml

from merge_engine.errors import RecipeError
from merge_engine.files.plain_yaml import VALUES, load_documents
from merge_engine.files.text import read_yaml

BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
READ = """
method: ties
normalize: yes
rank: null
seed: 0x1F
weights: &w [1, 2.5, -1e-3, .inf]
again: *w
tables: {a: {b: c}, 5: six}
whole: !!str 12
merged: {<<: {x: 1}, y: 2}
"""
REFUSED = {
    "seed: !!int x": "line 1: 'x' is not of the type int",
    "seed: !!bool x": "line 1: 'x' is not of the type bool",
    "seed: !!float x": "line 1: 'x' is not of the type float",
    "seed: !!timestamp x": "could not determine a constructor for the tag",
    "seed: !!binary AA==": "could not determine a constructor for the tag",
    "a: !!set {b, c}": "could not determine a constructor for the tag",
    "a: !!python/object:os.system x": "could not determine a constructor for the tag",
    "scale: 1" + 400 * "0": "wanted a number of at most 300 digits, got 401",
    "seed: " + 5000 * "9": "wanted a number of at most 300 digits, got 5000",
    "scale: " + 60 * "[[" + 60 * "]]": "wanted tables and lists at most 64 deep",
    "scale: " + 5000 * "[" + 5000 * "]": "wanted tables and lists at most 64 deep",
    "scale: &a [*a]": "line 1: a list or table holds itself",
    'base: "a\\0b"': "has a NUL in it",
    "? [a]\n: 3": "unhashable key",
    "a: 1\nb: 2\na: 3": "wanted a once in a table, got it 2 times",
    BOMB: f"wanted at most {VALUES} values",
    "a: " + 9_000_000 * "b": "wanted at most 8388608 letters",
}


@pytest.mark.quick
def test_plain_values_are_those_of_the_safe_loader():
    assert load_documents(READ) == [yaml.safe_load(READ)]
    assert load_documents("a: 1\n---\nb: 2\n") == [{"a": 1}, {"b": 2}]
    assert load_documents("day: 2020-13-45\nother: 2020-01-02") == [{"day": "2020-13-45", "other": "2020-01-02"}]


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_what_no_recipe_has_is_refused_by_one_error(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_yaml(tmp_path / "r.yaml")
    assert REFUSED[text] in str(caught.value) and "r.yaml: " in str(caught.value) and len(str(caught.value)) < 500


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match=r"r\.yaml: cannot be read: wanted a file"):
        read_yaml(tmp_path / "r.yaml")


def test_time_is_linear_in_the_number_of_keys(tmp_path):
    """10,000 keys took 55 s where each was counted in all."""
    (tmp_path / "r.yaml").write_text("".join(f"k{i}: {i}\n" for i in range(10_000)))
    start = time.perf_counter()
    assert len(read_yaml(tmp_path / "r.yaml")) == 10_000
    assert time.perf_counter() - start < 20
