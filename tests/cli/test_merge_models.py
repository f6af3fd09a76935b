"""merge-engine merge-models."""

import pytest
from mergekit_oracle import save_home
from tuned_models import save_model, save_three, weights_of

import merge_engine
from merge_engine.cli.main import main, make_parser


def test_the_command_equals_the_api(tmp_path, capsys):
    base = save_model(tmp_path / "base", 0)
    three = save_three(base)
    options = [*three, "-o", tmp_path / "one", "--base", base, "--convention", "paper"]
    assert main(["merge-models", *map(str, options)]) == 0
    assert "3 inputs, 7 tensors merged, 1 copied" in capsys.readouterr().out
    merge_engine.merge_models(base, three, tmp_path / "two", convention="paper")
    assert weights_of(tmp_path / "one").keys() == weights_of(base).keys()
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert main(["merge-models", str(three[0]), "--base", str(base), "-o", str(tmp_path / "alone")]) == 0
    assert "alone: 1 input, 7 tensors merged" in capsys.readouterr().out
    assert main(["merge-models", *map(str, three), "-o", str(tmp_path / "three")]) == 2
    assert (
        "base: ties takes changes of a base, and at least 1 of them; wanted --base, got none" in capsys.readouterr().err
    )


SLERP = {"merge_method": "slerp", "base_model": "ft1", "models": [{"model": "ft2"}], "parameters": {"t": 0.25}}
STOCK = {"merge_method": "model_stock", "base_model": "base", "parameters": {"filter_wise": True}}
DELLA = {"merge_method": "della", "base_model": "base", "parameters": {"epsilon": 0.1, "lambda": 0.5}}


@pytest.mark.parametrize(
    ("options", "recipe"),
    [
        ("--method slerp --t 0.25 ft1 ft2", SLERP),
        ("--method slerp --t 0.25 ft1 ft2 --base ft1", SLERP),
        (
            "--method model_stock --filter-wise --base base ft1 ft2 lo1",
            STOCK | {"models": [{"model": name} for name in ("ft1", "ft2", "base+lo1")]},
        ),
        (
            "--method della --base base ft1 ft2 --weights 1 0.5 --density 0.6 --epsilon 0.1 --scale 0.5 --seed 3",
            DELLA
            | {
                "models": [
                    {"model": "ft1", "parameters": {"weight": 1.0, "density": 0.6}},
                    {"model": "ft2", "parameters": {"weight": 0.5, "density": 0.6}},
                ]
            },
        ),
        (
            "--method linear ft1 ft2 --weights 1 3 --dtype bfloat16",
            {
                "merge_method": "linear",
                "out_dtype": "bfloat16",
                "models": [{"model": n, "parameters": {"weight": w}} for n, w in (("ft1", 1.0), ("ft2", 3.0))],
            },
        ),
    ],
)
def test_whole_tensors_by_options_and_by_recipe(tmp_path, monkeypatch, options, recipe):
    monkeypatch.chdir(save_home(tmp_path))
    assert main(["merge-models", *options.split(), "-o", "one"]) == 0
    merge_engine.merge_recipe(recipe, "two", convention="published", seed=3 if "--seed" in options else 0)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


@pytest.mark.quick
def test_the_help_says_which_methods_have_which_conventions_and_defaults():
    text = " ".join(make_parser()._subparsers._group_actions[0].choices["merge-models"].format_help().split())
    engine, whole = "peft (default), mergekit or paper", "published (default) or mergekit"
    assert f"whose arithmetic to follow: {engine}; of methods of whole tensors, and without --base: {whole}" in text
    assert "default: 0.15 (della, della_linear), 1e-05 (ram, ramplus_tl) --t X slerp, nearswap: as in" in text
    assert "default: none --nuslerp-row-wise" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("ft1 ft2 --method slerp --t 0.5 --density 0.5", "--density: slerp does not know it; it belongs to task_ar"),
        (
            "--method slerp ft1 ft2",
            "t: slerp has no default; wanted --t X (in a recipe file parameters: {t: X}), got n",
        ),
        ("--method slerp --t 0.5 ft1", "models: slerp takes 2 models, one of them the base, got none besides ft1"),
        (
            "--method model_stock ft1 ft2",
            "base: model_stock takes changes of a base, and at least 2 of them",
        ),
        ("--method karcher ft1 lo1", "base: lo1 is an adapter; wanted the model that it is on (--base), got none"),
        ("--method linear ft1 ft2 --weights 1 2 3", "weight: wanted 1 or 2 numbers, one for each model but the base"),
        (
            "--method slerp --t 1 ft1 ft2 --convention paper",
            "--convention: slerp has published and mergekit, got 'paper'",
        ),
        (
            "--method slerp --t 1 ft1 ft2 --convention peft",
            "--convention: slerp has published and mergekit, got 'peft'",
        ),
        (
            "--method linear ft1 ft2 --convention peft",
            "--convention: linear without --base has published and mergekit, got 'peft'",
        ),
        (
            "--base base ft1 ft2 --convention published",
            "--convention: ties with --base has peft, mergekit and paper, got 'published'",
        ),
    ],
)
def test_what_whole_tensors_do_not_take_is_said(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(save_home(tmp_path))
    assert main(["merge-models", *options.split(), "-o", "out"]) == 2
    assert capsys.readouterr().err.startswith(f"merge-engine: error: {message}")
    assert not (tmp_path / "out").exists()
