"""LoRA on the parameters of experts: as PEFT stores it, reads it and applies it."""

import json

import pytest
import torch
from expert_models import EXPERTS, FUSED, expert_deltas, in_peft, save_experts, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_files import STEM, save_factors
from safetensors.torch import load_file, save_file

import merge_engine
from merge_engine.errors import AdapterError
from merge_engine.formats.experts import stacked
from merge_engine.formats.open import open_adapter
from merge_engine.rules import reference
from merge_engine.rules.rule import make_rule

LAYER = "model.layers.0.mlp.experts"


def deltas_of(folder):
    """{expert's module: s B A in float64}, of an adapter as this package reads it."""
    adapter = open_adapter(folder)
    found = {}
    for name, module in adapter.modules.items():
        A, B = adapter.factors(name)
        found[name] = module.scaling * (B.double() @ A.double())
    return found


def by_expert(deltas, transposed):
    """What PEFT applies, a matrix [out, in] for each expert, by this package's names."""
    found = {}
    for (layer, parameter), delta in deltas.items():
        if parameter is None:
            found[layer] = delta.double()
            continue
        for number in range(EXPERTS):
            found[f"{layer}.{parameter}.{number}"] = (delta[number].t() if transposed else delta[number]).double()
    return found


def assert_same(got, want, U=2.0**-20):
    assert got.keys() == want.keys()
    for name, delta in got.items():
        torch.testing.assert_close(delta.double(), want[name], rtol=0, atol=U * float(want[name].abs().max()))


@pytest.mark.quick
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("config", [{}, {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"gate_up_proj": 5}}])
def test_each_expert_has_the_delta_that_peft_applies(tmp_path, family, config):
    folder = save_experts(tmp_path / "a", 1, family, use_rslora=bool(config), **config)
    want = by_expert(expert_deltas(in_peft(folder, family)), family == "gpt_oss")
    assert_same(deltas_of(folder), want)
    assert {f"{LAYER}.gate_up_proj.2", f"{LAYER}.down_proj.0"} < want.keys()


@pytest.mark.parametrize("targets", [FUSED[:1], FUSED[1:], ["down_proj", "gate_up_proj"], [f"{LAYER}.down_proj"]])
def test_parameters_may_be_named_in_every_way_that_peft_knows(tmp_path, targets):
    folder = save_experts(tmp_path / "a", 1, target_modules=["q_proj", "k_proj"], target_parameters=targets)
    assert_same(deltas_of(folder), by_expert(expert_deltas(in_peft(folder)), True))


RECIPES = [
    {"method": "linear"},
    {"method": "cat"},
    {"method": "ties", "density": 0.4},
    {"method": "magnitude_prune", "density": 0.3, "scope": "model"},
    {"method": "linear", "dtype": "bfloat16"},
    {"method": "ties", "density": 0.4, "ranks": "own"},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: "-".join(map(str, recipe.values())))
def test_each_expert_is_merged_by_itself_and_peft_loads_the_result(tmp_path, recipe):
    """Of mixed ranks and alphas, against the textbook on dense matrices; as the merged adapter is in PEFT."""
    configs = [{"r": 4}, {"r": 2, "lora_alpha": 8, "rank_pattern": {"gate_up_proj": 3}}, {"r": 3, "use_rslora": True}]
    folders = [save_experts(tmp_path / str(i), i, **config) for i, config in enumerate(configs)]
    weights = [0.9, -0.4, 1.3]
    merge_engine.merge(folders, tmp_path / "out", weights=weights, **recipe)
    tasks = {}
    for number, folder in enumerate(folders):
        for name, delta in by_expert(expert_deltas(in_peft(folder)), True).items():
            tasks.setdefault(name, {})[number] = delta
    rule = make_rule(recipe["method"] if recipe["method"] != "cat" else "linear", scope=recipe.get("scope"))
    densities = {name: [recipe.get("density", 0.2)] * 3 for name in tasks}
    want = reference.merge_model(tasks, weights, densities, rule)
    got = by_expert(expert_deltas(in_peft(tmp_path / "out")), True)
    tolerance = 2.0**-6 if "dtype" in recipe else 2.0**-18
    if recipe["method"] in ("linear", "cat"):
        assert_same(got, want, tolerance)
    else:  # cut to the sum of the ranks
        full = merge_engine.merge(folders, weights=weights, **{**recipe, "rank": 24})
        for name, result in full.modules.items():
            exact = result.B.double() @ result.A.double()
            torch.testing.assert_close(exact, want[name], rtol=0, atol=2e-5 * float(want[name].abs().max()))
            U, S, V = torch.linalg.svd(want[name])
            rank = min(10 if "gate_up" in name else 9, 12) if "experts" in name else 9
            best = (U[:, :rank] * S[:rank]) @ V[:rank]
            error, least = float((got[name] - want[name]).norm()), float((best - want[name]).norm())
            assert error <= 1.01 * least + 1e-5 * float(want[name].norm()), name
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert sorted(config["target_parameters"]) == sorted(FUSED)
    assert bool(config["rank_pattern"]) == ("ranks" in recipe)


def test_of_many_merges_at_once_each_has_the_bits_of_one(tmp_path):
    folders = [save_experts(tmp_path / str(i), i, r=2 + i) for i in range(2)]
    recipes = [{"method": "linear", "weights": [1.0, 0.5]}, {"method": "dare_ties", "density": 0.5, "seed": 3}]
    single = [merge_engine.merge(folders, **recipe) for recipe in recipes]
    several = list(merge_engine.merge_many(folders, recipes))
    with merge_engine.Session(folders) as session:
        again = [session.merge(**recipe) for recipe in recipes]
    for one, *others in zip(single, several, again, strict=True):
        assert len(one.modules) == 2 * (2 * EXPERTS + 1)
        for other in others:
            for name, result in one.modules.items():
                assert torch.equal(result.A, other.modules[name].A) and torch.equal(result.B, other.modules[name].B)


def test_experts_are_compared(tmp_path):
    folders = [save_experts(tmp_path / str(i), i) for i in range(2)]
    figures = merge_engine.interference(folders)
    (one, two), name = map(deltas_of, folders), f"{LAYER}.gate_up_proj.1"
    want = float((one[name] * two[name]).sum() / one[name].norm() / two[name].norm())
    assert f"{LAYER}.down_proj.2" in figures.modules and figures.shapes[name] == (24, 16)
    assert abs(float(figures.modules[name].cosine[0, 1]) - want) < 1e-5


def one_by_one(folder, seed):
    """An adapter of tiny("mixtral") as PEFT saved it before transformers fused the experts: a layer for each matrix."""
    generator, factors = torch.Generator().manual_seed(seed), {}
    shapes = {f"block_sparse_moe.experts.{e}.{n}": (12, 16) for e in range(EXPERTS) for n in ("w1", "w3")}
    shapes |= {f"block_sparse_moe.experts.{e}.w2": (16, 12) for e in range(EXPERTS)} | {"self_attn.q_proj": (16, 16)}
    for layer in range(2):
        for name, (rows, columns) in shapes.items():
            A, B = torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator)
            factors[f"model.layers.{layer}.{name}"] = A, B
    targets = ["w1", "w2", "w3", "q_proj"]
    return save_factors(folder, factors, target_modules=targets, base_model_name_or_path="tiny")


def test_experts_as_layers_of_their_own(tmp_path):
    """Merged, PEFT still turns them into pairs of the fused parameters; and into a base they go as PEFT merges them."""
    folders = [one_by_one(tmp_path / str(seed), seed) for seed in range(2)]
    merge_engine.merge(folders, tmp_path / "out", method="linear", weights=[1.0, 0.5])
    one, two, got = (expert_deltas(in_peft(folder, "mixtral")) for folder in (*folders, tmp_path / "out"))
    assert got.keys() == one.keys() and (LAYER, "gate_up_proj") in got
    assert_same(got, {key: one[key].double() + 0.5 * two[key].double() for key in one})
    tiny("mixtral").save_pretrained(tmp_path / "base")
    merge_engine.merge_into(tmp_path / "base", folders[:1], tmp_path / "full", method="linear")
    in_peft(folders[0], "mixtral").merge_and_unload().save_pretrained(tmp_path / "want")
    got, want = (load_file(tmp_path / name / "model.safetensors") for name in ("full", "want"))
    assert_same(got, {key: tensor.double() for key, tensor in want.items()})


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    sides=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    seed=st.integers(0, 10**6),
)
def test_stacked_pairs_are_what_peft_multiplies_out(ranks, sides, seed):
    """By PEFT's own formula: einsum("o r e, e r i -> e o i") of B [M, r, E] and A [E, r, N]."""
    generator = torch.Generator().manual_seed(seed)
    (rows, columns), count, rank = sides, len(ranks), max(ranks)
    pairs = [(torch.randn(r, columns, generator=generator), torch.randn(rows, r, generator=generator)) for r in ranks]
    A, B = stacked(pairs)
    assert A.shape == (count * rank, columns) and B.shape == (rows, rank * count)
    got = torch.einsum("ore,eri->eoi", B.reshape(rows, rank, count).double(), A.reshape(count, rank, columns).double())
    for number, (a, b) in enumerate(pairs):
        torch.testing.assert_close(got[number], b.double() @ a.double())


def peft_delta(tensors, stem, count, scaling):
    """By PEFT's own formula for a parameter [E, out, in], in float64."""
    A, B = (tensors[f"{stem}.lora_{side}.weight"].double() for side in "AB")
    A, B = A.reshape(count, -1, A.shape[1]), B.reshape(len(B), -1, count)
    return scaling * torch.einsum("ore,eri->eoi", B, A)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 4),
    ranks=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3),
    alphas=st.lists(st.sampled_from([None, 1, 2.5, 16]), min_size=3, max_size=3),
    rslora=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_whatever_ranks_and_alphas_are(tmp_path_factory, count, ranks, alphas, rslora, seed):
    """gate_up_proj of one rank, down_proj of another, no lora_alpha where PEFT takes 8: against float64."""
    root, generator = tmp_path_factory.mktemp("experts"), torch.Generator().manual_seed(seed)
    sides = {"gate_up_proj": (f"{LAYER}.base_layer", 6, 5), "down_proj": (LAYER, 5, 3)}
    folders, weights = [], [0.7, -1.2, 0.3][: len(ranks)]
    want = {name: torch.zeros(count, rows, columns, dtype=torch.float64) for name, (_, rows, columns) in sides.items()}
    size = dict.fromkeys(sides, 0.0)
    for number, (own, alpha, weight) in enumerate(zip(ranks, alphas, weights, strict=False)):
        tensors = {}
        for rank, (stem, rows, columns) in zip(own, sides.values(), strict=True):
            tensors[f"{STEM}{stem}.lora_A.weight"] = torch.randn(count * rank, columns, generator=generator)
            tensors[f"{STEM}{stem}.lora_B.weight"] = torch.randn(rows, rank * count, generator=generator)
        config = {"r": own[0], "rank_pattern": {"down_proj": own[1]}, "use_rslora": rslora}
        config |= {"peft_type": "LORA", "target_parameters": FUSED} | ({} if alpha is None else {"lora_alpha": alpha})
        (root / str(number)).mkdir()
        save_file(tensors, root / str(number) / "adapter_model.safetensors")
        (root / str(number) / "adapter_config.json").write_text(json.dumps(config))
        folders.append(root / str(number))
        for rank, (name, (stem, *_)) in zip(own, sides.items(), strict=True):
            scaling = (8 if alpha is None else alpha) / (rank**0.5 if rslora else rank)
            delta = peft_delta(tensors, STEM + stem, count, scaling)
            want[name] += weight * delta
            size[name] += abs(weight) * float(delta.norm())
    merge_engine.merge(folders, root / "out", method="linear", weights=weights)
    written = load_file(root / "out" / "adapter_model.safetensors")
    for name, (stem, *_) in sides.items():
        got = peft_delta(written, STEM + stem, count, 1.0)
        torch.testing.assert_close(got, want[name], rtol=0, atol=64 * 2**-24 * size[name])


def written(tmp_path, shapes, **config):
    """An adapter in which tensors have these shapes."""
    extras = {f"{STEM}{LAYER}.{key}.weight": torch.ones(shape) for key, shape in shapes.items()}
    given = {"target_parameters": FUSED, **config}
    return save_factors(tmp_path / "a", {"q": (torch.ones(2, 3), torch.ones(3, 2))}, extras, **given)


GOOD = {
    "base_layer.lora_A": (6, 5),
    "base_layer.lora_B": (8, 6),
    "lora_A": (6, 4),
    "lora_B": (5, 6),
}


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"lora_B": None}, {}, r"^a: down_proj of \S+experts has no lora_B"),
        (
            {"lora_A": (5, 4)},
            {},
            r"down_proj of \S+ has factors \[5, 4\] and \[5, 6\], wanted \[E r, N\] and \[M, r E\]",
        ),
        ({"lora_B": (5, 4)}, {}, r"down_proj of \S+ has factors \[6, 4\] and \[5, 4\], wanted .* with rank 2 for each"),
        (
            {},
            {"target_parameters": FUSED[:1]},
            r"experts has 2 pairs of factors, wanted one for each of gate_up_proj, w",
        ),
        (
            {"base_layer.lora_A": None, "base_layer.lora_B": None},
            {},
            r"experts has 1 pair of factors, wanted one for each of down_proj, gate_up_proj, which target_parameters",
        ),
        (
            {},
            {"target_parameters": ["experts.w1", "experts.w2"]},
            r"w1, w2; the order of several is only known for gate_",
        ),
        (
            {},
            {"target_parameters": None},
            r"lora_A\.weight belongs to a nested layer \(torch\.nn\.MultiheadAttention, or",
        ),
        ({}, {"target_parameters": [FUSED[0], 3]}, r"^a: target_parameters is .* wanted a list of names"),
        ({"base_layer.base_layer.lora_A": (6, 5)}, {}, r"experts has 3 pairs of factors"),
    ],
)
def test_what_is_refused(tmp_path, change, config, message):
    shapes = {key: shape for key, shape in {**GOOD, **change}.items() if shape is not None}
    with pytest.raises(AdapterError, match=message):
        open_adapter(written(tmp_path, shapes, **config))


def test_adapters_that_do_not_go_together(tmp_path):
    one = save_experts(tmp_path / "one", 1)
    tensors = load_file(one / "adapter_model.safetensors")
    other = {
        key: t[: len(t) * 2 // 3] if "lora_A" in key else t[:, : t.shape[1] * 2 // 3] for key, t in tensors.items()
    }
    other = {key: t.contiguous() for key, t in other.items() if "q_proj" not in key}
    config = json.loads((one / "adapter_config.json").read_text())
    save_factors(tmp_path / "two", {"q": (torch.ones(4, 3), torch.ones(3, 4))}, other, **config)
    with pytest.raises(AdapterError, match=r"^two: \S+down_proj has 2 experts, wanted 3 as in one"):
        merge_engine.merge([one, tmp_path / "two"], tmp_path / "no", method="linear")
    named = {"base_model_name_or_path": "tiny"}
    plain = save_factors(tmp_path / "three", {LAYER: (torch.ones(2, 3), torch.ones(3, 2))}, **named)
    with pytest.raises(AdapterError, match=rf"^one adapts a parameter of {LAYER}, and three the layer; wanted one of"):
        merge_engine.merge([one, plain], tmp_path / "no", method="linear")
    assert not (tmp_path / "no").exists()
