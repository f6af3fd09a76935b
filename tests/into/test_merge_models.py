"""Full models merged with each other: against whole-model TIES in plain torch, the textbook, and mergekit."""

import pytest
import torch
from lora_files import save_factors
from tuned_models import save_model, save_three, weights_of

import merge_engine
from merge_engine.cpu.mask import keep_mask
from merge_engine.errors import RecipeError
from merge_engine.rules import reference
from merge_engine.rules.philox import stream_id
from merge_engine.rules.rule import make_rule

WEIGHTS = [1.0, 0.5, -2.0]


@pytest.fixture
def base(tmp_path):
    return save_model(tmp_path / "base", 0)


@pytest.fixture
def three(base):
    return save_three(base)


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


@pytest.mark.quick
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


def test_recipes_that_models_cannot_follow(base, three, tmp_path):
    for recipe in ({"space": "factors"}, {"method": "cat"}):
        with pytest.raises(RecipeError, match="is a full model and has no factors"):
            merge_engine.merge_models(base, three, tmp_path / "out", **recipe)
    with pytest.raises(RecipeError, match="weights: wanted 3, one for each of chat, code, math, got 1"):
        merge_engine.merge_models(base, three, tmp_path / "out", weights=[1])


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
