"""Tensors as PEFT saves them: the deltas are PEFT's own, and what cannot be merged is refused by name."""

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from peft_models import (
    KEY,
    Q0,
    SCORE,
    TOY_NAMES,
    assert_deltas_are_pefts,
    classifier,
    edit,
    edit_tensors,
    gpt2,
    llama,
    refused,
    saved,
    toy,
    trained,
)
from safetensors.torch import load_file
from torch import nn

from merge_engine.formats.open import open_adapter

pytestmark = [
    # transformers reads its own deprecated attribute when PEFT asks whether a model checkpoints gradients.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT announces that it saves a targeted embedding's base weight as well.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]


@pytest.mark.quick
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"rank_pattern": {"fc": 3, "^layers.1": 2, ".*conv.d": 6}, "alpha_pattern": {"block.*": 5, "emb": 0.75}},
    ],
    ids=["plain", "patterns"],
)
def test_deltas_of_every_kind_of_layer(tmp_path, use_rslora, patterns):
    model = trained(toy(), r=4, lora_alpha=9, use_rslora=use_rslora, target_modules=TOY_NAMES, **patterns)
    model.save_pretrained(tmp_path / "a")
    adapter = open_adapter(tmp_path / "a")
    assert list(adapter.modules) == sorted(TOY_NAMES)
    assert {name: module.kind for name, module in adapter.modules.items() if module.kind != "linear"} == {
        "emb": "embedding",
        **dict.fromkeys(["conv1d", "conv2d", "conv3d", "pointwise"], "conv"),
    }
    assert_deltas_are_pefts(adapter, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_deltas_of_a_language_model_in_its_dtype(tmp_path, dtype):
    saved(tmp_path / "a", r=4, lora_alpha=7, rank_pattern={"layers.1.self_attn.q_proj": 6})
    edit_tensors(tmp_path / "a", lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items()}))
    adapter = open_adapter(tmp_path / "a")
    assert {module.dtype for module in adapter.modules.values()} == {dtype}
    assert adapter.size_bytes == sum(t.nbytes for t in load_file(tmp_path / "a" / "adapter_model.safetensors").values())
    # PEFT loads half factors as float32, so its delta has the precision that the bound asks for.
    assert_deltas_are_pefts(adapter, PeftModel.from_pretrained(llama(), tmp_path / "a"))


def test_deltas_of_layers_that_store_fan_in_first(tmp_path):
    targets = ["c_attn", "c_proj", "c_fc", "wte"]
    model = trained(gpt2(), r=4, lora_alpha=6, fan_in_fan_out=True, target_modules=targets)
    model.save_pretrained(tmp_path / "a")
    adapter = open_adapter(tmp_path / "a")
    module = adapter.modules["transformer.h.0.attn.c_attn"]
    assert (module.rows, module.columns) == (72, 24)  # its base weight is [24, 72]
    assert_deltas_are_pefts(adapter, model)


@pytest.mark.parametrize("config", [{}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal"}])
def test_starts_that_leave_the_base_alone_are_harmless(tmp_path, config):
    model = trained(llama(), r=4, target_modules=["q_proj"], **config)
    model.save_pretrained(tmp_path / "a")
    assert_deltas_are_pefts(open_adapter(tmp_path / "a"), model)


def test_what_is_kept_for_the_backward_pass_only_is_ignored(tmp_path):
    from peft import VeloraConfig

    model = trained(llama(), r=4, target_modules=["q_proj"], velora_config=VeloraConfig(num_groups=4))
    model.save_pretrained(tmp_path / "a")
    assert any("lora_velora" in key for key in load_file(tmp_path / "a" / "adapter_model.safetensors"))
    adapter = open_adapter(tmp_path / "a")
    assert not adapter.extras
    assert_deltas_are_pefts(adapter, model)


def change_shape(key: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({key: torch.ones(shape)})


@pytest.mark.parametrize(
    "change, match",
    [
        (
            change_shape(f"{KEY}.lora_A.weight", 8, 32),
            rf"a: lora_A of {Q0} is \[8, 32\], wanted rank 4 from adapter_config",
        ),
        (
            change_shape(f"{KEY}.lora_B.weight", 32, 8),
            rf"a: lora_B of {Q0} is \[32, 8\], wanted rank 4 from adapter_config",
        ),
        (change_shape(f"{KEY}.lora_A.weight", 128), rf"a: lora_A of {Q0} is \[128\], wanted a factor of a linear"),
        (change_shape(f"{KEY}.lora_A.weight", 0), rf"a: lora_A of {Q0} is \[0\], wanted a factor of a linear"),
        (change_shape(f"{KEY}.lora_A.weight", 4, 0), rf"a: lora_A of {Q0} is \[4, 0\], wanted a factor of a linear"),
        (change_shape(f"{KEY}.lora_B.weight", 32, 4, 1), rf"a: lora_B of {Q0} is \[32, 4, 1\], wanted a factor"),
        (
            change_shape("model.x.lora_A.weight", 4, 2),
            r"a: tensor model.x.lora_A.weight is unknown, wanted base_model.model",
        ),
        (change_shape("base_model.model.x", 4), r"a: tensor base_model.model.x is unknown"),
        (
            change_shape("base_model.model.lora_A.weight", 4, 2),
            r"a: tensor base_model.model.lora_A.weight names no module",
        ),
        (change_shape("base_model.model..lora_A.weight", 4, 2), r"a: tensor .*\.\.lora_A.weight names no module"),
        (change_shape(f"{KEY}.lora_A.default.weight", 4, 2), r"a: tensor .*lora_A.default.weight is unknown"),
        (change_shape(f"{KEY}.lora_magnitude_vector", 32), r"a: tensor .*lora_magnitude_vector is DoRA's"),
        (change_shape(f"{KEY}.lora_B.bias", 31), r"a: .*lora_B.bias is \[31\], wanted \[32\]"),
        (change_shape(f"{KEY}.lora_embedding_A", 4, 3), rf"a: {Q0} has two A factors"),
        (
            change_shape(f"{KEY}.base_layer.lora_A.weight", 4, 3),
            r"belongs to a nested layer \(torch.nn.MultiheadAttention",
        ),
        (lambda tensors: tensors.pop(f"{KEY}.lora_A.weight"), rf"a: {KEY}.lora_B.weight has no lora_A beside it"),
        (lambda tensors: tensors.pop(f"{KEY}.lora_B.weight"), rf"a: {KEY}.lora_A.weight has no lora_B beside it"),
        (
            lambda tensors: tensors.update({f"{KEY}.lora_embedding_B": tensors.pop(f"{KEY}.lora_B.weight")}),
            rf"a: {Q0} has factors of a linear layer and of an embedding",
        ),
        (lambda tensors: tensors.clear(), r"a: .* holds no LoRA tensors"),
        (
            lambda tensors: tensors.update({f"{KEY}.lora_A.weight": torch.ones(4, 32, dtype=torch.int8)}),
            rf"a: lora_A of {Q0} is \[4, 32\] int8, wanted floating point",
        ),
        (
            lambda tensors: tensors.update({f"{KEY}.lora_A.weight": torch.ones(4, 32, dtype=torch.float16)}),
            rf"a: {Q0} has A in float16 and B in float32, wanted one dtype",
        ),
    ],
)
def test_wrong_tensors(tmp_path, change, match):
    path = saved(tmp_path / "a", r=4)
    edit_tensors(path, change)
    refused(path, match=match)


def test_convolutions_in_groups(tmp_path):
    base = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3, groups=2)})
    with pytest.warns(UserWarning, match="groups > 1"):
        path = saved(tmp_path / "a", base, r=4, target_modules=["conv"])
    refused(
        path, match=r"a: lora_B of conv is \[6, 2, 1, 1\] at rank 4: a convolution in 2 groups, which cannot be merged"
    )


def test_tied_heads_are_refused(tmp_path):
    path = classifier(tmp_path / "a")
    edit(path, ensure_weight_tying=True)
    refused(path, match=rf"a: ensure_weight_tying with saved layers \({SCORE}\) is not supported")
