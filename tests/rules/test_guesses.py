"""What users naturally write does what they mean, or ends in one line that says what to write."""

import re

import numpy as np
import pytest
import torch
import yaml
from command_line import run_cli
from peft import get_peft_model_state_dict
from peft_models import llama, saved, trained

import merge_engine
from merge_engine.errors import AdapterError, MergeError, RecipeError
from merge_engine.rules.guesses import COMBINATION_TYPES, did_you_mean, word
from merge_engine.rules.methods import METHODS
from merge_engine.rules.recipe import Recipe


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [str(saved(folder / name, seed=seed, r=4)) for seed, name in enumerate(("sql", "chat"))]


def single(adapters, **recipe):
    return merge_engine.merge(adapters, **recipe)


def in_session(adapters, **recipe):
    with merge_engine.Session(adapters) as session:
        return session.merge(**recipe)


def among_many(adapters, **recipe):
    return next(iter(merge_engine.merge_many(adapters, [recipe])))


WAYS = [single, in_session, among_many]


def same(one, other):
    assert one.modules.keys() == other.modules.keys()
    for name, module in one.modules.items():
        assert torch.equal(module.A, other.modules[name].A) and torch.equal(module.B, other.modules[name].B)


GUESSES = {
    "capitals": ({"method": "TIES"}, {"method": "ties"}),
    "a hyphen": ({"method": "Dare-Linear"}, {"method": "dare_linear"}),
    "PEFT's function": ({"method": "task_arithmetic"}, {"method": "linear"}),
    "PEFT's type as a method": ({"method": "ties_svd"}, {"method": "ties"}),
    "PEFT's svd type": ({"combination_type": "ties_svd", "svd_rank": 3}, {"method": "ties", "rank": 3}),
    "PEFT's factor type": ({"combination_type": "ties"}, {"method": "ties", "space": "factors"}),
    "PEFT's svd": ({"combination_type": "svd", "svd_rank": None}, {"method": "linear"}),
    "PEFT's cat": ({"combination_type": "cat"}, {"method": "cat"}),
    "PEFT's election": (
        {"combination_type": "ties_svd", "majority_sign_method": "frequency"},
        {"method": "ties", "election": "frequency"},
    ),
    "torch's dtype": ({"dtype": torch.float16}, {"dtype": "float16"}),
    "a short dtype": ({"dtype": "bf16"}, {"dtype": "bfloat16"}),
    "numpy's weights": ({"weights": np.array([2.0, 1.0])}, {"weights": [2, 1]}),
    "weights by name": ({"weights": {"chat": 2, "sql": -1}}, {"weights": [-1, 2]}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("guess", GUESSES)
def test_guesses_are_understood(guess, way, adapters):
    given, meant = GUESSES[guess]
    same(way(adapters, **given), merge_engine.merge(adapters, **meant))


@pytest.mark.quick
@pytest.mark.parametrize("way", WAYS)
def test_adapters_may_be_a_mapping_to_weights(way, adapters):
    mapping = dict(zip(adapters, (2.0, -0.5), strict=True))
    same(way(mapping, method="linear"), merge_engine.merge(adapters, method="linear", weights=[2, -0.5]))


def test_weights_by_folder(adapters):
    mapping = dict(zip(adapters, (2.0, -0.5), strict=True))
    same(
        merge_engine.merge(adapters, method="linear", weights=mapping),
        merge_engine.merge(adapters, method="linear", weights=[2, -0.5]),
    )


def test_weights_of_a_mapping_follow_the_adapters_that_a_recipe_chooses(adapters):
    mapping = dict(zip(adapters, (2.0, -0.5), strict=True))
    recipes = [{"method": "linear", "adapters": ["chat"]}, Recipe("linear"), {"method": "linear", "weights": [1, 1]}]
    found = list(merge_engine.merge_many(mapping, recipes))
    same(found[0], merge_engine.merge(adapters[1:], method="linear", weights=[-0.5]))
    same(found[1], merge_engine.merge(adapters, method="linear", weights=[2, -0.5]))
    same(found[2], merge_engine.merge(adapters, method="linear"))


HINTS = {
    "percent": ({"density": 20}, r"^density: wanted a number from 0 to 1, got 20; wanted 0\.2\?$"),
    "a misspelt key": ({"densty": 0.2}, r"^recipe: wanted one of .*, got 'densty'; did you mean 'density'\?$"),
    "another's key": ({"lambda_": 0.5}, r"got 'lambda_'; did you mean 'scale'\?$"),
    "mergekit's key": ({"merge_method": "ties"}, r"got 'merge_method'; did you mean 'method'\?$"),
    "a misspelt method": ({"method": "tise"}, r"^method: wanted one of .*, got 'tise'; did you mean 'ties'\?$"),
    "half a method": ({"method": "dare"}, r"got 'dare'; did you mean 'dare_\w+'\?$"),
    "a dtype that is not written": ({"dtype": torch.int8}, r"^dtype: wanted one of float32, float16, bfloat16, got"),
    "two methods": ({"combination_type": "ties", "method": "ties"}, r"^method: combination_type='ties' says it"),
    "two spaces": ({"combination_type": "ties_svd", "space": "factors"}, r"^space: combination_type='ties_svd' says"),
    "an unknown type": ({"combination_type": "tiez_svd"}, r"got 'tiez_svd'; did you mean 'ties_svd'\?$"),
    "two ranks": ({"svd_rank": 2, "rank": 3}, r"^svd_rank: is rank here; wanted one of the two, got both$"),
    "an unknown name": (
        {"weights": {"sqll": 1, "chat": 1}},
        r"^weights: wanted names of sql, chat, got 'sqll'; did you",
    ),
    "a missing name": ({"weights": {"sql": 1}}, r"^weights: wanted one for each of sql, chat, got none for chat$"),
    "a name without number": ({"weights": {"sql": "x", "chat": 1}}, r"^weights: sql: wanted a finite number, got 'x'$"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", HINTS)
def test_mistakes_get_a_hint(case, way, adapters):
    given, text = HINTS[case]
    with pytest.raises(RecipeError) as caught:
        way(adapters, **given)
    assert re.search(text, str(caught.value).removeprefix("recipe 000: ")) and "\n" not in str(caught.value)


@pytest.mark.parametrize("way", WAYS)
def test_sources_that_cannot_be_read_say_what_to_do(way, adapters):
    model = trained(llama(), target_modules=["q_proj"])
    tensors = get_peft_model_state_dict(model)
    inside = r"got a PeftModel; save it with save_pretrained\(folder\) and give the folder, or use merge_engine.peft_b"
    cases = [
        (set(adapters), "^adapters: wanted a list, since the order decides whose a weight is; got a set$"),
        (adapters[0], "^adapters: wanted a list of folders or hub ids, got '.*sql'$"),
        (model, f"^adapters: wanted a list of folders or hub ids, {inside}"),
        ([model, adapters[0]], f"^wanted a folder with adapter_config.json or a hub id user/repo, {inside}"),
        (tensors, r"^adapters: wanted a list of folders or hub ids, got a state dict of \d+ tensors; save the model"),
        ([adapters[0], tensors], r"user/repo, got a state dict of \d+ tensors; save the model with save_pretrained\("),
        ([adapters[0], None], "user/repo, got None$"),
        ({"sql": adapters[0]}, "or a mapping of them to weights, got '.*sql' for 'sql'$"),
        (7, "^adapters: wanted a list of folders or hub ids, got 7$"),
    ]
    for given, text in cases:
        with pytest.raises(AdapterError, match=text) as caught:
            way(given, method="linear")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_weights_twice(adapters):
    mapping = dict.fromkeys(adapters, 1.0)
    with pytest.raises(RecipeError, match=r"^weights: the mapping of adapters has some; wanted one of the two, got"):
        merge_engine.merge(mapping, method="linear", weights=[1, 1])


def test_comparisons_take_no_weights(adapters):
    with pytest.raises(AdapterError, match=r"got a mapping; weights have no meaning here$"):
        merge_engine.interference(dict.fromkeys(adapters, 1.0))


def test_two_of_one_name_need_a_list(tmp_path, adapters):
    twin = str(saved(tmp_path / "sql", seed=3, r=4))
    with pytest.raises(RecipeError, match=r"^weights: 2 adapters are named sql; wanted a list of weights$"):
        merge_engine.merge([adapters[0], twin], method="linear", weights={"sql": 1})


def test_models_into_a_base_say_what_to_do(adapters, tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    for merge in (merge_engine.merge_into, merge_engine.merge_models):
        with pytest.raises(
            MergeError, match=r"got a LlamaForCausalLM; save it with save_pretrained\(folder\) and give"
        ):
            merge(tmp_path / "base", [base], tmp_path / "out", method="linear")
    mapping = dict(zip(adapters, (2.0, -0.5), strict=True))
    one = merge_engine.merge_into(tmp_path / "base", mapping, tmp_path / "one", method="linear")
    two = merge_engine.merge_models(tmp_path / "base", mapping, tmp_path / "two", method="linear")
    three = merge_engine.merge_into(tmp_path / "base", adapters, tmp_path / "three", method="linear", weights=[2, -0.5])
    contents = [(each.path / "model.safetensors").read_bytes() for each in (one, two, three)]
    assert contents[0] == contents[1] == contents[2]


def test_the_table_of_pefts_types_has_methods_that_exist():
    assert {method for method, _ in COMBINATION_TYPES.values()} <= METHODS.keys()
    assert all(word("method", method.upper()) == method for method in METHODS)


def test_no_hint_for_what_is_near_to_nothing():
    assert did_you_mean("zzzz", METHODS) == did_you_mean(3, METHODS) == ""


def test_recipe_files_and_the_command_understand_the_same(adapters, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    weighted = {adapters[0]: 2, adapters[1]: -0.5}
    recipe.write_text(
        yaml.safe_dump({"adapters": weighted, "combination_type": "TIES_SVD", "output": str(tmp_path / "y")})
    )
    assert run_cli(capsys, "merge", recipe, "--dtype", "fp16")[0] == 0
    options = ["--method", "TIES", "--weights", 2, -0.5, "--dtype", "half"]
    assert run_cli(capsys, "merge", *adapters, "-o", tmp_path / "c", *options)[0] == 0
    wanted = merge_engine.merge(adapters, tmp_path / "a", method="ties", weights=[2, -0.5], dtype="float16").path
    for name in "yc":
        file = tmp_path / name / "adapter_model.safetensors"
        assert file.read_bytes() == (wanted / "adapter_model.safetensors").read_bytes()
    recipe.write_text(yaml.safe_dump({"adapters": adapters, "densty": 0.2, "output": str(tmp_path / "z")}))
    code, _, err = run_cli(capsys, "merge", recipe)
    assert code == 2 and err.rstrip().endswith("did you mean 'density'?")
    merges = [{"name": "x", "method": "TIES"}]
    recipe.write_text(yaml.safe_dump({"adapters": weighted, "merges": merges, "output": str(tmp_path / "w")}))
    assert run_cli(capsys, "merge", recipe)[0] == 2


def test_sweeps_understand_the_same(adapters, tmp_path, capsys):
    arguments = ["merge", *adapters, "-o", tmp_path / "swept", "--sweep", "method=TIES,linear"]
    assert run_cli(capsys, *arguments)[0] == 0
    assert (tmp_path / "swept" / "ties").is_dir() and (tmp_path / "swept" / "linear").is_dir()
