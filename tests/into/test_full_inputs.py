"""A full model with an adapter on it, read tensor by tensor: what fits, and what is refused by name."""

import pytest
import torch
from expert_models import in_peft, save_experts, tiny
from peft_models import llama, saved

from merge_engine.errors import ModelError
from merge_engine.formats.checkpoint import open_checkpoint
from merge_engine.formats.open import open_adapter
from merge_engine.into.full_inputs import full_input


def test_experts_that_the_model_has_one_by_one(tmp_path):
    """Every tensor as PEFT merges it, once transformers has cut it for the file."""
    tiny("mixtral").save_pretrained(tmp_path / "base")
    folder = save_experts(tmp_path / "a", 1, "mixtral")
    made = full_input(open_checkpoint(tmp_path / "base"), open_adapter(folder))
    in_peft(folder, "mixtral").merge_and_unload().save_pretrained(tmp_path / "want")
    want = open_checkpoint(tmp_path / "want")
    assert len(made.adapted) == 2 * (3 * 3 + 1) and set(made.keys) == want.tensors.keys()
    for key, stored in want.tensors.items():
        torch.testing.assert_close(made.read(key), stored.read(), rtol=0, atol=1e-6, msg=key)


@pytest.mark.parametrize(
    ("config", "what"), [({"use_dora": True}, "DoRA"), ({"trainable_token_indices": [1, 2]}, "trained tokens")]
)
def test_more_than_factors_is_refused(tmp_path, config, what):
    llama().save_pretrained(tmp_path / "base")
    folder = saved(tmp_path / "a", r=2, target_modules=["q_proj"], **config)
    with pytest.raises(ModelError, match=rf"^a has {what}; wanted LoRA alone here, or a merge --into BASE by its own"):
        full_input(open_checkpoint(tmp_path / "base"), open_adapter(folder))


def test_experts_in_one_parameter_are_refused(tmp_path):
    tiny("gpt_oss").save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match=r"^a has experts in one parameter; wanted LoRA alone here"):
        full_input(open_checkpoint(tmp_path / "base"), open_adapter(save_experts(tmp_path / "a", 1)))
