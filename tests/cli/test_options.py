"""Options that commands share, and recipe files."""

import pytest
from command_line import run_cli
from plain_adapters import assert_same

import merge_engine
from merge_engine.cli.options import CHOICES
from merge_engine.engine.choose_backend import BACKENDS
from merge_engine.rules.methods import METHODS
from merge_engine.rules.recipe import DTYPES, Recipe
from merge_engine.rules.rule import CONVENTIONS


@pytest.mark.parametrize(
    ("options", "recipe"),
    [
        ("--density 0.1 0.2 0.3", {"density": [0.1, 0.2, 0.3]}),
        ("--density layers.0.*=0.1 .*=0.4", {"density": {"layers.0.*": 0.1, ".*": 0.4}}),
        ("--scale auto --gain 0.5", {"scale": "auto", "gain": 0.5}),
        ("--scale auto --gain layers.0.*=2 .*=1", {"scale": "auto", "gain": {"layers.0.*": 2, ".*": 1}}),
    ],
)
def test_numbers_by_adapter_and_by_pattern(three, tmp_path, capsys, options, recipe):
    code, _, err = run_cli(capsys, "merge", *options.split(), *three, "-o", tmp_path / "cli")
    assert (code, err) == (0, "")
    merge_engine.merge(three, tmp_path / "api", **recipe)
    assert_same(tmp_path / "cli", tmp_path / "api")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--density q=0.1 0.2", "--density: wanted numbers or PATTERN=NUMBER, not both, got q=0.1 0.2"),
        ("--scale auto --gain q=x", "--gain: wanted numbers or PATTERN=NUMBER, got q=x"),
        ("--scale auto --gain 1 2", "--gain: wanted a finite number, got [1.0, 2.0]"),
        (
            "--scale auto --gain q_projx=2",
            "--gain: no pattern of q_projx matches layers.0.q_proj; '.*' matches the rest",
        ),
        (
            "--weights 2 1 1 sql:q_projx=0.5",
            "--weights: 'q_projx' matches no module of sql; wanted one of them, as layers.0.q_proj",
        ),
    ],
)
def test_mistakes_in_numbers_name_the_option(three, tmp_path, capsys, options, message):
    given = [*three, "-o", tmp_path / "out", *options.split()]
    assert run_cli(capsys, "merge", *given) == (2, "", f"merge-engine: error: {message}\n")


def test_recipe_file_and_options_over_it(three, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"adapters: [{', '.join(map(str, three))}]\noutput: {tmp_path / 'one'}\nmethod: ties\n"
        'density: {"layers.0.*": 0.3, ".*": [0.1, 0.2, 0.3]}\nweights: [2, 1, 1]\n'
    )
    assert run_cli(capsys, "merge", recipe)[0] == 0
    density = {"layers.0.*": 0.3, ".*": [0.1, 0.2, 0.3]}
    merge_engine.merge(three, tmp_path / "api", method="ties", density=density, weights=[2, 1, 1])
    assert_same(tmp_path / "one", tmp_path / "api")
    assert run_cli(capsys, "merge", recipe, "-o", tmp_path / "two", "--method", "linear")[0] == 0
    merge_engine.merge(three, tmp_path / "linear", method="linear", weights=[2, 1, 1])
    assert_same(tmp_path / "two", tmp_path / "linear")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: ties", "recipe.yaml: wanted a table of keys with a list of adapters"),
        ("[1, 2", "recipe.yaml: cannot be read: "),
        ("adapters: [a]\nmethods: ties\noutput: o", "recipe: wanted one of method, .*, got 'methods'"),
        ("adapters: [a]", "output: wanted a folder to write to"),
        ("adapters: [a, 7]\noutput: o", "recipe.yaml: adapters: wanted folders or hub ids, got 7"),
        ("adapters: [a, [b]]\noutput: o", "recipe.yaml: adapters: wanted folders or hub ids, got "),
        ("adapters: {a: [b]}\nmerges: []\noutput: o", "recipe.yaml: adapters: wanted folders or hub ids, got "),
        ("adapters: [a]\noutput: 5", "recipe.yaml: output: wanted text, got 5"),
        ("adapters: [a]\noutput: o\ninto: [b]", "recipe.yaml: into: wanted text, got "),
        ("adapters: [a]\noutput: o\noverwrite: 'no'", "recipe.yaml: overwrite: wanted true or false, got 'no'"),
        ("adapters: [a]\noutput: o\ninto: b\ndry_run: 1", "recipe.yaml: dry_run: wanted true or false, got 1"),
        ("adapters: [a]\noutput: o\nmethod: [ties]", "method: wanted one of linear, .*, got \\['ties'\\]"),
        ("adapters: [a]\noutput: o\nelection: {}", "election: wanted one of total, frequency, got {}"),
        ("adapters: [a]\noutput: o\ndensity: {1: 0.1}", "density: wanted a pattern of module names, got 1"),
        ("adapters: [a]\noutput: o\ndensity: &d {'.*': *d}", "line 3: a list or table holds itself"),
        ("adapters: [a]\noutput: o\nscale: 1e-1", "scale: wanted a finite number, got '1e-1'; write it as 0.1"),
        ("adapters: [a]\noutput: o\nmethod: ties\nmethod: linear", "wanted method once in a table, got it 2 times"),
        ("adapters: {a: b, a: c}\nmerges: []", "wanted a once in a table, got it 2 times"),
    ],
)
def test_recipe_file_mistakes(tmp_path, capsys, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    code, out, err = run_cli(capsys, "merge", tmp_path / "recipe.yaml")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(err)


@pytest.mark.quick
def test_the_commands_choices_are_the_tables():
    assert CHOICES["method"] == tuple(METHODS)
    assert CHOICES["convention"] == tuple(CONVENTIONS)
    assert CHOICES["dtype"] == tuple(DTYPES)
    assert CHOICES["backend"] == BACKENDS
    for name, choices in CHOICES.items():
        for choice in choices if name != "backend" else ():
            assert getattr(Recipe(**{name: choice}), name) == choice
