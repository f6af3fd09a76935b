"""Experts into base models that have them as one parameter, or as tensors of their own: as PEFT and transformers do."""

import json
from pathlib import Path

import pytest
import torch
from expert_models import EXPERTS, FUSED, expert_deltas, in_peft, save_experts, tiny
from lora_files import save_factors
from safetensors.torch import load_file
from toy_models import weights_of

import merge_engine
from merge_engine.errors import ModelError
from merge_engine.formats.checkpoint import open_checkpoint
from merge_engine.formats.open import open_adapter
from merge_engine.models.experts import TRANSPOSED, as_the_base_has_them, divided, pieces_of_experts
from merge_engine.rules import reference
from merge_engine.rules.rule import make_rule

FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss"]
WEIGHTS = [0.9, -0.4, 1.3]


def saved_base(tmp_path, family, width=12, **how):
    tiny(family, width).save_pretrained(tmp_path / "base", **how)
    return tmp_path / "base"


def loaded(folder):
    """{name: tensor} of a model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_near(got, want, U=2.0**-20):
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        torch.testing.assert_close(got[key].double(), tensor.double(), rtol=0, atol=U * float(tensor.abs().max()))


@pytest.mark.quick
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("width", [12, 16])  # at 16 down_proj is square: its shape does not say which way round it is
def test_one_adapter_is_what_peft_merges_and_unloads(tmp_path, family, width):
    base = saved_base(tmp_path, family, width)
    folder = save_experts(tmp_path / "a", 1, family, width, rank_pattern={".*gate_up_proj": 3})
    merge_engine.merge_into(base, [folder], tmp_path / "out", method="linear")
    assert weights_of(tmp_path / "out").keys() == weights_of(base).keys()
    assert_near(loaded(tmp_path / "out"), in_peft(folder, family, width).merge_and_unload().state_dict())


def test_adapters_that_were_trained(tmp_path):
    base = saved_base(tmp_path, "mixtral")
    folder = save_experts(tmp_path / "a", 1, "mixtral", base=base, steps=3)
    merge_engine.merge_into(base, [folder], tmp_path / "out", method="linear")
    assert_near(loaded(tmp_path / "out"), in_peft(folder, "mixtral").merge_and_unload().state_dict())
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        from transformers import AutoModelForCausalLM

        want = in_peft(folder, "mixtral")(input_ids=tokens).logits
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=tokens).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", [{"method": "linear"}, {"method": "ties", "density": 0.4}, {"method": "tsv"}])
def test_several_adapters_of_mixed_ranks(tmp_path, family, recipe):
    """Base + the textbook's merge, of each of the base's own tensors."""
    from spectral_textbook import METHODS

    base = saved_base(tmp_path, family, max_shard_size="10KB")
    folders = [save_experts(tmp_path / str(i), i, family, r=2 + i, lora_alpha=5 - i) for i in range(3)]
    merge_engine.merge_into(base, folders, tmp_path / "out", weights=WEIGHTS, shard_size="9KB", **recipe)
    tasks = {}
    for number, folder in enumerate(folders):
        for (layer, parameter), delta in expert_deltas(in_peft(folder, family)).items():
            for key, rows in of_the_base(family, layer, parameter, delta.double()):
                tasks.setdefault(key, {})[number] = rows
    if recipe["method"] == "tsv":
        merged = {key: METHODS["tsv"](list(own.values()), WEIGHTS) for key, own in tasks.items()}
    else:
        rule = make_rule(recipe["method"])
        merged = reference.merge_model(tasks, WEIGHTS, {key: [0.4] * 3 for key in tasks}, rule)
    before, got = (shards_of(folder) for folder in (base, tmp_path / "out"))
    want = {key: before[key].double() for key in before}
    for key, delta in merged.items():
        if key.endswith("]"):
            want[key[:-3]][int(key[-2])] += delta
        else:
            want[f"{key}.weight"] += delta
    assert_near(got, want, 2.0**-17)
    assert (
        json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"].keys() == got.keys()
    )


def of_the_base(family, layer, parameter, delta):
    """(tensor of the base's files, what is added to it), as transformers cuts the parameter when it saves."""
    if parameter is None:
        yield layer, delta
    elif family == "gpt_oss":
        yield from ((f"{layer}.{parameter}[{e}]", delta[e]) for e in range(EXPERTS))
    else:
        layer = layer.replace(".mlp.", ".block_sparse_moe.") if family == "mixtral" else layer
        gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        for e in range(EXPERTS):
            parts = [(down, delta[e])]
            if parameter == "gate_up_proj":
                parts = list(zip((gate, up), delta[e].chunk(2), strict=True))
            yield from ((f"{layer}.{e}.{name}", part) for name, part in parts)


def shards_of(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def test_it_goes_on_after_an_interruption_expert_by_expert(tmp_path, monkeypatch):
    from merge_engine.into import write

    base, folder = saved_base(tmp_path, "gpt_oss"), save_experts(tmp_path / "a", 1)
    merge_engine.merge_into(base, [folder], tmp_path / "whole", method="linear")
    real, count = write._write, []

    def interrupted(*arguments):
        count.append(None)
        if len(count) > 9:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(write, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_engine.merge_into(base, [folder], tmp_path / "out", method="linear")
    monkeypatch.setattr(write, "_write", real)
    result = merge_engine.merge_into(base, [folder], tmp_path / "out", method="linear")
    assert result.resumed >= 7
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole"))
    assert one == two


def test_beside_a_full_model(tmp_path):
    base, folder = saved_base(tmp_path, "gpt_oss"), save_experts(tmp_path / "a", 1)
    model = tiny("gpt_oss")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    model.save_pretrained(tmp_path / "full")
    merge_engine.merge_models(base, [tmp_path / "full", folder], tmp_path / "out", method="linear", weights=[0.5, 2.0])
    start, full, got = (weights_of(tmp_path / name) for name in ("base", "full", "out"))
    key = f"model.layers.1.{FUSED[0]}"
    delta = expert_deltas(in_peft(folder))[key.rpartition(".")[0], "gate_up_proj"]
    want = start[key].double() + 0.5 * (full[key].double() - start[key].double()) + 2 * delta.double()
    torch.testing.assert_close(got[key].double(), want, rtol=0, atol=1e-6)


def test_what_is_transposed_is_what_transformers_says():
    """The models of the table whose classes say so, among all in transformers that have is_transposed."""
    import transformers.models

    folder = Path(transformers.models.__file__).parent
    files = folder.glob("*/modeling_*.py")
    found = {file.parent.name for file in files if "is_transposed=True" in file.read_text(encoding="utf-8")}
    assert "gpt_oss" in found and found <= TRANSPOSED
    mapping = (folder.parent / "conversion_mapping.py").read_text(encoding="utf-8")
    turned = mapping.partition('"qwen3_vl_moe": [')[2].partition('"],')[0]
    assert 'target_patterns="mlp.experts.gate_up_proj"' in turned and "Transpose(" in turned[:900]


def test_a_square_parameter_is_turned_as_peft_turns_it():
    """tiny gpt_oss of width 16, beside a layer that says nothing: the classes do."""
    from peft import LoraConfig, get_peft_model

    for family in FAMILIES:
        model = get_peft_model(tiny(family, 16), LoraConfig(target_modules=[], target_parameters=FUSED[1:]))
        wrapper = model.base_model.model.model.layers[0].mlp.experts
        assert wrapper._did_swap_in_out_features == (family not in TRANSPOSED)


def test_a_base_in_a_bin_file_and_with_one_expert(tmp_path):
    base = saved_base(tmp_path, "gpt_oss")
    tensors = weights_of(base)
    (base / "model.safetensors").unlink()
    torch.save(tensors, base / "pytorch_model.bin")
    folder = save_experts(tmp_path / "a", 1)
    merge_engine.merge_into(base, [folder], tmp_path / "out", method="linear")
    assert_near(weights_of(tmp_path / "out"), in_peft(folder).merge_and_unload().state_dict())
    opened = open_checkpoint(base)
    pieces = pieces_of_experts(opened, [open_adapter(folder)])
    assert len(divided(opened, pieces).tensors) == len(tensors) + 4 * (EXPERTS - 1)
    assert len(as_the_base_has_them(open_adapter(folder), opened).modules) == 2 * (2 * EXPERTS + 1)


def test_what_is_refused(tmp_path):
    base, folder = saved_base(tmp_path, "gpt_oss"), save_experts(tmp_path / "a", 1, "mixtral")
    tensors = weights_of(base)
    key = "model.layers.0.mlp.experts.gate_up_proj"
    from safetensors.torch import save_file

    for change, message in (
        ({key: torch.zeros(2, 24, 16)}, rf"^a: {key} has 3 experts, wanted those of \[2, 24, 16\] as in base"),
        ({key: torch.zeros(3, 24, 9)}, r"^a: the delta of \S+gate_up_proj\.0 is \[24, 16\], wanted \[24, 9\] as"),
        ({key: None}, rf"^a: wanted tensor {key} in base, or gate_proj, up_proj and down_proj \(w1, w3, w2\) of each"),
    ):
        changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        save_file(changed, base / "model.safetensors")
        with pytest.raises(ModelError, match=message):
            merge_engine.merge_into(base, [folder], tmp_path / "no", method="linear")
    assert not (tmp_path / "no").exists()


def test_a_parameter_of_two_dimensions(tmp_path):
    """PEFT counts it as one expert."""
    base = saved_base(tmp_path, "gpt_oss")
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 16, generator=generator), torch.randn(16, 2, generator=generator)
    layer = "model.layers.0.self_attn.q_proj"
    folder = save_factors(tmp_path / "a", {layer: (A, B)}, target_parameters=["q_proj.weight"])
    merge_engine.merge_into(base, [folder], tmp_path / "out", method="linear")
    want = weights_of(base)[f"{layer}.weight"] + 2 * B @ A
    torch.testing.assert_close(weights_of(tmp_path / "out")[f"{layer}.weight"], want)
