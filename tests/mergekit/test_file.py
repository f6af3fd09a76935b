"""mergekit's YAML: every key is understood or refused."""

import pytest
from mergekit_oracle import TIES, model, put, recipe

from merge_engine.errors import RecipeError
from merge_engine.mergekit.file import read_recipe
from merge_engine.mergekit.reader import Clause
from merge_engine.mergekit.recipe import merge_recipe


def test_switches_take_the_lower_value():
    clause = Clause(None, (True, False, True))
    assert [clause.at(depth) for depth in (0, 0.25, 0.5, 0.75, 1)] == [True, True, False, False, True]


def test_a_revision_is_read():
    asked = read_recipe(recipe("ties", model("me/tuned@v2+you/lora@main", weight=1), base="me/tuned@v2"))
    (entry, _) = asked.slices[0].entries
    assert (str(asked.base), str(entry.reference)) == ("me/tuned@v2", "me/tuned@v2+you/lora@main")
    assert (entry.reference.revision, entry.reference.lora.path, entry.reference.lora.revision) == (
        "v2",
        "you/lora",
        "main",
    )


def bad(change, message):
    return pytest.param(change, message, id=message[:50])


@pytest.mark.quick
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        bad(put("name", "x"), "recipe: name is not supported; wanted one of merge_method, base_model, models, "),
        bad(put("modules", {}), "recipe: modules is not supported"),
        bad(put("chat_template", "auto"), "recipe: chat_template is not supported"),
        bad(
            put("models/0/weight", 1), r"recipe: models\[0\]: weight is not supported; wanted one of model, parameters"
        ),
        bad(
            put("models/1/parameters/gamma", 1),
            r"recipe: models\[1\].parameters: gamma is not supported; wanted one of",
        ),
        bad(put("parameters/epsilon", 1), "recipe: parameters: epsilon is not supported"),
        bad(
            put("models/0/parameters/weight", [{"filter": "mlp", "values": 1}]),
            r"recipe: models\[0\].parameters.weight\[0\]: values is not supported; wanted one of filter, value",
        ),
        bad(
            put("models/0/model", {"model": "ft1", "override_architecture": "x"}),
            r"recipe: models\[0\].model: override_architecture is not supported",
        ),
        bad(
            put("models/0/model", {"model": {"path": "ft1", "x": 1}}), r"recipe: models\[0\].model.model: x is not supp"
        ),
        bad(put("tokenizer/pad_to_multiple_of", 8), "recipe: tokenizer: pad_to_multiple_of is not supported"),
        bad(put("tokenizer/tokens", {}), "recipe: tokenizer: tokens is not supported; wanted one of source"),
        bad(
            put("merge_method", "slerp"), "recipe: merge_method: wanted one of linear, task_arithmetic, .*, got 'slerp'"
        ),
        bad(put("merge_method", ["ties"]), r"recipe: merge_method: wanted one of .*, got \['ties'\]"),
        bad(put("slices", [{}]), "recipe: wanted either models or slices, got both"),
        bad(put("models", None), "recipe: wanted either models or slices, got neither"),
        bad(put("models", []), r"recipe: models: wanted a list, got \[\]"),
        bad(put("models/0", "ft1"), r"recipe: models\[0\]: wanted a table of keys, got 'ft1'"),
        bad(put("models/0/model", None), r"recipe: models\[0\].model: wanted model or model\+lora, got None"),
        bad(put("models/0/model", "a+b+c"), r"recipe: models\[0\].model: wanted model or model\+lora, got 'a\+b\+c'"),
        bad(put("models/0/model", "a@b@c"), r"recipe: models\[0\].model: wanted a path, or path@revision, got 'a@b@c'"),
        bad(put("models/0/model", "base+"), r"recipe: models\[0\].model.path: wanted a name, got ''"),
        bad(put("models/0/model", "ft3+lo1"), r"recipe: ft3\+lo1: wanted an adapter on the base model, base"),
        bad(put("models/0/model", "ft2"), "recipe: ft2 is there twice, wanted each model once"),
        bad(put("models", [model("base")]), "recipe: wanted at least one model besides base, got none"),
        bad(put("base_model", None), "recipe: base_model: ties needs one, got none"),
        bad(
            put("base_model", "base+lo1"),
            r"recipe: base_model: wanted a full model without an adapter, got 'base\+lo1'",
        ),
        bad(
            put("models/1/parameters/weight", None), r"recipe: models\[1\].parameters.weight: wanted a number, got None"
        ),
        bad(put("models/1/parameters/weight", "half"), "recipe: .*weight: wanted a number, got 'half'"),
        bad(put("models/1/parameters/weight", True), "recipe: .*weight: wanted a number, got True"),
        bad(put("models/1/parameters/weight", [1, float("nan")]), "recipe: .*weight: wanted a number, got nan"),
        bad(
            put("models/1/parameters/weight", [1, {"value": 2}]),
            r"recipe: .*weight\[0\]: wanted a table of keys, got 1",
        ),
        bad(
            put("models/1/parameters/weight", {"filter": "mlp"}), r"recipe: .*weight\[0\].value: wanted a number, got N"
        ),
        bad(
            put("models/1/parameters/weight", {"filter": 1, "value": 1}),
            r"recipe: .*filter: wanted a part of tensor na",
        ),
        bad(put("models/1/parameters", {}), "recipe: wanted a weight for ft2, got none for "),
        bad(put("models/1/parameters/density", 1.5), "recipe: .*density: wanted a number from 0 to 1, got 1.5"),
        bad(put("parameters/normalize", "maybe"), "recipe: parameters.normalize: wanted true or false, got 'maybe'"),
        bad(
            put("parameters/rescale", True), "recipe: rescale: wanted false for ties, got true: trims are not rescaled"
        ),
        bad(
            put("parameters/lambda", [0, 1]),
            "recipe: lambda: ties takes one for the whole model, got 0.0 for lm_head and ",
        ),
        bad(
            put("parameters/normalize", {"filter": "mlp", "value": False}), "recipe: normalize: ties takes one for the "
        ),
        bad(put("dtype", "float64"), "recipe: dtype: wanted one of float32, float16, bfloat16, got 'float64'"),
        bad(put("out_dtype", 16), "recipe: out_dtype: wanted one of float32, float16, bfloat16, got 16"),
        bad(put("tokenizer_source", "ft1"), "recipe: tokenizer_source: wanted base, union or base, got 'ft1'"),
        bad(
            {**TIES, "tokenizer_source": "base", "tokenizer": {}}, "recipe: wanted either tokenizer or tokenizer_source"
        ),
    ],
)
def test_what_cannot_be_done_is_said(here, tmp_path, asked, message):
    with pytest.raises(RecipeError, match=f"^{message}"):
        merge_recipe(asked, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            put("models/0/parameters/normalize", False),
            r"models\[0\].parameters.normalize has no effect: it applies to the whole",
        ),
        (
            {**TIES, "merge_method": "task_arithmetic"},
            r"models\[0\].parameters.density has no effect: task_arithmetic does not use it",
        ),
        (
            {**TIES, "models": [*TIES["models"], model("base", weight=3)]},
            "the parameters of base have no effect: ties has none for the base model",
        ),
    ],
)
def test_what_mergekit_reads_and_ignores_is_told(here, asked, message):
    with pytest.warns(UserWarning, match=f"^recipe: {message}"):
        told = read_recipe(asked)
    assert len(told.inputs) == 2


def test_the_table_of_methods_is_mergekits():
    """What a recipe leaves out is mergekit's default."""
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    for name, row in MERGEKIT_METHODS.items():
        theirs = {parameter.name: parameter.default for parameter in registry.get(name).spec.parameters}
        assert theirs.get("normalize") == row.normalize
        assert theirs.get("rescale", False) == row.rescale
        assert set(row.parameters) <= theirs.keys()
