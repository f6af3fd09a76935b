"""Patterns are matched as by Python's `re`, and none takes long."""

import random
import re
import warnings

import pytest

from merge_engine.errors import RecipeError
from merge_engine.rules.matching import Pattern

PEFT = r"(.*\.)?"  # what PEFT puts before a pattern
LAYERS = [f"model.layers.{layer}.{part}_proj" for layer in range(12) for part in ("q", "v", "up")]


def pattern(text):
    return Pattern(PEFT, text, "x", RecipeError)


class Drawn:
    """Random patterns of every construct that is matched, and random names."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def atom(self, depth):
        draw = self.random.choice
        kind = self.random.random()
        if kind < 0.35 or not depth:
            return draw(["a", "b", ".", r"\.", "1", "_", "A", "é", "\u017f", "s", ""])
        if kind < 0.5:
            return draw(["[ab]", "[^a]", r"\d", r"\w", r"\W", r"[\d_]", "[a-b1]", r"[^\w.]", r"\D"])
        if kind < 0.58:
            return draw(["^", "$", r"\b", r"\B", r"\A", r"\Z"])
        if kind < 0.75:
            return f"({draw(['', '?:', '?i:', '?s:', '?m:', '?a:', '?-i:'])}{self.text(depth - 1)})"
        if kind < 0.82:
            return f"(?{draw('=!')}{self.text(depth - 1)})"
        if kind < 0.86:
            return f"(?<{draw('=!')}{draw(['a', 'ab', '[ab].', '.', 'a|b', '^', '$'])})"
        return f"(?:{self.text(depth - 1)}){draw(['*', '+', '?', '*?', '+?', '??', '{2}', '{1,2}', '{0,3}?', '{2,}'])}"

    def text(self, depth=3):
        alternatives = []
        for _ in range(self.random.choice([1, 1, 1, 2, 3])):
            atoms = [self.atom(depth) for _ in range(self.random.randint(0, 4))]
            alternatives.append("".join(f"{each}{self.random.choice(['', '', '', '*?', '{2}'])}" for each in atoms))
        return "|".join(alternatives)

    def name(self):
        return "".join(self.random.choice("ab.ab.ab.1_Aé\u017fsK\n") for _ in range(self.random.randint(0, 8)))


def test_patterns_match_what_python_matches():
    drawn, compared = Drawn(0), 0
    for _ in range(1500):
        text = drawn.text()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                oracle = re.compile(f"{PEFT}({text})$")
        except re.error:
            with pytest.raises(RecipeError, match="x is no regular expression"):
                pattern(text)
            continue
        ours = pattern(text)
        for name in (drawn.name(), drawn.name()):
            assert ours.match(name) == bool(oracle.match(name)), (text, name)
            compared += 1
    assert compared > 1000


@pytest.mark.parametrize(
    "text",
    [
        "q_proj",
        r"model\.layers\.3\.q_proj",
        r".*\.layers\.(0|1|11)\.q_proj",
        "(?i:Q)_.*",
        "a)|(.*v_proj",
        "(?P<a>q|v)_proj",
    ],
)
def test_patterns_of_real_files(text):
    assert [pattern(text).match(name) for name in LAYERS] == [
        bool(re.match(f"{PEFT}({text})$", name)) for name in LAYERS
    ]


@pytest.mark.parametrize(
    "text",
    [
        "(.*)*(.*)*(.*)*z",
        "(a|a|.)*" * 30 + "z",
        "(.{0,1000}){0,1000}z",
        "(.?){3000}.{3000}",
        "(((((((((.?.?)*)*)*)*)*)*)*)*)*z",
        "(?=.*(?=.*(?=.*z)))" * 5 + ".*",
        "([a-z.]+)+[0-9]",
    ],
)
def test_a_pattern_with_many_ways_does_not_hang(text):
    assert not any(pattern(text).match(name) for name in LAYERS)


def test_one_pattern_takes_so_many_steps_at_most():
    with pytest.raises(RecipeError, match="x takes too many steps for 'abab"):
        pattern("((?=(.|..)*z)|.)*z").match("ab" * 1000)
    with pytest.raises(RecipeError, match="names of at most 10000 letters, got 10001"):
        pattern(".*").match("a" * 10001)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(", "x is no regular expression: missing \\)"),
        ("(?<=a*)b", "x is no regular expression: look-behind requires fixed-width pattern"),
        ("a{99999999999999999999}", "x is no regular expression: the repetition number is too large"),
        ("(" * 3000 + ")" * 3000, "x "),
        ("(" * 60 + ")" * 60, "x has groups in groups, wanted at most 50 deep"),
        ("a" * 100_001, "x has 100001 letters, wanted at most 100000"),
        (r"(a)\3", "x has a back-reference, which is not supported"),
        (r"(a)?(?(3)b|c)", "x has a condition, which is not supported"),
    ],
)
def test_patterns_that_are_refused(text, message):
    with pytest.raises(RecipeError, match=f"^{message}"):
        pattern(text)
