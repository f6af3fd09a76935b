"""One adapter at one rank with scaling 1: the same deltas, whatever reads it."""

import json
import logging
import math

import pytest
import torch
from command_line import run_cli
from expert_models import save_experts
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_files import save_factors
from peft import PeftModel
from peft_models import TOY_NAMES, classifier, edit, edit_tensors, llama, peft_delta, saved, toy
from safetensors.torch import load_file

import merge_engine
from merge_engine.errors import OutputError, RecipeError
from merge_engine.formats.open import open_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]
PATTERNS = {"rank_pattern": {"fc": 7, "layers.1": 1}, "alpha_pattern": {"conv2d": 3, "emb": 2}}


def deltas(folder, names):
    """s B A of an adapter in float64, by what its own configuration says."""
    adapter = open_adapter(folder)
    found = {}
    for name in names:
        a, b = adapter.factors(name)
        found[name] = adapter.modules[name].scaling * (b.double() @ a.double())
    return found


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_the_same_deltas_of_every_kind_of_layer(tmp_path, rslora):
    before = saved(tmp_path / "a", toy, r=4, lora_alpha=6, use_rslora=rslora, **PATTERNS)
    written = merge_engine.normalize(before, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (7, 7, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert (written.rank, written.max_lora_rank, written.modules) == (7, 8, len(TOY_NAMES))
    old, new = (PeftModel.from_pretrained(toy(), tmp_path / name) for name in ("a", "out"))
    exact = deltas(tmp_path / "a", TOY_NAMES)
    for name in TOY_NAMES:
        layer = new.base_model.model.get_submodule(name)
        assert (layer.r["default"], layer.scaling["default"]) == (7, 1.0)
        size = (
            open_adapter(tmp_path / "a").modules[name].scaling
            * math.prod(x.double().abs().max() for x in open_adapter(tmp_path / "a").factors(name))
            * 7
        )
        # one rounding of B, and two products in float32 of up to 7 terms
        assert (deltas(tmp_path / "out", [name])[name] - exact[name]).abs().max() <= 2**-24 * size, name
        assert (peft_delta(old, name) - peft_delta(new, name)).abs().max() <= 20 * 2**-24 * size, name


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    ranks=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    alphas=st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 0.3]), min_size=3, max_size=3),
    rslora=st.booleans(),
)
def test_what_was_rounded_is_said(tmp_path_factory, dtype, ranks, alphas, rslora):
    """Each module is exactly s B and A where it is not named, and the nearest to it where it is."""
    root = tmp_path_factory.mktemp("normalized")
    generator = torch.Generator().manual_seed(sum(ranks))
    factors = {}
    for number, rank in enumerate(ranks):
        shapes = (rank, 5), (3, rank)
        factors[f"layers.{number}.q"] = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    patterns = dict(zip(factors, ranks, strict=True)), dict(zip(factors, alphas, strict=False))
    save_factors(root / "a", factors, rank_pattern=patterns[0], alpha_pattern=patterns[1], use_rslora=rslora)
    before = open_adapter(root / "a")
    written = merge_engine.normalize(before, root / "out")
    after = open_adapter(root / "out")
    assert {module.dtype for module in after.modules.values()} == {dtype} == {written.dtype}
    assert {module.rank for module in after.modules.values()} == {max(m.rank for m in before.modules.values())}
    for name, module in before.modules.items():
        (a, b), (wide_a, wide_b) = before.factors(name), after.factors(name)
        assert torch.equal(wide_a[: len(a)], a) and not wide_a[len(a) :].any() and not wide_b[:, len(a) :].any()
        wanted, got = module.scaling * b.double(), wide_b[:, : len(a)].double()
        power_of_two = math.frexp(module.scaling)[0] == 0.5
        assert (name not in written.rounded) or not power_of_two
        if name not in written.rounded:
            assert torch.equal(got, wanted)
        else:
            assert not torch.equal(got, wanted) or float(torch.tensor(module.scaling)) != module.scaling
            # half a step of the dtype, and a little for the way through float32
            assert ((got - wanted).abs() <= 0.5001 * torch.finfo(dtype).eps * wanted.abs() + 2**-25).all()


def test_powers_of_two_are_exact_and_float32_rounds_finer(tmp_path):
    saved(tmp_path / "a", r=8, lora_alpha=16, rank_pattern={"q_proj": 32})
    assert merge_engine.normalize(tmp_path / "a", tmp_path / "exact").rounded == ()
    assert "bit-exact" in str(merge_engine.normalize(tmp_path / "a", tmp_path / "exact", overwrite=True))
    edit_tensors(
        tmp_path / "a", lambda tensors: tensors.update({key: x.to(torch.bfloat16) for key, x in tensors.items()})
    )
    edit(tmp_path / "a", lora_alpha=12)
    rounded = merge_engine.normalize(tmp_path / "a", tmp_path / "rounded")
    assert len(rounded.rounded) == rounded.modules == 4 and "4 of them rounded once to bfloat16" in str(rounded)
    assert merge_engine.normalize(tmp_path / "a", tmp_path / "wide", dtype="float32").rounded == ()
    for name, exact in deltas(tmp_path / "a", open_adapter(tmp_path / "a").modules).items():
        assert torch.equal(deltas(tmp_path / "wide", [name])[name], exact)


@pytest.mark.quick
@pytest.mark.parametrize(("alpha", "rounded"), [(1, ("layers.0.q",)), (6, ())])
def test_a_scaling_that_no_float_is_makes_nothing_exact(tmp_path, alpha, rounded):
    """3 times the float64 next to 1/3 is 1 only after a rounding."""
    factors = {"layers.0.q": [torch.ones(3, 5), torch.full((2, 3), 3.0)]}
    save_factors(tmp_path / "a", factors, rank_pattern={"q": 3}, alpha_pattern={"q": alpha})
    assert open_adapter(tmp_path / "a").modules["layers.0.q"].scaling == alpha / 3
    assert merge_engine.normalize(tmp_path / "a", tmp_path / "out").rounded == rounded


def test_what_is_beside_the_factors_is_kept(tmp_path, caplog):
    folder = classifier(tmp_path / "a", rank_pattern={"layers.0.self_attn.q_proj": 2})
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("what it is\n")
    (folder / "optimizer.pt").write_text("not this")
    with caplog.at_level(logging.WARNING):
        merge_engine.normalize(folder, tmp_path / "out")
    assert "layers that are saved whole (score.weight), which servers such as vLLM and SGLang may refuse" in caplog.text
    assert "--into BASE" in caplog.text
    names = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert (tmp_path / "out" / "README.md").read_text() == "what it is\n"
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "out"))
    assert one.keys() == two.keys()
    assert torch.equal(one["base_model.model.score.weight"], two["base_model.model.score.weight"])
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"] == ["score"]


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor.s. have invalid shape")  # PEFT's, of any bias
def test_experts_and_biases(tmp_path):
    """Each expert's pair at one rank, stacked as PEFT has them; a bias times its scaling."""
    experts = {"r": 3, "lora_alpha": 6, "rank_pattern": {"mlp.experts.down_proj": 2}}
    before = open_adapter(save_experts(tmp_path / "experts", 0, **experts))
    assert len({module.rank for module in before.modules.values()}) > 1
    merge_engine.normalize(before, tmp_path / "one")
    biased = open_adapter(saved(tmp_path / "biased", toy, target_modules=["fc", "block.fc"], lora_bias=True, r=4))
    edit(tmp_path / "biased", lora_alpha=12, rank_pattern={})
    written = merge_engine.normalize(open_adapter(tmp_path / "biased"), tmp_path / "bias")
    assert {name for name in biased.modules if name.endswith(".bias")} == {"fc.bias", "block.fc.bias"}
    for old, new in (("experts", "one"), ("biased", "bias")):
        adapter = open_adapter(tmp_path / new)
        assert {module.scaling for module in adapter.modules.values()} == {1.0}
        assert len({module.rank for module in adapter.modules.values() if module.kind != "bias"}) == 1
        want, got = (deltas(tmp_path / folder, adapter.modules) for folder in (old, new))
        assert all((got[name] - want[name]).abs().max() <= 2**-23 * want[name].abs().max() for name in want)
    assert set(written.rounded) == set(biased.modules)  # 12 / 4 is no power of two
    model, base = (
        PeftModel.from_pretrained(toy(), tmp_path / "bias"),
        PeftModel.from_pretrained(toy(), tmp_path / "biased"),
    )
    x = torch.randn(3, 6)
    assert torch.allclose(model.base_model.model.fc(x), base.base_model.model.fc(x), rtol=1e-5, atol=1e-5)


@pytest.mark.quick
def test_the_command(tmp_path, capsys):
    saved(tmp_path / "a", r=4, lora_alpha=8, rank_pattern={"q_proj": 20})
    code, out, err = run_cli(capsys, "normalize", tmp_path / "a", "-o", tmp_path / "out")
    assert (code, err) == (0, "")
    told = "4 modules at rank 20, scaling 1, 2 of them rounded once to float32"
    assert out == f"{tmp_path / 'out'}: {told}; vLLM loads it with --max-lora-rank 32\n"
    model = PeftModel.from_pretrained(llama(), tmp_path / "out")
    assert model.peft_config["default"].r == 20
    code, out, err = run_cli(capsys, "normalize", tmp_path / "a", "-o", tmp_path / "out")
    assert code == 2 and "already exists" in err
    code, out, err = run_cli(capsys, "normalize", tmp_path / "a")
    assert code == 2 and "output: wanted a folder to write to" in err


def test_nothing_is_written_where_it_cannot_be_done(tmp_path):
    saved(tmp_path / "a", r=4)
    with pytest.raises(RecipeError, match=r"^dtype: wanted one of float32, float16, bfloat16, got 'int8'$"):
        merge_engine.normalize(tmp_path / "a", tmp_path / "out", dtype="int8")
    with pytest.raises(OutputError, match="which is merged; wanted another folder"):
        merge_engine.normalize(tmp_path / "a", tmp_path / "a", overwrite=True)
    edit(tmp_path / "a", lora_alpha=2.0**40)
    with pytest.raises(OutputError, match=r"lora_B.weight reaches .*, which overflows torch.float16$"):
        merge_engine.normalize(tmp_path / "a", tmp_path / "out", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
