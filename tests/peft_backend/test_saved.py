"""What adapters train beside their factors, and how their layers are used: carried over or merged, and saved."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.variants import ALoraLinearVariant
from peft.utils import ModulesToSaveWrapper
from peft_zoo import STOCK, factors
from transformers import LlamaConfig, LlamaForCausalLM
from unchanged import assert_unchanged, snapshot

from merge_engine.errors import AdapterError
from merge_engine.peft_backend import add_weighted_adapter
from merge_engine.peft_backend.saved import Saved

SHAPE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 2}
INPUT = torch.tensor([[3, 5, 7, 9, 3, 1, 2]])


def base(**values):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **values)).eval()


def adapted(configs, **values):
    """Adapters "x", "y", ... with values of their own in all that they train."""
    model, names = None, []
    for name, config in zip("xyz", configs, strict=False):
        lora = LoraConfig(**{"r": 3, "target_modules": ["q_proj", "v_proj"], **config})
        if model is None:
            model = get_peft_model(base(**values), lora, name)
        else:
            model.add_adapter(name, lora)
        names.append(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
            elif "tokens_delta" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 4)
    return model, names


def token_layer(model):
    return model.base_model.model.model.embed_tokens.token_adapter


def shift(model, adapter, token):
    layer = token_layer(model)
    place = layer.token_indices[adapter].index(token)
    return (layer.trainable_tokens_delta[adapter] - layer.trainable_tokens_original[adapter])[place].detach().double()


def logits(model, adapter):
    model.set_adapter(adapter)
    with torch.no_grad():
        return model.eval()(INPUT).logits


def again(model, folder, name, **values):
    """The adapter saved, and loaded onto the base."""
    model.peft_config[name].base_model_name_or_path = None
    model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
    return PeftModel.from_pretrained(base(**values), folder / name, adapter_name=name)


@pytest.mark.quick
@pytest.mark.parametrize("tied", [False, True])
def test_trained_tokens_are_merged_by_the_same_rule(tied, tmp_path):
    """Stock has the base's rows in the merged adapter."""
    tokens = [{"trainable_token_indices": [3, 5, 9]}, {"trainable_token_indices": [5, 7]}, {}]
    model, names = adapted(tokens, tie_word_embeddings=tied)
    weights = {"x": 0.5, "y": -1.5, "z": 1.0}
    add_weighted_adapter(model, names, list(weights.values()), "merged", "linear")
    assert model.peft_config["merged"].trainable_token_indices == [3, 5, 9, 7]
    for token in (3, 5, 7, 9):
        have = [name for name in "xy" if token in token_layer(model).token_indices[name]]
        want = sum(weights[name] * shift(model, name, token) for name in have)
        torch.testing.assert_close(shift(model, "merged", token), want, rtol=1e-6, atol=1e-6)
    loaded = again(model, tmp_path, "merged", tie_word_embeddings=tied)
    torch.testing.assert_close(logits(loaded, "merged"), logits(model, "merged"))
    STOCK(model.base_model, names, list(weights.values()), "theirs", "linear")
    assert not shift(model, "theirs", 3).any()


@pytest.mark.parametrize("density", [0.4, 1.0])
@pytest.mark.parametrize("election", ["total", "frequency"])
def test_trained_tokens_by_ties(density, election):
    """Each adapter's rows are one task tensor: trimmed together, with signs elected element by element."""
    model, names = adapted([{"trainable_token_indices": [3, 5]}, {"trainable_token_indices": [5, 3, 8]}])
    weights = [1.0, 0.7]
    call = {"density": density, "majority_sign_method": election}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # density 1
        add_weighted_adapter(model, names, weights, "merged", "ties", **call)
    kept = []
    for name in names:
        rows = torch.stack([shift(model, name, token) for token in token_layer(model).token_indices[name]])
        least = rows.abs().flatten().topk(int(density * rows.numel())).values.min()
        kept.append(dict(zip(token_layer(model).token_indices[name], rows * (rows.abs() >= least), strict=True)))
    for token in (3, 5, 8):
        zero = torch.zeros(SHAPE["hidden_size"], dtype=torch.float64)
        x = torch.stack([rows.get(token, zero) for rows in kept])
        sign = torch.where((x.sign() if election == "frequency" else x).sum(0) >= 0, 1.0, -1.0)
        agree = x.sign() == sign
        want = (x * torch.tensor(weights)[:, None] * agree).sum(0) / agree.sum(0).clamp(min=1)
        torch.testing.assert_close(shift(model, "merged", token), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rng", ["torch", "philox"])
def test_trained_tokens_are_dropped_at_random(rng):
    model, names = adapted([{"trainable_token_indices": [3, 5]}, {"trainable_token_indices": [3, 5]}])
    for merged in ("one", "two"):
        torch.manual_seed(4)
        add_weighted_adapter(model, names, [1, 1], merged, "dare_linear", density=0.5, rng=rng)
    assert torch.equal(*(token_layer(model).trainable_tokens_delta[merged] for merged in ("one", "two")))
    shares = {0.0, 2.0}  # of each row's shift: dropped, or kept and doubled
    for token in (3, 5):
        options = [x * shift(model, "x", token) + y * shift(model, "y", token) for x in shares for y in shares]
        found = torch.stack([(option - shift(model, "one", token)).abs() for option in options]).amin(0)
        assert found.max() < 1e-6


def test_tokens_of_two_embeddings_by_name(tmp_path):
    """Lists and mappings of tokens meet in a mapping by the embeddings' names."""
    model, names = adapted([{"trainable_token_indices": [3]}, {"trainable_token_indices": {"embed_tokens": [5]}}])
    add_weighted_adapter(model, names, [1, 1], "merged", "cat")
    assert model.peft_config["merged"].trainable_token_indices == {"model.embed_tokens": [3, 5]}
    torch.testing.assert_close(logits(again(model, tmp_path, "merged"), "merged"), logits(model, "merged"))


def test_one_adapter_keeps_its_tokens_bit_for_bit():
    model, _ = adapted([{"trainable_token_indices": [3, 5]}])
    add_weighted_adapter(model, ["x"], [1.0], "merged")
    rows = token_layer(model).trainable_tokens_delta
    assert torch.equal(rows["x"], rows["merged"]) and not rows["merged"].requires_grad
    torch.testing.assert_close(logits(model, "merged"), logits(model, "x"))


@pytest.mark.quick
def test_saved_layers_of_one_adapter_each_are_carried_over(tmp_path):
    """Stock has copies of the base's layers, and only those that the first adapter names."""
    model, names = adapted([{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["norm"]}])
    add_weighted_adapter(model, names, [1, 0.5], "merged", "ties", density=0.5)
    inner = model.base_model.model
    for wrapper, adapter in ((inner.lm_head, "x"), (inner.model.norm, "y")):
        copied, trained = wrapper.modules_to_save["merged"].weight, wrapper.modules_to_save[adapter].weight
        assert torch.equal(copied, trained) and copied.data_ptr() != trained.data_ptr()
        assert not copied.requires_grad
    assert model.peft_config["merged"].modules_to_save == ["lm_head", "norm"]
    torch.testing.assert_close(logits(again(model, tmp_path, "merged"), "merged"), logits(model, "merged"))
    STOCK(model.base_model, names, [1, 0.5], "theirs", "ties", density=0.5)
    assert torch.equal(inner.lm_head.modules_to_save["theirs"].weight, inner.lm_head.original_module.weight)


def test_weights_that_saved_layers_share_are_shared_by_their_copies():
    """As of an embedding and a head that are tied: once in memory, and once in what is trained on."""
    embedding, head = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5, bias=False)
    wrappers = [ModulesToSaveWrapper(layer, "x") for layer in (embedding, head)]
    for wrapper in wrappers[1:]:
        wrapper.modules_to_save["x"].weight = wrappers[0].modules_to_save["x"].weight
    Saved(modules=[(wrapper, "x") for wrapper in wrappers]).install("merged", [])
    one, other = (wrapper.modules_to_save["merged"].weight for wrapper in wrappers)
    assert one is other and one is not wrappers[0].modules_to_save["x"].weight


@pytest.mark.parametrize("extra", [{"trainable_token_indices": [3]}, {"modules_to_save": ["lm_head"]}])
def test_an_error_on_the_way_leaves_nothing(extra, monkeypatch):
    model, names = adapted([extra, {}])
    before = snapshot(model)

    right = Saved.install

    def interrupted(self, *rest):
        right(self, *rest)
        raise RuntimeError("no memory")

    monkeypatch.setattr(Saved, "install", interrupted)
    with pytest.raises(RuntimeError, match="no memory"):
        add_weighted_adapter(model, names, [1, 1], "merged", "linear")
    monkeypatch.undo()
    assert_unchanged(model, before)
    add_weighted_adapter(model, names, [1, 1], "merged", "linear")


@pytest.mark.parametrize("extra", [{"trainable_token_indices": [3]}, {"modules_to_save": ["lm_head"]}])
def test_a_merged_adapter_can_be_deleted(extra):
    model, names = adapted([extra, {}])
    before = snapshot(model)
    add_weighted_adapter(model, names, [1, 1], "merged", "linear")
    model.delete_adapter("merged")
    assert_unchanged(model, before)


@pytest.mark.parametrize("combination", ["linear", "ties", "cat", "svd", "dare_ties"])
def test_activated_adapters_keep_their_tokens(combination):
    """An aLoRA acts from its invocation tokens on; the merged one has the same, and stock's effect."""
    activated = {"alora_invocation_tokens": [9, 3], "task_type": "CAUSAL_LM"}
    model, names = adapted([activated, activated])
    call = {"combination_type": combination, "density": 0.5}
    for add, merged in ((lambda *rest, **more: STOCK(model.base_model, *rest, **more), "theirs"), (None, "ours")):
        torch.manual_seed(2)
        (add or (lambda *rest, **more: add_weighted_adapter(model, *rest, **more)))(names, [1.0, 0.5], merged, **call)
    assert model.peft_config["ours"].alora_invocation_tokens == [9, 3]
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer.lora_variant["ours"], ALoraLinearVariant)
    torch.testing.assert_close(logits(model, "ours"), logits(model, "theirs"), rtol=1e-4, atol=1e-5)
    model.delete_adapter("ours")
    assert "ours" not in layer.lora_variant


@pytest.mark.parametrize("other", [None, [3]])
def test_activated_adapters_with_other_tokens_are_refused(other):
    activated = {"alora_invocation_tokens": [9, 3], "task_type": "CAUSAL_LM"}
    model, names = adapted([activated, {**activated, "alora_invocation_tokens": other}])
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"y: alora_invocation_tokens is .*, wanted \[9, 3\] as in x"):
        add_weighted_adapter(model, names, [1, 1], "merged", "linear")
    assert_unchanged(model, before)


@pytest.mark.parametrize("combination", ["linear", "ties_svd"])
def test_replicated_layers(combination, tmp_path):
    """Stock replicates the layers once more, and so gives the copies of a layer the factors of the layer."""
    model, names = adapted([{"layer_replication": [[0, 2], [1, 3]]}, {}])
    assert len(model.base_model.model.model.layers) == 4
    before = logits(model, "x")
    add_weighted_adapter(model, names, [1.0, 0.5], "merged", combination, density=0.5)
    assert torch.equal(logits(model, "x"), before)
    assert len(factors(model, "merged")) == 8
    assert model.peft_config["merged"].layer_replication == [[0, 2], [1, 3]]
    torch.testing.assert_close(logits(again(model, tmp_path, "merged"), "merged"), logits(model, "merged"))


def test_stock_changes_adapters_of_replicated_layers():
    model, names = adapted([{"layer_replication": [[0, 2], [1, 3]]}, {}])
    before = logits(model, "x")
    STOCK(model.base_model, names, [1.0, 0.5], "merged", "linear")
    assert not torch.allclose(logits(model, "x"), before)


def test_other_replications_are_refused():
    model, names = adapted([{"layer_replication": [[0, 2], [1, 3]]}, {}])
    model.peft_config["y"] = replace(model.peft_config["y"], layer_replication=[[0, 3]])
    with pytest.raises(AdapterError, match=r"y: layer_replication is \[\[0, 3\]\], wanted \[\[0, 2\], "):
        add_weighted_adapter(model, names, [1, 1], "merged", "linear")
