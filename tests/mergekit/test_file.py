"""mergekit's YAML: every key is understood or refused."""

import pytest
from mergekit_oracle import TIES, model, put, recipe

from merge_engine.errors import RecipeError
from merge_engine.mergekit.file import read_recipe
from merge_engine.mergekit.reader import Clause
from merge_engine.mergekit.recipe import merge_recipe
from merge_engine.rules.whole_methods import WHOLE_METHODS


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
        bad(put("merge_methods", "x"), r"recipe: merge_methods is no key of mergekit's; did you mean merge_method\?"),
        bad(put("parameters/densty", 1), r"recipe: parameters.densty is no key of mergekit's; did you mean density\?"),
        bad(put("models/0/parameter", {}), r"recipe: models\[0\].parameter is no key .*; did you mean parameters\?"),
        bad(
            put("modules", {"default": {"models": []}}), "recipe: wanted one of models, slices and modules, got models"
        ),
        bad(
            put("chat_template", "chatlm"),
            "recipe: chat_template: wanted auto, one of alpaca, .*, got 'chatlm'",
        ),
        bad(put("chat_template", ["auto"]), "recipe: chat_template: wanted auto, a name or a template, got "),
        bad(put("experts", []), "recipe: experts: a recipe of mergekit-moe, .*; use mergekit-moe"),
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
        bad(put("tokenizer/pad_to_multiple_of", 0), "recipe: tokenizer.pad_to_multiple_of: wanted a whole number"),
        bad(put("tokenizer", "union"), "recipe: tokenizer: wanted a table with source: union, got 'union'"),
        bad(put("tokenizer_source", "unoin"), r"recipe: tokenizer_source: .* no model unoin; did you mean union\?"),
        bad(
            put("tokenizer_source", "model:ft1"),
            "recipe: tokenizer_source: wanted the name alone, ft1, got 'model:",
        ),
        bad(
            put("tokenizer/tokens", {"a": {"source": {"kind": "mean"}}}),
            "recipe: tokenizer.tokens.a.source.kind: wanted zero or model_token, got 'mean'",
        ),
        bad(put("tokenizer/tokens", []), r"recipe: tokenizer.tokens: wanted a table of tokens, got \[\]"),
        bad(put("tokenizer/tokens", {"a": {"force": True}}), "recipe: tokenizer.tokens.a.source: wanted a model"),
        bad(
            put("tokenizer/tokens", {"a": {"source": {"kind": "model_token", "model": "ft1"}}}),
            "recipe: tokenizer.tokens.a.source: wanted either token, a text, or token_id",
        ),
        bad(
            put("tokenizer/tokens", {"a": {"source": "ft3"}}),
            "recipe: tokenizer.tokens.a: wanted one of the models, base, ft1, ft2, got ft3",
        ),
        bad(put("merge_method", "della_liner"), r"recipe: merge_method: della_liner is not known; did you mean della"),
        bad(put("merge_method", "TIES"), r"recipe: merge_method: TIES is not known; did you mean ties\?"),
        bad(put("merge_method", "stock"), r"recipe: merge_method: stock is not known; did you mean model_stock\?"),
        bad(
            put("merge_method", "iso_c"),
            "recipe: merge_method: iso_c is no method of .*; for adapters use merge-engine merge --method iso_c$",
        ),
        bad(put("merge_method", "moe"), "recipe: merge_method: moe is not there; use mergekit-moe"),
        bad(put("genome", {}), "recipe: genome: a recipe of mergekit-evolve; use merge-engine search"),
        bad(put("layer_slices", []), "recipe: layer_slices: .* bakllama; use merge_method: passthrough, with slices$"),
        bad(put("merge_method", "dare"), "recipe: merge_method: dare is not there; use dare_ties or dare_linear"),
        bad(put("merge_method", "frank"), "recipe: merge_method: wanted one of linear, .*, got 'frank'"),
        bad(put("merge_method", ["ties"]), r"recipe: merge_method: wanted one of .*, got \['ties'\]"),
        bad(put("slices", [{}]), "recipe: wanted one of models, slices and modules, got models and slices"),
        bad(put("models", None), "recipe: wanted one of models, slices and modules, got none"),
        bad(put("models", {}), "recipe: wanted one of models, slices and modules, got none"),
        bad(put("models/0", "ft1"), r"recipe: models\[0\]: wanted a table with model: ft1, got 'ft1'"),
        bad(put("models/0", 1), r"recipe: models\[0\]: wanted a table of keys, got 1"),
        bad([1], "recipe: wanted a table of keys, got 1"),
        bad(put("models/0/model", None), r"recipe: models\[0\].model: wanted model or model\+lora, got None"),
        bad(
            put("models/0/model", "a+b+c"),
            r"recipe: models\[0\].model: .*, another entry for another adapter, got 'a",
        ),
        bad(put("models/0/model", "lo1"), r"lo1 is an adapter; wanted it with its model, as MODEL\+lo1$"),
        bad(put("base_model", "lo1"), r"lo1 is an adapter; wanted it with its model, as MODEL\+lo1$"),
        bad(put("models/0/model", "a@b@c"), r"recipe: models\[0\].model: wanted a path, or path@revision, got 'a@b@c'"),
        bad(put("models/0/model", "base+"), r"recipe: models\[0\].model.path: wanted a name, got ''"),
        bad(put("models/0/model", "ft2"), "recipe: models: ft2 is there twice, .* once; remove one entry$"),
        bad(put("models", [model("base")]), "recipe: models: wanted at least one model besides base, got none"),
        bad(put("base_model", None), "recipe: base_model: ties needs one, .*; set base_model to the model that the"),
        bad(
            put("models/1/parameters/weight", None), r"recipe: models\[1\].parameters.weight: wanted a number, got None"
        ),
        bad(put("models/1/parameters/weight", "half"), "recipe: .*weight: wanted a number, got 'half'"),
        bad(put("models/1/parameters/weight", True), "recipe: .*weight: wanted a number, got True"),
        bad(put("models/1/parameters/weight", [1, float("nan")]), "recipe: .*weight: wanted a number, got nan"),
        bad(
            put("models/1/parameters/weight", [1, {"value": 2}]),
            r"recipe: .*weight\[0\]: wanted a table, as value: 1, got 1",
        ),
        bad(
            put("models/1/parameters/weight", {"filter": "mlp"}), r"recipe: .*weight\[0\].value: wanted a number, got N"
        ),
        bad(
            put("models/1/parameters/weight", {"filter": 1, "value": 1}),
            r"recipe: .*filter: wanted a part of tensor na",
        ),
        bad(put("models/1/parameters", {}), "recipe: wanted a weight for ft2, got none .*; set it under parameters"),
        bad(put("models/1/parameters/density", 1.5), "recipe: .*density: wanted a number from 0 to 1, got 1.5"),
        bad(put("parameters/normalize", "maybe"), "recipe: parameters.normalize: wanted true or false, got 'maybe'"),
        bad(put("dtype", "float64"), "recipe: dtype: wanted one of float32, float16, bfloat16, got 'float64'"),
        bad(put("out_dtype", 16), "recipe: out_dtype: wanted one of float32, float16, bfloat16, got 16"),
        bad(put("tokenizer_source", 5), "recipe: tokenizer_source: wanted model or model.lora, got 5"),
        bad(
            {**TIES, "tokenizer_source": "base", "tokenizer": {}}, "recipe: wanted either tokenizer or tokenizer_source"
        ),
    ],
)
def test_what_cannot_be_done_is_said(here, tmp_path, asked, message):
    with pytest.raises(RecipeError, match=f"^{message}"):
        merge_recipe(asked, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def of(method, *names, base=None, **keys):
    return {"merge_method": method, "models": [model(name) for name in names], "base_model": base, **keys}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        bad(of("passthrough", "ft1", "ft2"), "passthrough takes 1 model, got 2 .*; to stack .* a slice of its own$"),
        bad(
            of("passthrough", "ft1", base="base"),
            "passthrough takes 1 model, got ft1 and the base base; remove base_model$",
        ),
        bad(of("slerp", "ft1", "ft2", "ft3", base="ft1"), "slerp takes 2 models, .*, got 3 .*; multislerp and karcher"),
        bad(of("slerp", "ft1", "ft2", "base", base="base"), "slerp takes 2 models, .*, got 3 .*; multislerp and karch"),
        bad(
            of("slerp", "ft1", "ft2", base="base"), ".*, got ft1, ft2 and the base base; set base_model to ft1 or ft2$"
        ),
        bad(of("slerp", "ft1", "ft2"), "base_model: slerp needs one, .*; set base_model to ft1 or ft2$"),
        bad(of("nearswap", "ft1", "ft2", "ft3", base="ft1"), ".*; merge two, and the result with the next$"),
        bad(of("model_stock", "ft1", base="base"), "model_stock takes at least 3 models, .*; slerp takes two$"),
        bad(of("nuslerp", "ft1", "ft2", "ft3"), "nuslerp takes 2 models besides the base, got 3 .*; multislerp and"),
        bad(
            of("nuslerp", "ft1", base="base"),
            "nuslerp takes 2 .*, got 1 .*; slerp takes the base as one of two$",
        ),
        bad(of("slerp", "ft1", base="ft1"), "slerp takes 2 models, .*, got 1 for models; name one more$"),
    ],
)
def test_other_numbers_of_models_are_refused_with_a_way_out(here, tmp_path, asked, message):
    with pytest.raises(RecipeError, match=message):
        merge_recipe(asked, tmp_path / "out")


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
    assert len(told.slices[0].others) == 2


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("normalise_all", "normalise_all has no effect: wanted one of merge_method, base_model, "),
        ("weight", "weight has no effect: weight belongs under parameters"),
        ("models/0/density", r"models\[0\].density has no effect: density belongs under parameters"),
        ("parameters/embed_slerp", "parameters.embed_slerp has no effect: wanted one of "),
    ],
)
def test_a_key_that_mergekit_does_not_read_is_told(here, place, message):
    with pytest.warns(UserWarning, match=f"^recipe: {message}"):
        read_recipe(put(place, True))


def test_the_table_of_methods_is_mergekits():
    """Names, parameters, their kinds and defaults, and how many models: what a recipe leaves out is mergekit's."""
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    base = pytest.importorskip("mergekit.merge_methods.base")
    assert {method.spec.name for method in registry.registered_methods()} == WHOLE_METHODS.keys()
    scopes = {"merge": "shared", "input": "input", "other": "non_base"}
    bases = {"needed": "required", "optional": "optional", "none": "ignored"}
    for name, row in WHOLE_METHODS.items():
        spec = registry.get(name).spec
        theirs = {
            each.name: (each.scope.value, None if each.default is base.MISSING else each.default)
            for each in spec.parameters
        }
        assert theirs == {key: (scopes[option.of], option.default) for key, option in row.options.items()}, name
        contract = spec.contract
        assert (bases[row.base], row.least, row.most) == (contract.base.value, contract.min_inputs, contract.max_inputs)
        assert row.others == (contract.min_non_base or 0, contract.max_non_base)
