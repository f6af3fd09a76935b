"""Layers that an adapter holds whole."""

import pytest
import torch
from lora_files import save_factors
from toy_models import save_base, weights_of

import merge_engine
from merge_engine.errors import ModelError


def test_a_saved_layer_may_come_with_its_original_and_twice(tmp_path):
    """As PEFT writes embeddings in modules_to_save where the vocabulary was resized."""
    base, head = save_base(tmp_path / "base"), torch.full((19, 12), 0.5)
    factors = {"model.layers.0.q_proj": (torch.ones(2, 20), torch.ones(12, 2))}
    stem, names = "base_model.model.lm_head", ("weight", "modules_to_save.weight", "original_module.weight")
    extras = {f"{stem}.{name}": tensor for name, tensor in zip(names, (head, head.clone(), head - 3), strict=True)}
    save_factors(tmp_path / "a", factors, extras, modules_to_save=["lm_head"])
    merge_engine.merge_into(base, [tmp_path / "a"], tmp_path / "out", method="linear")
    got = weights_of(tmp_path / "out")
    assert got.keys() == weights_of(base).keys() and torch.equal(got["lm_head.weight"], head.bfloat16())
    extras[f"{stem}.modules_to_save.weight"] = head + 1
    save_factors(tmp_path / "b", factors, extras, modules_to_save=["lm_head"])
    with pytest.raises(
        ModelError, match=r"^b: \S+lm_head\.modules_to_save\.weight would replace lm_head\.modules_to_s"
    ):
        merge_engine.merge_into(base, [tmp_path / "b"], tmp_path / "no", method="linear")
