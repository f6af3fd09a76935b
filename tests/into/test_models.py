"""Full models merged with each other: against whole-model TIES in plain torch, the textbook, and mergekit."""

import json

import pytest
import torch
from lora_files import save_factors
from safetensors.torch import load_file, save_file

import merge_engine
from merge_engine.cli.main import main
from merge_engine.cpu.mask import keep_mask
from merge_engine.errors import MergeError, RecipeError
from merge_engine.formats.checkpoint import open_checkpoint
from merge_engine.models.vocabulary import vocabulary_keys
from merge_engine.rules import reference
from merge_engine.rules.philox import stream_id
from merge_engine.rules.rule import make_rule

SHAPES = {
    "model.embed_tokens.weight": (17, 12),
    "model.layers.0.q_proj.weight": (12, 12),
    "model.layers.0.q_proj.bias": (12,),
    "model.layers.1.conv.weight": (6, 4, 3),
    "model.norm.weight": (12,),
    "model.scale": (),
    "lm_head.weight": (17, 12),
}
CONFIG = {"model_type": "toy", "vocab_size": 17, "tie_word_embeddings": False}
WEIGHTS = [1.0, 0.5, -2.0]


def save_model(folder, seed, dtype=torch.bfloat16, like=None, spread=1.0, tensors=None, save=save_file, **config):
    """A model of whole eighths, so that differences, and their sums, are exact."""
    generator = torch.Generator().manual_seed(seed)
    if tensors is None:
        drawn = {k: torch.randint(-40, 41, shape, generator=generator) / 8 for k, shape in SHAPES.items()}
        tensors = {key: ((like[key].float() if like else 0) + spread * t).to(dtype) for key, t in drawn.items()}
        tensors["model.positions"] = torch.arange(6)
    folder.mkdir(parents=True)
    save(tensors, folder / ("model.safetensors" if save is save_file else "pytorch_model.bin"))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


@pytest.fixture
def base(tmp_path):
    return save_model(tmp_path / "base", 0)


@pytest.fixture
def three(base, tmp_path):
    like = load_file(base / "model.safetensors")
    return [save_model(tmp_path / name, seed, like=like) for seed, name in enumerate(["chat", "code", "math"], 1)]


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def differences(base, folders):
    """{key: {model: finetuned - base}} in float32 as [rows, columns]."""
    start, found = weights_of(base), {}
    for number, folder in enumerate(folders):
        for key, tensor in weights_of(folder).items():
            if tensor.is_floating_point():
                flat = (tensor.float() - start[key].float()).reshape(len(tensor) if tensor.ndim > 1 else 1, -1)
                found.setdefault(key, {})[number] = flat
    return found


def module(key):
    return key.removesuffix(".weight")


def place(name, number, shape):
    stream = stream_id(name, "delta")
    return {"seed": 3, "stream": stream, "adapter": number, "rows": range(shape[0]), "columns": range(shape[1])}


@pytest.mark.parametrize("method", ["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"])
@pytest.mark.parametrize("convention", ["peft", "paper", "mergekit"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_models_equal_the_textbook(base, three, tmp_path, method, convention, scope):
    recipe = {"method": method, "convention": convention, "scope": scope}
    merge_engine.merge_models(base, three, tmp_path / "out", weights=WEIGHTS, density=0.4, seed=3, scale=0.5, **recipe)
    tasks = {module(key): value for key, value in differences(base, three).items()}
    masks = {
        name: {i: keep_mask(0.4, **place(name, i, t.shape)) for i, t in each.items()} for name, each in tasks.items()
    }
    densities = {name: [0.4] * 3 for name in tasks}
    merged = reference.merge_model(tasks, WEIGHTS, densities, make_rule(**recipe), masks=masks, scale=0.5)
    got, start = weights_of(tmp_path / "out"), weights_of(base)
    assert got.keys() == start.keys()
    for key, tensor in start.items():
        if tensor.is_floating_point():
            want = (tensor.float() + merged[module(key)].reshape(tensor.shape)).to(tensor.dtype)
            if convention == "mergekit" and "dare" in method:
                torch.testing.assert_close(got[key], want, rtol=2**-7, atol=2**-7)
            else:
                assert torch.equal(got[key], want), key
        else:
            assert torch.equal(got[key], tensor)


def test_the_papers_ties_over_the_whole_model(tmp_path):
    """Global threshold, majority sign for tied votes, disjoint mean: on one flat vector a model, as in their code."""
    base = save_model(tmp_path / "base", 0, dtype=torch.float32)
    like = weights_of(base)
    folders = [save_model(tmp_path / str(seed), seed, torch.float32, like) for seed in (1, 2)]
    result = merge_engine.merge_models(
        base, folders, tmp_path / "out", method="ties", density=0.3, scale=0.5, convention="paper"
    )
    keys = sorted(key for key, tensor in like.items() if tensor.is_floating_point())
    flat = torch.stack([torch.cat([(weights_of(f)[key] - like[key]).flatten() for key in keys]) for f in folders])
    k = flat.shape[1] - int(flat.shape[1] * 0.3)  # their code keeps what is at least the k-th smallest magnitude
    threshold = flat.abs().kthvalue(k, dim=1, keepdim=True).values
    kept = flat * (flat.abs() >= threshold)
    signs = kept.sum(0).sign()
    majority = signs.sum().sign()
    signs[signs == 0] = majority
    agree = torch.where(signs[None] > 0, kept > 0, kept < 0)
    merged = (kept * agree).sum(0) / agree.sum(0).clamp_min(1)
    assert ((kept.sum(0) == 0) & (kept != 0).any(0)).any(), "no tied vote"
    got = torch.cat([(weights_of(tmp_path / "out")[key]).flatten() for key in keys])
    want = torch.cat([like[key].flatten() for key in keys]) + 0.5 * merged
    assert torch.equal(got, want)
    assert result.merged == len(keys) and result.copied == 1


def test_models_and_adapters_of_one_base(base, three, tmp_path):
    """An adapter counts as the model that its delta makes; what it does not have, the others merge among themselves."""
    generator = torch.Generator().manual_seed(5)
    A, B = (torch.randint(-9, 10, shape, generator=generator) / 8 for shape in ((2, 12), (12, 2)))
    C, D = (torch.randint(-9, 10, shape, generator=generator) / 8 for shape in ((2, 17), (12, 2)))
    adapter = save_factors(tmp_path / "sql", {"model.layers.0.q_proj": (A, B), "model.embed_tokens": (C, D)})
    inputs = [three[0], adapter, three[1]]
    recipe = {"method": "ties", "density": 0.5, "weights": WEIGHTS}
    merge_engine.merge_models(base, inputs, tmp_path / "out", **recipe)
    tasks = {}
    for key, each in differences(base, [three[0], three[1]]).items():
        tasks[module(key)] = {0: each[0], 2: each[1]}
    tasks["model.layers.0.q_proj"] = dict(sorted({**tasks["model.layers.0.q_proj"], 1: 2 * (B @ A)}.items()))
    turned = {number: t.t() for number, t in tasks["model.embed_tokens"].items()}
    tasks["model.embed_tokens"] = dict(sorted({**turned, 1: 2 * (D @ C)}.items()))
    densities = {name: [0.5] * 3 for name in tasks}
    merged = reference.merge_model(tasks, WEIGHTS, densities, make_rule("ties"))
    merged["model.embed_tokens"] = merged["model.embed_tokens"].t()
    got, start = weights_of(tmp_path / "out"), weights_of(base)
    for key, tensor in start.items():
        if tensor.is_floating_point():
            want = (tensor.float() + merged[module(key)].reshape(tensor.shape)).to(tensor.dtype)
            assert torch.equal(got[key], want), key
    only = merge_engine.merge_models(base, [adapter], tmp_path / "only", method="linear")
    assert only.merged == 2


def test_triton_merges_models_and_adapters_too(base, three, tmp_path):
    pytest.importorskip("triton")
    for recipe in ({"method": "ties"}, {"method": "dare_ties"}, {"method": "ties", "scope": "model"}):
        options = {"density": 0.5, "weights": WEIGHTS, **recipe}
        name = f"{recipe['method']}-{'scope' in recipe}"
        for backend in ("torch", "triton"):
            merge_engine.merge_models(base, three, tmp_path / f"{name}-{backend}", backend=backend, **options)
        one, other = (weights_of(tmp_path / f"{name}-{backend}") for backend in ("torch", "triton"))
        assert all(torch.allclose(one[k], other[k], rtol=2**-7, atol=2**-7) for k in one if one[k].is_floating_point())


def test_a_model_with_itself_and_alone(base, three, tmp_path):
    merge_engine.merge_models(base, [three[0]], tmp_path / "one", method="linear")
    merge_engine.merge_models(base, [base, base], tmp_path / "base-again", method="ties", density=0.5)
    for folder, want in ((tmp_path / "one", three[0]), (tmp_path / "base-again", base)):
        got, wanted = weights_of(folder), weights_of(want)
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("save", [torch.save, save_file])
def test_shared_weights_stay_shared(tmp_path, save):
    def shared(seed):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(17, 12, generator=generator)
        head = weight if save is torch.save else weight.clone()
        return {"lm_head.weight": head, "model.embed_tokens.weight": weight, "x": torch.ones(3) * seed}

    options = {"save": save, "tie_word_embeddings": save is save_file}
    base = save_model(tmp_path / "base", 0, tensors=shared(0), **options)
    models = [save_model(tmp_path / str(i), 0, tensors=shared(i), **options) for i in (1, 2)]
    result = merge_engine.merge_models(base, models, tmp_path / "out", method="dare_ties", density=0.5)
    got = weights_of(tmp_path / "out")
    assert torch.equal(got["lm_head.weight"], got["model.embed_tokens.weight"])
    assert not torch.equal(got["lm_head.weight"], shared(0)["lm_head.weight"])
    assert result.merged == 3


def change(folder, **changes):
    tensors = weights_of(folder)
    for key, value in changes.items():
        key = key.replace("__", ".")
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    save_file(tensors, folder / "model.safetensors")
    return folder


def poisoned(value):
    tensor = torch.zeros(12, 12)
    tensor[3, 4] = value
    return tensor


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__norm__weight": None}, "base has tensor model.norm.weight but chat has not"),
        ({"model__extra__weight": torch.zeros(2)}, "chat has tensor model.extra.weight but base has not"),
        ({"model__norm__weight": torch.zeros(13)}, "chat: model.norm.weight is [13], wanted [12] as in base"),
        ({"model__positions": torch.arange(6) + 1}, "chat: model.positions is torch.int64 and differs from base"),
        (
            {"model__norm__weight": torch.zeros(12).int()},
            "chat: model.norm.weight is torch.int32, wanted torch.bfloat16",
        ),
        ({"model__layers__0__q_proj__weight": poisoned(float("nan"))}, "chat: tensor model.layers.0.q_proj.weight in "),
        (
            {"model__layers__0__q_proj__weight": poisoned(float("-inf"))},
            "chat: tensor model.layers.0.q_proj.weight in ",
        ),
    ],
)
def test_models_that_do_not_fit(base, three, tmp_path, changes, message):
    change(three[0], **changes)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(MergeError) as error:
        merge_engine.merge_models(base, three, tmp_path / "out")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_a_head_that_was_trained_apart_is_no_copy(base, tmp_path, save):
    """Of a base that has its head tied and saved: the head of a model is that copy too, or it is refused."""
    tensors = weights_of(base)
    head = tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    copied = tensors if save is torch.save else {**tensors, "lm_head.weight": head.clone()}
    save_model(tmp_path / "tied", 0, tensors=copied, save=save, tie_word_embeddings=True)
    same = {**tensors, "model.embed_tokens.weight": head + 1, "lm_head.weight": head + 1}
    save_model(tmp_path / "same", 0, tensors={key: tensor.clone() for key, tensor in same.items()})
    save_model(tmp_path / "apart", 0, tensors={**tensors, "lm_head.weight": head + 1})
    merge_engine.merge_models(tmp_path / "tied", [tmp_path / "same"], tmp_path / "out", method="linear")
    got = weights_of(tmp_path / "out")
    assert torch.equal(got["lm_head.weight"], head + 1) and torch.equal(got["model.embed_tokens.weight"], head + 1)
    wanted = r"^apart: (lm_head|model\.embed_tokens)\.weight differs from \S+\.weight, to which tied ties it$"
    with pytest.raises(MergeError, match=wanted):
        merge_engine.merge_models(tmp_path / "tied", [tmp_path / "apart"], tmp_path / "no", method="linear")


@pytest.mark.parametrize("of_base", [True, False])
def test_a_tied_head_may_be_saved_by_one_of_them(base, tmp_path, of_base):
    tensors = weights_of(base)
    head = tensors.pop("lm_head.weight")
    embedding = tensors["model.embed_tokens.weight"]
    tuned = {**tensors, "model.embed_tokens.weight": embedding + 1}
    for name, values, saves in (("tied", tensors, of_base), ("tuned", tuned, not of_base)):
        copy = {"lm_head.weight": values["model.embed_tokens.weight"].clone()} if saves else {}
        save_model(tmp_path / name, 0, tensors={**values, **copy}, tie_word_embeddings=True)
    merge_engine.merge_models(tmp_path / "tied", [tmp_path / "tuned"], tmp_path / "out", method="linear")
    got = weights_of(tmp_path / "out")
    assert got.keys() == weights_of(tmp_path / "tied").keys()
    assert torch.equal(got["model.embed_tokens.weight"], embedding + 1)
    assert not of_base or torch.equal(got["lm_head.weight"], embedding + 1)
    save_model(tmp_path / "untied", 0, tensors={**tuned, "lm_head.weight": head})
    other = save_model(tmp_path / "bare", 0, tensors=tensors, tie_word_embeddings=True)
    for pair in ((other, tmp_path / "untied"), (tmp_path / "untied", other)):
        with pytest.raises(MergeError, match=r"^untied has tensor lm_head\.weight but bare has not$"):
            merge_engine.merge_models(pair[0], [pair[1]], tmp_path / "no", method="linear")


def test_an_added_vocabulary_is_named(base, three, tmp_path):
    def tokenizer(folder, words, added):
        vocabulary = {word: number for number, word in enumerate(words)}
        entries = [{"id": len(words) + i, "content": token} for i, token in enumerate(added)]
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": entries}))

    tokenizer(base, ["a", "b"], [])
    tokenizer(three[0], ["a", "b"], ["<|im_start|>", "<|im_end|>"])
    bigger = {key: torch.zeros(19, 12) for key in ("model__embed_tokens__weight", "lm_head__weight")}
    change(three[0], **bigger)
    with pytest.raises(MergeError) as error:
        merge_engine.merge_models(base, three, tmp_path / "out")
    first = vocabulary_keys(open_checkpoint(base))[0]
    assert str(error.value) == (
        f"vocabularies differ: base has 17 tokens; chat has 19 rows in {first} (added: <|im_start|>, <|im_end|>)"
    )


def test_recipes_that_models_cannot_follow(base, three, tmp_path):
    for recipe in ({"space": "factors"}, {"method": "cat"}):
        with pytest.raises(RecipeError, match="is a full model and has no factors"):
            merge_engine.merge_models(base, three, tmp_path / "out", **recipe)
    with pytest.raises(RecipeError, match="weights: wanted 3, one for each of chat, code, math, got 1"):
        merge_engine.merge_models(base, three, tmp_path / "out", weights=[1])


def test_the_command(base, three, tmp_path, capsys):
    options = [*three, "-o", tmp_path / "one", "--base", base, "--convention", "paper"]
    assert main(["merge-models", *map(str, options)]) == 0
    assert "3 inputs, 7 tensors merged, 1 copied" in capsys.readouterr().out
    merge_engine.merge_models(base, three, tmp_path / "two", convention="paper")
    assert weights_of(tmp_path / "one").keys() == weights_of(base).keys()
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    with pytest.raises(SystemExit):
        main(["merge-models", *map(str, three), "-o", str(tmp_path / "three")])
    assert "--base" in capsys.readouterr().err


def mergekits(method, tensors, weights, **parameters):
    """What mergekit's own merge_tensors makes of tensors; with more tensors than weights, the first is the base."""
    api = pytest.importorskip("mergekit.merge_methods.api")
    first = len(tensors) - len(weights)
    parameters["weight"] = dict(enumerate(weights, first))
    return api.merge_tensors(tensors, method, parameters=parameters, base_index=0 if first else None)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("linear", "task_arithmetic"), ("ties", "ties"), ("dare_ties", "dare_ties"), ("dare_linear", "dare_linear")],
)
def test_the_mergekit_convention_is_mergekits_arithmetic(tmp_path, monkeypatch, ours, theirs):
    """On the same float32 models, to float32 rounding; its random masks are replaced by ours."""
    pytest.importorskip("mergekit")
    generator = torch.Generator().manual_seed(0)
    shapes = {"layers.0.q_proj.weight": (24, 40), "layers.1.q_proj.weight": (40, 24), "norm.weight": (40,)}

    def draw(spread):
        return {key: spread * torch.randn(shape, generator=generator) for key, shape in shapes.items()}

    start = draw(1.0)
    tuned = [{key: start[key] + delta for key, delta in draw(0.1).items()} for _ in range(3)]
    base = save_model(tmp_path / "base", 0, tensors=start)
    folders = [save_model(tmp_path / str(i), 0, tensors=tensors) for i, tensors in enumerate(tuned)]
    weights = [0.9, -0.4, 1.3]
    options = {"density": 0.4, "seed": 3, "scale": 0.5, "convention": "mergekit"}
    merge_engine.merge_models(base, folders, tmp_path / "out", method=ours, weights=weights, **options)
    got = weights_of(tmp_path / "out")
    for key in shapes:
        rows = start[key].reshape(len(start[key]) if start[key].ndim > 1 else 1, -1).shape
        masks = iter([keep_mask(0.4, **place(module(key), i, rows)).float() for i in range(3)])
        with monkeypatch.context() as patch:
            patch.setattr(torch, "bernoulli", lambda like, masks=masks: next(masks).reshape(like.shape))
            parameters = {"lambda": 0.5} | ({} if theirs == "task_arithmetic" else {"density": 0.4})
            want = mergekits(theirs, [start[key], *(tensors[key] for tensors in tuned)], weights, **parameters)
        torch.testing.assert_close(got[key], want, rtol=2**-22, atol=2**-22 * want.abs().max().item())


def test_the_mergekit_convention_is_mergekits_linear(tmp_path):
    """Its linear averages whole models: the same where the weights sum to 1."""
    pytest.importorskip("mergekit")
    generator = torch.Generator().manual_seed(0)
    start, *tuned = ({"x.weight": torch.randn(24, 40, generator=generator)} for _ in range(4))
    base = save_model(tmp_path / "base", 0, tensors=start)
    folders = [save_model(tmp_path / str(i), 0, tensors=tensors) for i, tensors in enumerate(tuned)]
    weights = [0.5, 0.75, -0.25]
    merge_engine.merge_models(base, folders, tmp_path / "out", method="linear", weights=weights, convention="mergekit")
    want = mergekits("linear", [tensors["x.weight"] for tensors in tuned], weights)
    torch.testing.assert_close(weights_of(tmp_path / "out")["x.weight"], want, rtol=2**-21, atol=2**-21)
