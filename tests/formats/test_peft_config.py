"""Every field of PEFT's configuration: which decide a delta, and which cannot be merged."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lora_files import save_factors
from peft import LoraConfig, get_peft_model
from peft.utils.other import get_pattern_key
from peft_models import NAMES, edit, llama, refused, saved, toy

from merge_engine.errors import AdapterError
from merge_engine.formats.open import open_adapter
from merge_engine.formats.peft_config import KEPT, READ, REFUSED, RESET


@pytest.mark.quick
def test_every_field_of_pefts_configuration_is_decided():
    """A field that PEFT adds fails here until someone has decided what it does to a delta."""
    tables = [READ, KEPT, RESET, REFUSED.keys()]
    for field in dataclasses.fields(LoraConfig):
        assert sum(field.name in table for table in tables) == 1, field.name


PATTERN_KEYS = NAMES | st.sampled_from(["^fc", ".*fc", r"block\..*", "^layers.1", "fc|q_proj", "f", r".*\.1\..*", "."])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example({"block.fc"}, {"fc": 2, ".*": 3}, {"block.*": 5, ".*": 6}, False)  # the first that matches decides
@given(
    names=st.sets(NAMES, min_size=1, max_size=6),
    rank_pattern=st.dictionaries(PATTERN_KEYS, st.integers(1, 5), max_size=4),
    alpha_pattern=st.dictionaries(PATTERN_KEYS, st.integers(1, 40) | st.floats(0.5, 40), max_size=4),
    rslora=st.booleans(),
)
def test_patterns_resolve_as_in_peft(tmp_path, names, rank_pattern, alpha_pattern, rslora):
    factors, expected = {}, {}
    for name in names:
        rank = rank_pattern.get(get_pattern_key(rank_pattern.keys(), name), 7)
        alpha = alpha_pattern.get(get_pattern_key(alpha_pattern.keys(), name), 3)
        expected[name] = (rank, alpha / (rank**0.5 if rslora else rank))
        factors[name] = torch.ones(rank, 2), torch.ones(2, rank)
    patterns = {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    save_factors(tmp_path, factors, r=7, lora_alpha=3, use_rslora=rslora, **patterns)
    modules = open_adapter(tmp_path).modules
    assert {name: (module.rank, module.scaling) for name, module in modules.items()} == expected


@pytest.mark.parametrize("text, match", [("{", "cannot be read"), ("[]", "holds a list"), ("\xff", "cannot be read")])
def test_a_damaged_configuration(tmp_path, text, match):
    path = saved(tmp_path / "a", r=4)
    (path / "adapter_config.json").write_text(text, encoding="latin-1")
    refused(path, match=rf"a: adapter_config.json {match}")


@pytest.mark.quick
@pytest.mark.parametrize(
    "changes, match",
    [
        ({"r": 8}, r"a: lora_A of .* is \[4, 32\], wanted rank 8 from adapter_config.json"),
        ({"rank_pattern": {"layers.1.self_attn.v_proj": 2}}, r"layers.1.self_attn.v_proj is \[4, 32\], wanted rank 2"),
        ({"rank_pattern": {"(": 2}}, r"a: rank_pattern has '\(', which is no regular expression"),
        ({"rank_pattern": {"a{99999999999}": 2}}, "which is no regular expression: the repetition number is too large"),
        (
            {"alpha_pattern": {3000 * "(" + 3000 * ")": 2}},
            r"a: alpha_pattern has '\(+', which is no regular expression",
        ),
        (
            {"rank_pattern": {"x": 2.5}},
            r"a: rank_pattern\['x'\] is 2.5 in adapter_config.json, wanted a positive integer",
        ),
        ({"alpha_pattern": {"x": "8"}}, r"a: alpha_pattern\['x'\] is '8' in adapter_config.json, wanted a number"),
        ({"r": 0}, r"a: r is 0 in adapter_config.json, wanted a positive integer"),
        ({"r": True}, r"a: r is True in adapter_config.json, wanted a positive integer"),
        ({"lora_alpha": float("nan")}, r"a: lora_alpha is nan in adapter_config.json, wanted a number"),
        ({"lora_alpha": None}, r"a: lora_alpha is None in adapter_config.json, wanted a number"),
        ({"rank_pattern": [3]}, r"a: rank_pattern is \[3\] in adapter_config.json, wanted a dict"),
        ({"modules_to_save": "score"}, r"a: modules_to_save is 'score' in adapter_config.json, wanted a list"),
        ({"peft_type": "ADALORA"}, r"a: peft_type is ADALORA, wanted LORA"),
        (
            {"use_dora": True},
            r"a: use_dora is set in adapter_config.json; wanted a lora_magnitude_vector of each layer",
        ),
        ({"bias": "lora_only"}, r"a: bias is set in adapter_config.json; biases of the base model were trained"),
        ({"modules_to_save": [5]}, r"a: modules_to_save is \[5\] in adapter_config.json, wanted a list of names"),
        (
            {"target_parameters": [None]},
            r"a: target_parameters is \[None\] in adapter_config.json, wanted a list of names",
        ),
        ({"use_rslora": "no"}, r"a: use_rslora is 'no' in adapter_config.json, wanted a bool"),
        ({"fan_in_fan_out": []}, r"a: fan_in_fan_out is \[\] in adapter_config.json, wanted a bool"),
        ({"task_type": {}}, r"a: task_type is \{\} in adapter_config.json, wanted a str"),
        ({"trainable_token_indices": 5}, r"a: trainable_token_indices is 5 in .*, wanted a list or a dict"),
        ({"peft_type": [[[[[5]]]]]}, r"a: peft_type is \[\[\[\.\.\.\]\]\], wanted LORA"),
        ({"alpha_pattern": {"(.*)\\3": 2}}, r"a: alpha_pattern has .*, which has a back-reference"),
        ({"target_parameters": "w"}, r"a: target_parameters is 'w' in adapter_config.json, wanted a list"),
        ({"layer_replication": [[0, 2]]}, r"a: layer_replication is set"),
        ({"alora_invocation_tokens": [1]}, r"a: alora_invocation_tokens is set"),
        ({"use_qalora": True}, r"a: use_qalora is set"),
        ({"use_bdlora": {"nblocks": 2}}, r"a: use_bdlora is set"),
        ({"arrow_config": {"top_k": 3}}, r"a: arrow_config is set"),
        ({"kasa_config": {"beta": 1}}, r"a: kasa_config is set"),
        ({"monteclora_config": {"num_samples": 8}}, r"a: monteclora_config is set"),
        ({"megatron_config": {"x": 1}}, r"a: megatron_config is set"),
        ({"init_lora_weights": "pissa_niter_16"}, r"a: init_lora_weights is pissa_niter_16, which changed the base"),
        ({"init_lora_weights": "OLoRA"}, r"a: init_lora_weights is OLoRA, which changed the base"),
        ({"init_lora_weights": "corda"}, r"path_initial_model_for_weight_conversion to make it a plain LoRA"),
        ({"init_lora_weights": "loftq"}, r"a: init_lora_weights is loftq"),
        ({"init_lora_weights": "lora_ga"}, r"a: init_lora_weights is lora_ga"),
    ],
)
def test_wrong_configurations(tmp_path, changes, match):
    path = saved(tmp_path / "a", r=4)
    edit(path, **changes)
    refused(path, match=match)


@pytest.mark.parametrize("config", [{"bias": "all"}, {"init_lora_weights": "pissa"}])
def test_variants_that_peft_really_saved(tmp_path, config):
    path = saved(tmp_path / "a", toy, r=4, target_modules=["fc"], **config)
    refused(path, match=rf"a: {next(iter(config))} is ")
    if "init_lora_weights" not in config:
        edit(path, bias="none")
        refused(path, match=r"a: tensor .* is unknown")


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")  # PEFT loads the start beside the result
def test_a_converted_pissa_adapter_is_a_plain_one(tmp_path):
    """What the refusal advises: PEFT rewrites the adapter relative to the unchanged base."""
    base = llama()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) / 4)
    x = torch.arange(8)[None]
    wanted = model(x).logits
    model.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    adapter = open_adapter(tmp_path / "a")
    fresh = llama()
    with torch.no_grad():
        for name, module in adapter.modules.items():
            a, b = adapter.factors(name)
            fresh.get_submodule(name).weight += module.scaling * b @ a
        # float32 noise through two layers of weights of order 1; the delta itself moves the logits by far more.
        assert (fresh(x).logits - wanted).abs().max() < 1e-4
        assert (llama()(x).logits - wanted).abs().max() > 1e-2


def test_an_unknown_field_is_mentioned(tmp_path, caplog):
    path = saved(tmp_path / "a", r=4)
    edit(path, use_future_lora=True, use_other_lora=False)
    open_adapter(path)
    assert [record.getMessage() for record in caplog.records] == [
        "a: use_future_lora in adapter_config.json is not known and ignored"
    ]


def test_a_configuration_that_is_nested_too_deeply_is_one_error(tmp_path):
    save_factors(tmp_path / "a", {"q_proj": (torch.ones(2, 3), torch.ones(4, 2))})
    (tmp_path / "a" / "adapter_config.json").write_text(100_000 * "[")
    with pytest.raises(AdapterError, match=r"^a: adapter_config\.json cannot be read: "):
        open_adapter(tmp_path / "a")
