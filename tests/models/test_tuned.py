"""DoRA and trained tokens into a base: as PEFT merges one adapter, and the textbook's merge of several."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_files import STEM, save_factors
from peft import PeftModel
from peft_models import edit, edit_tensors, gpt2, llama, saved, toy, trained
from safetensors.torch import load_file, save_file
from toy_models import weights_of
from transformers import LlamaConfig, LlamaForCausalLM

import merge_engine
from merge_engine.errors import AdapterError, MergeError, ModelError, RecipeError
from merge_engine.formats.adapter import TOKENS
from merge_engine.rules import reference
from merge_engine.rules.rule import make_rule

KEY = f"{STEM}model.embed_tokens{TOKENS}"
EMBED = "model.embed_tokens.weight"
WEIGHTS = [0.9, -0.4, 1.3]


def saved_base(folder, make):
    """A model as files, under the names that its modules have."""
    folder.mkdir()
    tensors = {key: t.clone().contiguous() for key, t in make().state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    return folder


def merged_by_peft(folder, make):
    return PeftModel.from_pretrained(make(), folder).merge_and_unload().state_dict()


def dora(folder, make, seed=0, **config):
    """DoRA with magnitudes that were moved from where PEFT starts them."""
    model = trained(make(), seed, use_dora=True, **{"r": 3, "lora_alpha": 5, **config})
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(0.5 + torch.rand(parameter.shape, generator=generator))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def assert_near(got, want, steps=16):
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        atol = steps * 2**-24 * float(tensor.abs().max())
        torch.testing.assert_close(
            got[key].double(), tensor.double(), rtol=0, atol=atol, msg=lambda m, k=key: f"{k}: {m}"
        )


DORA = {
    "linear": (llama, {"target_modules": ["q_proj", "v_proj", "up_proj"]}),
    "rslora": (
        llama,
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "rank_pattern": {"down_proj": 2}},
    ),
    "conv1d_transposed": (gpt2, {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "every kind": (toy, {"target_modules": ["fc", "block.fc2", "conv1d", "conv2d", "pointwise", "conv3d", "emb"]}),
}


@pytest.mark.quick
@pytest.mark.parametrize("kind", DORA)
def test_one_dora_is_what_peft_merges_and_unloads(tmp_path, kind):
    make, config = DORA[kind]
    base, folder = saved_base(tmp_path / "base", make), dora(tmp_path / "a", make, 1, **config)
    merge_engine.merge_into(base, [folder], tmp_path / "out", method="linear")
    want = {key: tensor for key, tensor in merged_by_peft(folder, make).items() if key in weights_of(base)}
    assert_near(weights_of(tmp_path / "out"), want)
    assert any(not torch.equal(want[key], tensor) for key, tensor in weights_of(base).items())


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "linear"},
        {"method": "ties", "density": 0.4},
        {"method": "ties", "density": 0.4, "scope": "model"},
        {"method": "magnitude_prune", "density": 0.3},
        {"method": "linear", "scale": "auto"},
    ],
)
def test_several_of_which_some_are_dora(tmp_path, recipe):
    base = saved_base(tmp_path / "base", llama)
    folders = [dora(tmp_path / str(i), llama, i, r=2 + i, target_modules=["q_proj", "v_proj"]) for i in range(2)]
    folders.append(saved(tmp_path / "2", llama, 2, r=3, lora_alpha=7, target_modules=["q_proj", "up_proj"]))
    merge_engine.merge_into(base, folders, tmp_path / "out", weights=WEIGHTS, **recipe)
    start, got = weights_of(base), weights_of(tmp_path / "out")
    tasks = {}
    for number, folder in enumerate(folders):
        adapted = {key.split(".lora_")[0].removeprefix(STEM) for key in load_file(folder / "adapter_model.safetensors")}
        after = merged_by_peft(folder, llama)
        for name in adapted:
            tasks.setdefault(f"{name}.weight", {})[number] = (
                after[f"{name}.weight"] - start[f"{name}.weight"]
            ).double()
    rule = make_rule(recipe["method"], scope=recipe.get("scope"))
    merged = reference.merge_model(tasks, WEIGHTS, {key: [recipe.get("density", 0.2)] * 3 for key in tasks}, rule)
    want = {key: tensor.double() for key, tensor in start.items()}
    for key, delta in merged.items():
        scale = 1.0
        if "scale" in recipe:
            norms = [float(task.norm()) for task in tasks[key].values()]
            scale = sum(norms) / len(norms) / float(delta.norm())
        want[key] = want[key] + scale * delta
    assert_near(got, want, 200)


@settings(max_examples=15, deadline=None)
@given(
    rank=st.integers(1, 4),
    alpha=st.sampled_from([None, 1, 3.5]),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    seed=st.integers(0, 10**6),
    weight=st.sampled_from([1.0, -0.5, 2.0]),
)
def test_the_formula(tmp_path_factory, rank, alpha, shape, seed, weight):
    """base + w (m (W + s B A) / |W + s B A| - W) in float64, whatever rank and alpha are."""
    root, generator = tmp_path_factory.mktemp("dora"), torch.Generator().manual_seed(seed)
    rows, columns = shape
    W, m = torch.randn(rows, columns, generator=generator), torch.rand(rows, generator=generator) + 0.5
    A, B = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
    config = {"use_dora": True, **({} if alpha is None else {"lora_alpha": alpha})}
    folder = save_factors(root / "a", {"fc": (A, B)}, {f"{STEM}fc.lora_magnitude_vector": m}, **config)
    if alpha is None:
        values = json.loads((folder / "adapter_config.json").read_text())
        del values["lora_alpha"]
        (folder / "adapter_config.json").write_text(json.dumps(values))
    (root / "base").mkdir()
    save_file({"fc.weight": W}, root / "base" / "model.safetensors")
    (root / "base" / "config.json").write_text("{}")
    merge_engine.merge_into(root / "base", [folder], root / "out", method="linear", weights=[weight])
    V = W.double() + (8 if alpha is None else alpha) / rank * (B.double() @ A.double())
    norms = V.norm(dim=1, keepdim=True)
    want = W.double() + weight * (m.double()[:, None] * V / norms - W.double())
    size = 1 + (rank + 3) * float(B.norm() * A.norm()) * 8 / float(norms.min())
    torch.testing.assert_close(weights_of(root / "out")["fc.weight"].double(), want, rtol=0, atol=32 * 2**-24 * size)


def test_dora_without_its_base_is_refused(tmp_path):
    folder = dora(tmp_path / "a", llama, target_modules=["q_proj"])
    message = r"^a: use_dora is set in adapter_config\.json; DoRA rescales .*; wanted a merge --into BASE"
    with pytest.raises(AdapterError, match=message):
        merge_engine.merge([folder], tmp_path / "no", method="linear")
    with pytest.raises(AdapterError, match=message):
        merge_engine.interference([folder, folder])
    with merge_engine.Session([folder]) as session, pytest.raises(AdapterError, match=message):
        session.merge(method="linear")
    from merge_engine.formats.normalize import normalize

    with pytest.raises(AdapterError, match=message):
        normalize(folder, tmp_path / "no")
    base = saved_base(tmp_path / "base", llama)
    with pytest.raises(
        RecipeError, match=r"^method: a is known beside its base only \(DoRA\) and has no factors; want"
    ):
        merge_engine.merge_into(base, [folder], tmp_path / "no", method="tsv")
    key = f"{STEM}model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    for change, config, text in (
        (lambda t: t.pop(key), {}, r"wanted a lora_magnitude_vector of each layer, got none of model\.layers\.0\.self"),
        (lambda t: t.update({key: torch.ones(3)}), {}, rf"^a: {key} is \[3\], wanted \[32\]"),
        (lambda t: t.update({key: torch.ones(33)}), {}, rf"^a: {key} is \[33\], wanted \[32\]"),
        (lambda t: t.update({key: torch.full((32,), torch.nan)}), {}, rf"^a: tensor {key} in \S+ holds NaN"),
        (lambda t: t.update({key: torch.ones(32)}), {"use_dora": False}, r"is DoRA's, wanted use_dora with it"),
    ):
        edit_tensors(folder, change)
        edit(folder, **config)
        with pytest.raises(MergeError, match=text):
            merge_engine.merge_into(base, [folder], tmp_path / "no", method="linear")
    assert not (tmp_path / "no").exists()


def tied():
    torch.manual_seed(7)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    return LlamaForCausalLM(
        LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    )


def token_adapter(folder, seed, tokens, make=llama):
    return saved(folder, make, seed, r=2, target_modules=["q_proj"], trainable_token_indices=tokens)


@pytest.mark.quick
@pytest.mark.parametrize("make", [llama, tied])
@pytest.mark.parametrize("tokens", [[5, 1], {"embed_tokens": [0, 63, 7]}])
def test_one_adapters_tokens_are_what_peft_merges_and_unloads(tmp_path, make, tokens):
    base, folder = tmp_path / "base", token_adapter(tmp_path / "a", 1, tokens, make)
    make().save_pretrained(base)
    merge_engine.merge_into(base, [folder], tmp_path / "out", method="linear", shard_size="20KB")
    got = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert_near(got, merged_by_peft(folder, make))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights_of(base).keys()


TOKEN_SETS = {
    "the same": ([3, 9, 4], [3, 9, 4], [3, 9, 4]),
    "apart": ([3, 9], [0], [63, 5]),
    "some the same": ([3, 9, 4], [9, 3, 1], [9]),
}


@pytest.mark.parametrize("case", TOKEN_SETS)
@pytest.mark.parametrize("recipe", [{"method": "linear"}, {"method": "ties", "density": 0.4}, {"method": "elect_max"}])
def test_rows_are_task_tensors(tmp_path, case, recipe):
    """Those that the same adapters train are one; with density 1 any grouping comes to the same."""
    base = tmp_path / "base"
    llama().save_pretrained(base)
    folders = [token_adapter(tmp_path / str(i), i, tokens) for i, tokens in enumerate(TOKEN_SETS[case])]
    merge_engine.merge_into(base, folders, tmp_path / "out", weights=WEIGHTS, scale=0.5, **recipe)
    start = weights_of(base)[EMBED].double()
    rows = []
    for folder, tokens in zip(folders, TOKEN_SETS[case], strict=True):
        stored = load_file(folder / "adapter_model.safetensors")[KEY].double()
        rows.append({token: stored[place] - start[token] for place, token in enumerate(tokens)})
    groups = {}
    for token in sorted({token for own in rows for token in own}):
        groups.setdefault(tuple(i for i, own in enumerate(rows) if token in own), []).append(token)
    tasks = {
        tuple(tokens): {i: torch.stack([rows[i][token] for token in tokens]) for i in having}
        for having, tokens in groups.items()
    }
    rule = make_rule(recipe["method"])
    merged = reference.merge_model(tasks, WEIGHTS, {key: [0.4] * 3 for key in tasks}, rule)
    want = start.clone()
    for tokens, delta in merged.items():
        want[list(tokens)] += 0.5 * delta
    got = weights_of(tmp_path / "out")
    torch.testing.assert_close(got[EMBED].double(), want, rtol=0, atol=1e-6)
    untouched = [row for row in range(64) if not any(row in own for own in rows)]
    assert torch.equal(got[EMBED][untouched], weights_of(base)[EMBED][untouched])
    assert torch.equal(got["lm_head.weight"], weights_of(base)["lm_head.weight"])


def test_a_tied_head_that_is_saved_as_well_gets_the_same_rows(tmp_path):
    base, folder = tmp_path / "base", token_adapter(tmp_path / "a", 1, [5, 1], tied)
    tied().save_pretrained(base)
    tensors = weights_of(base)
    save_file({**tensors, "lm_head.weight": tensors[EMBED].clone()}, base / "model.safetensors")
    merge_engine.merge_into(base, [folder], tmp_path / "out", method="linear", weights=[0.5])
    got, stored = weights_of(tmp_path / "out"), load_file(folder / "adapter_model.safetensors")[KEY]
    assert torch.equal(got[EMBED], got["lm_head.weight"])
    torch.testing.assert_close(got[EMBED][[5, 1]], (tensors[EMBED][[5, 1]] + stored) / 2, rtol=0, atol=1e-6)


def test_what_does_not_go_into_the_base(tmp_path):
    base, folder = tmp_path / "base", token_adapter(tmp_path / "a", 1, [5, 1])
    llama().save_pretrained(base)
    llama().save_pretrained(tmp_path / "full")
    whole = save_factors(
        tmp_path / "whole",
        {"model.layers.0.self_attn.q_proj": (torch.ones(2, 32), torch.ones(32, 2))},
        {f"{STEM}{EMBED}": torch.zeros(64, 32)},
    )
    for inputs, options, message in (
        ([folder, tmp_path / "full"], {}, r"^a has trained tokens; wanted adapters only beside it, .*, got full"),
        ([folder], {"vocab": "union"}, r"^a has trained tokens; wanted .* and vocab base, got vocab union"),
        ([folder, whole], {}, r"^whole changes model\.embed_tokens, and a trains tokens of it; wanted one of the two"),
        (
            [folder],
            {"method": "iso_c"},
            r"^method: a is known beside its base only \(trained tokens\) and has no factors",
        ),
    ):
        with pytest.raises(MergeError, match=message):
            merge_engine.merge_models(base, inputs, tmp_path / "no", **{"method": "linear", **options})
    edit(folder, trainable_token_indices=[5, 64])
    with pytest.raises(ModelError, match=r"^a: it has rows of 32 for tokens up to 64, wanted those of \[64, 32\] as"):
        merge_engine.merge_into(base, [folder], tmp_path / "no", method="linear")
    assert not (tmp_path / "no").exists()
