"""Merged adapters saved and loaded again, and the script of PEFT's merging guide on quantised bases."""

import subprocess
import sys

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft_zoo import Spec, Zoo, build, factors, has_doubled_svd_scaling, layers

from merge_engine.peft_backend import add_weighted_adapter, disable, enable


@pytest.mark.parametrize("combination", ["linear", "cat", "svd", "ties", "ties_svd", "dare_linear"])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding", "attention"])
def test_the_saved_adapter_reloads_in_stock_peft_with_the_same_factors(kind, combination, tmp_path):
    """Ranks by pattern: stock's own result would not load again."""
    patterns = {"rank_pattern": {"one": 2}, "alpha_pattern": {"two": 9}}
    spec = Spec(kind=kind, configs=(patterns, {**patterns, "use_rslora": True}), weights=(1.0, -0.5))
    model = build(spec)
    call = {"combination_type": combination, "density": 0.5}
    add_weighted_adapter(model, spec.names, spec.weights, "merged", **call, seed=1)
    for config in model.peft_config.values():
        config.base_model_name_or_path = "zoo"
    model.save_pretrained(tmp_path, selected_adapters=["merged"], save_embedding_layers=False)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Zoo(kind), tmp_path / "merged", adapter_name="merged")
    want = factors(model, "merged")
    assert factors(again, "merged").keys() == want.keys()
    for name, pair in factors(again, "merged").items():
        assert all(torch.equal(one, other) for one, other in zip(pair, want[name], strict=True))
        assert layers(again)[name].scaling["merged"] == 1.0


def llama(folder):
    """A local base model in the Llama architecture, and three adapters of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for name in ("norobots", "sql", "adcopy"):
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        adapter = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), lora)
        adapter.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("llama"))


def quantized_to(bits, local):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = {
        4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32, "bnb_4bit_quant_type": "nf4"},
        8: {"load_in_8bit": True},
    }[bits]
    return AutoModelForCausalLM.from_pretrained(
        local / "base", device_map="cpu", quantization_config=BitsAndBytesConfig(**quantization)
    )


@pytest.fixture(scope="module", params=[4, 8])
def quantized(request, local):
    """The base in so many bits, with all three adapters."""
    model = PeftModel.from_pretrained(quantized_to(request.param, local), local / "norobots", adapter_name="norobots")
    model.load_adapter(local / "sql", adapter_name="sql")
    model.load_adapter(local / "adcopy", adapter_name="adcopy")
    return model


def guide(model, drop_in, weights=(2.0, 1.0, 1.0), **call):
    """The script of PEFT's model merging guide, once the adapters are loaded: (the tokens it generates, logits)."""
    names = ["norobots", "adcopy", "sql"]
    if drop_in:
        enable()  # the one added line
    try:
        torch.manual_seed(5)
        model.add_weighted_adapter(names, list(weights), "merge", **call)
    finally:
        disable()
    model.set_adapter("merge")
    prompt = torch.tensor([[1, 5, 7, 11]])
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options).tolist()
    with torch.no_grad():
        logits = model(input_ids=prompt).logits
    model.set_adapter("norobots")
    model.delete_adapter("merge")
    return generated, logits


@pytest.mark.parametrize("combination", ["ties", "dare_linear", "dare_ties", "cat", "svd", "ties_svd"])
def test_the_merging_guide_gives_stocks_tokens_and_logits(quantized, combination):
    """By default settings: after torch.manual_seed, DARE's drops are stock's too."""
    if "svd" in combination and has_doubled_svd_scaling():
        pytest.skip("this PEFT multiplies the scaling into svd types twice")
    call = {"combination_type": combination, "density": 0.2}
    (theirs, wanted), (ours, logits) = (guide(quantized, drop_in, **call) for drop_in in (False, True))
    assert ours == theirs
    if "svd" in combination:
        # The squared error of the cut may be 1e-5 larger than the best: its product moves by 0.3 % of what is cut off.
        assert (logits - wanted).norm() <= 0.01 * wanted.norm()
    else:
        assert torch.equal(logits, wanted)


def test_the_guides_part_on_ia3(local):
    """IA3 keeps its own method, with the drop-in enabled too."""
    found = []
    for drop_in in (False, True):
        config = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
        model = get_peft_model(quantized_to(4, local), config, "norobots")
        model.add_adapter("adcopy", config)
        model.add_adapter("sql", config)
        generator = torch.Generator().manual_seed(3)
        for key, vector in model.named_parameters():
            if "ia3_l" in key:
                vector.data = torch.rand(vector.shape, generator=generator)
        found.append(guide(model, drop_in, weights=(0.5, 0.3, 0.2)))
    (theirs, wanted), (ours, logits) = found
    assert ours == theirs and torch.equal(logits, wanted)


def test_the_saved_merge_generates_the_same_without_merge_engine(local, tmp_path):
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(local / "base"), local / "sql", adapter_name="sql"
    )
    model.load_adapter(local / "adcopy", adapter_name="adcopy")
    add_weighted_adapter(model, ["sql", "adcopy"], [1.0, -0.5], "merge", "ties_svd", density=0.4)
    model.set_adapter("merge")
    model.save_pretrained(tmp_path, selected_adapters=["merge"])
    prompt = torch.tensor([[1, 5, 7, 11]])
    torch.save(model(input_ids=prompt).logits.detach(), tmp_path / "logits")
    script = (
        "import sys, torch\n"
        "sys.modules['merge_engine'] = None\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "model = PeftModel.from_pretrained(base, sys.argv[2] + '/merge')\n"
        "logits = model(input_ids=torch.tensor([[1, 5, 7, 11]])).logits\n"
        "assert torch.equal(logits, torch.load(sys.argv[2] + '/logits'))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(local / "base"), str(tmp_path)], check=True, cwd=tmp_path)
