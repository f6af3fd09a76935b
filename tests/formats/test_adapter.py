"""An opened adapter: its factors, whether they are finite, and the tensors beside them."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft_models import KEY, Q0, SCORE, classifier, edit_tensors, llama, saved
from safetensors.torch import load_file

from merge_engine.errors import AdapterError
from merge_engine.formats.extras import shared_extras
from merge_engine.formats.open import open_adapter
from merge_engine.formats.peft_writer import AdapterWriter

pytestmark = [
    # transformers reads its own deprecated attribute when PEFT asks whether a model checkpoints gradients.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT announces that it saves a targeted embedding's base weight as well.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]


def test_threads_read_the_same_adapter(tmp_path):
    adapter = open_adapter(saved(tmp_path / "a", r=8))
    names = list(adapter.modules) * 50
    alone = {name: adapter.factors(name) for name in adapter.modules}
    with ThreadPoolExecutor(8) as pool:
        for name, (a, b) in zip(names, pool.map(adapter.factors, names), strict=True):
            assert torch.equal(a, alone[name][0]) and torch.equal(b, alone[name][1])


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    adapter = open_adapter(saved(tmp_path / "a", r=4))
    path = tmp_path / "a" / "adapter_model.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors ends inside tensor .*, \d+ bytes short"):
        adapter.check_finite()
    path.unlink()
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors cannot be read: No such file"):
        adapter.factors(Q0)


@pytest.mark.parametrize("value, name", [(float("nan"), "NaN"), (float("inf"), "Inf"), (float("-inf"), "Inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_values_that_are_not_finite(tmp_path, value, name, dtype):
    path = saved(tmp_path / "a", r=4)
    edit_tensors(path, lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items()}))
    open_adapter(path).check_finite()

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        spoilt = tensors[f"{KEY}.lora_B.weight"].float()
        spoilt[-1, -1] = value
        tensors[f"{KEY}.lora_B.weight"] = spoilt.to(dtype)

    edit_tensors(path, spoil)
    with pytest.raises(
        AdapterError, match=rf"^a: tensor {KEY}.lora_B.weight in .*a/adapter_model.safetensors holds {name}"
    ):
        open_adapter(path).check_finite()


@pytest.mark.quick
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, 1), (1, -1, 1), (1, 1, -1)], ids=str)
def test_a_delta_that_may_leave_float32(tmp_path, signs):
    """2 * 4 * 1e18 * 1e20 = 8e38, whatever the signs of scaling, A and B; a tenth of it is held."""
    scaling, a, b = signs
    path = saved(tmp_path / "a", r=4, lora_alpha=8 * scaling)

    def enlarge(tensors: dict[str, torch.Tensor], by: float) -> None:
        tensors[f"{KEY}.lora_A.weight"] = torch.full_like(tensors[f"{KEY}.lora_A.weight"], 1e18 * a)
        tensors[f"{KEY}.lora_B.weight"] = torch.full_like(tensors[f"{KEY}.lora_B.weight"], by * b)

    edit_tensors(path, lambda tensors: enlarge(tensors, 1e19))
    open_adapter(path).check_finite()
    edit_tensors(path, lambda tensors: enlarge(tensors, 1e20))
    with pytest.raises(AdapterError, match=rf"^a: the delta of {Q0} may reach 8\.0e\+38, which overflows float32$"):
        open_adapter(path).check_finite()


@pytest.mark.quick
def test_trained_heads_are_extras(tmp_path):
    one = open_adapter(classifier(tmp_path / "one"))
    assert list(one.extras) == [SCORE]
    assert torch.equal(one.extras[SCORE].read(), load_file(tmp_path / "one" / "adapter_model.safetensors")[SCORE])
    assert list(shared_extras([one, open_adapter(classifier(tmp_path / "two"))])) == [SCORE]
    assert shared_extras([open_adapter(saved(tmp_path / "plain", r=4))]) == {}


@pytest.mark.parametrize(
    "change, match",
    [
        (
            lambda t: t.update({SCORE: t[SCORE] + 1}),
            rf"^{SCORE} differs between one and two; such tensors cannot be merged: wanted the same in both, or",
        ),
        (
            lambda t: t.update({SCORE: torch.ones(3, 32)}),
            rf"^{SCORE} differs: one has \[2, 32\] float32, two has \[3, 32\] float32",
        ),
        (lambda t: t.update({SCORE: t[SCORE].half()}), rf"^{SCORE} differs: one has .* float32, two has .* float16"),
    ],
)
def test_extras_that_differ_are_refused(tmp_path, change, match):
    one = open_adapter(classifier(tmp_path / "one"))
    edit_tensors(classifier(tmp_path / "two"), change)
    two = open_adapter(tmp_path / "two")
    with pytest.raises(AdapterError, match=match):
        shared_extras([one, two])
    with pytest.raises(AdapterError, match=SCORE):
        AdapterWriter(tmp_path, [two, one], one.modules, torch.float32)
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_a_head_that_is_not_finite(tmp_path):
    edit_tensors(classifier(tmp_path / "a"), lambda tensors: tensors[SCORE][0].fill_(float("nan")))
    with pytest.raises(AdapterError, match=rf"a: tensor {SCORE} in .* holds NaN"):
        open_adapter(tmp_path / "a").check_finite()


def test_trained_tokens(tmp_path):
    for name, indices in (("one", [1, 5]), ("two", [1, 5]), ("three", [1, 6])):
        saved(tmp_path / name, r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": indices})
    one, two, three = (open_adapter(tmp_path / name) for name in ("one", "two", "three"))
    assert list(one.extras) == ["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    assert list(shared_extras([one, two])) == list(one.extras)
    (key,) = shared_extras([one, three])
    assert shared_extras([one, three])[key].shape == (3, 32)


def test_frozen_copies_of_an_embedding_need_not_be_everywhere(tmp_path):
    """PEFT saves the base weight of a targeted embedding; an adapter without that target has none: no conflict."""
    one = open_adapter(saved(tmp_path / "one", r=4, target_modules=["q_proj", "embed_tokens"]))
    two = open_adapter(saved(tmp_path / "two", r=4))
    copy = "base_model.model.model.embed_tokens.base_layer.weight"
    assert list(shared_extras([two, one])) == list(shared_extras([one, two])) == [copy]
    edit_tensors(saved(tmp_path / "other", r=4, target_modules=["embed_tokens"]), lambda tensors: tensors[copy].add_(1))
    with pytest.raises(AdapterError, match=rf"^{copy} differs between one and other"):
        shared_extras([one, two, open_adapter(tmp_path / "other")])


def test_resized_embeddings(tmp_path):
    base = llama()
    base.resize_token_embeddings(66)
    one = open_adapter(saved(tmp_path / "one", base, r=4, target_modules=["q_proj"], save_embedding_layers=True))
    assert sorted(one.extras) == ["base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"]
    assert shared_extras([open_adapter(saved(tmp_path / "two", r=4)), one]).keys() == one.extras.keys()
    three = open_adapter(saved(tmp_path / "three", r=4, target_modules=["embed_tokens"]))
    with pytest.raises(AdapterError, match=r"^one holds model\.embed_tokens whole, and three adapts it"):
        shared_extras([three, one])
