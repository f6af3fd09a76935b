"""Whole merges through the Triton kernels: interpreted here, compiled on a GPU."""

import json
import weakref
from dataclasses import replace

import pytest
import torch
from lora_files import save_factors
from safetensors.torch import load_file, save_file

import merge_engine
from merge_engine.demo import adapter_paths
from merge_engine.engine.choose_backend import choose
from merge_engine.engine.plan import make_plan
from merge_engine.engine.prepare import merge_groups, prepare
from merge_engine.errors import MergeError
from merge_engine.rules.recipe import Recipe

pytest.importorskip("triton")
from merge_engine.engine import triton_backend


def deltas(result):
    return {name: factors.B.double() @ factors.A.double() for name, factors in result.modules.items()}


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.fixture
def uneven(tmp_path):
    """Three adapters: different ranks, dtypes and modules, three modules of one shape and one of another."""
    shapes = {"layers.0.q": (24, 40), "layers.1.q": (24, 40), "layers.2.q": (24, 40), "layers.0.up": (72, 24)}
    kinds = [(3, torch.float32, list(shapes)), (17, torch.bfloat16, list(shapes)), (4, torch.float16, ["layers.1.q"])]
    folders = []
    for seed, (rank, dtype, names) in enumerate(kinds):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name in names:
            rows, columns = shapes[name]
            stem = f"base_model.model.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, columns, generator=generator).to(dtype)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, rank, generator=generator).to(dtype)
        folder = tmp_path / f"adapter{seed}"
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "alpha_pattern": {"up": 3}}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        folders.append(folder)
    return folders


RECIPES = [
    {"method": "magnitude_prune", "density": 0.3},
    {"method": "ties", "density": {".*q": 0.3, ".*": 0.6}},
    {"method": "ties", "density": 0.3, "election": "frequency"},
    {"method": "ties", "density": 0.3, "scope": "model"},
    {"method": "ties", "density": 0.3, "convention": "paper"},
    {"method": "ties", "density": 0.3, "convention": "mergekit"},
    {"method": "dare_linear", "density": 0.4},
    {"method": "dare_ties", "density": 0.4, "convention": "mergekit"},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: "-".join(map(str, recipe.values())))
def test_both_backends_merge_alike(uneven, recipe):
    recipe = {**recipe, "weights": [1.0, -0.5, 2.0], "scale": 0.7, "rank": 24, "seed": 3}
    want = deltas(merge_engine.merge(uneven, backend="torch", **recipe))
    got = deltas(merge_engine.merge(uneven, backend="triton", **recipe))
    assert list(got) == list(want)
    for name in want:
        # One element whose magnitude or vote is within rounding of its threshold may fall on either side.
        apart = (got[name] - want[name]).abs() > 1e-4 * want[name].abs().max()
        assert apart.sum() <= 1, name
        assert relative(got[name] * ~apart, want[name] * ~apart) < 1e-5, name


@pytest.mark.parametrize("recipe", [{"method": "ties"}, {"method": "dare_ties"}, {"convention": "mergekit"}], ids=str)
def test_a_module_has_the_same_bits_in_any_company(uneven, recipe):
    """A module of its shape has a third adapter, of another weight and dtype, and may be another process's."""
    asked = Recipe.from_mapping({"density": 0.4, "weights": [0.3, 0.3, 0.7], **recipe})
    plan, backend = make_plan([merge_engine.open_adapter(folder) for folder in uneven], asked), choose("triton")

    def merged(plan):
        works = merge_groups(plan, backend, prepare(plan, backend, lambda cost: None))
        return {work.module.name: work.merged["delta"] for work in works}

    want = merged(plan)
    assert sorted(want) == [module.name for module in plan.modules]
    for name, delta in want.items():
        alone = merged(replace(plan, share=frozenset([name])))
        assert list(alone) == [name] and torch.equal(alone[name], delta), name


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ties_over_the_model_are_taken_in_the_order_of_modules(tmp_path, backend):
    """All magnitudes are equal: half of the elements stay, the first ones, whatever is merged with what at once."""
    shapes = {"a.q": (5, 8), "b.up": (16, 5), "c.q": (5, 8)}
    ones = {name: (torch.ones(1, columns), torch.ones(rows, 1)) for name, (rows, columns) in shapes.items()}
    folder = save_factors(tmp_path / "a", ones, lora_alpha=1)
    recipe = {"method": "magnitude_prune", "density": 0.5, "scope": "model", "rank": 5, "backend": backend}
    kept = deltas(merge_engine.merge([folder], **recipe))
    got = torch.cat([kept[name].flatten() for name in shapes])
    torch.testing.assert_close(got, (torch.arange(160) < 80).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_random_drops_do_not_depend_on_who_else_has_a_module(uneven, tmp_path, backend):
    """The first adapter lacks most modules, or has zeros there: those after it drop the same elements."""
    few, *others = uneven[::-1]
    tensors = load_file(others[0] / "adapter_model.safetensors")
    zeros = {key: torch.zeros_like(tensor) for key, tensor in tensors.items() if "layers.1.q" not in key}
    padded = tmp_path / "padded"
    padded.mkdir()
    save_file(zeros | load_file(few / "adapter_model.safetensors"), padded / "adapter_model.safetensors")
    config = json.loads((few / "adapter_config.json").read_text())
    config["rank_pattern"] = {name: 17 for name in ("layers.0.q", "layers.2.q", "layers.0.up")}
    (padded / "adapter_config.json").write_text(json.dumps(config))
    recipe = {"method": "dare_linear", "density": 0.4, "rank": 24, "seed": 3, "backend": backend}
    got, want = (deltas(merge_engine.merge([first, *others], **recipe)) for first in (few, padded))
    for name in ("layers.0.q", "layers.2.q", "layers.0.up"):
        assert relative(got[name], want[name]) < 1e-5, name


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_weights_by_module(uneven, scope, backend):
    """Each module is what it is in a merge of its weights: no threshold depends on them."""
    one, other = [1.0, 0.0, 0.3], [1.0, -0.5, 0.3]
    table = {"layers.0.up": other, "layers.0.q": one, "layers.1.q": one, "layers.2.q": other}
    recipe = {"method": "ties", "density": 0.3, "scope": scope, "rank": 24, "backend": backend}
    got = merge_engine.merge(uneven, module_weights=table, **recipe).modules
    for weights in (one, other):
        want = merge_engine.merge(uneven, weights=weights, **recipe).modules
        for name in (name for name in table if table[name] == weights):
            assert torch.equal(got[name].A, want[name].A) and torch.equal(got[name].B, want[name].B), name


@pytest.mark.quick
def test_one_launch_takes_modules_that_are_packed_alike(tmp_path):
    """What a slab holds of a module, and how many elements of rank and of which dtype, no other module may decide."""
    kinds = {
        "layers.0.q": (3, torch.float16),
        "layers.1.q": (3, torch.float16),
        "layers.2.q": (3, torch.float32),
        "layers.3.q": (17, torch.float16),
    }
    factors = {name: (torch.ones(r, 8).to(dtype), torch.ones(5, r).to(dtype)) for name, (r, dtype) in kinds.items()}
    folder = save_factors(tmp_path / "sql", factors, rank_pattern={"layers.3.q": 17}, alpha_pattern={"layers.3.q": 34})
    plan = make_plan([merge_engine.open_adapter(folder)], Recipe())
    names = [[module.name for module in group] for group in choose("triton").groups(plan)]
    assert names == [["layers.0.q", "layers.1.q"], ["layers.2.q"], ["layers.3.q"]]


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_both_backends_merge_factors_alike(uneven, method):
    recipe = {"method": method, "density": 0.4, "space": "factors", "seed": 3}
    pair = [uneven[0], uneven[0]]
    want = deltas(merge_engine.merge(pair, backend="torch", weights=[1.0, -0.25], **recipe))
    got = deltas(merge_engine.merge(pair, backend="triton", weights=[1.0, -0.25], **recipe))
    assert all(relative(got[name], want[name]) < 1e-5 for name in want)


def test_the_bundled_adapters_through_the_kernels(tmp_path):
    paths = list(adapter_paths().values())[:3]
    recipe = {"method": "ties", "density": 0.2, "rank": 16}
    merge_engine.merge(paths, tmp_path / "out", backend="triton", **recipe)
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text())["backend"] == "triton"
    written = merge_engine.open_adapter(tmp_path / "out")
    for name, want in deltas(merge_engine.merge(paths, backend="torch", **recipe)).items():
        A, B = written.factors(name)
        assert relative(B.double() @ A.double(), want) < 1e-3, name


class ShortOfMemory:
    """The kernels' launcher on a device that has no room for more than one module."""

    def __init__(self, launch):
        self.launch, self.sizes = launch, []

    def __call__(self, source, *arguments, **options):
        self.sizes.append(source.shape[0])
        if source.shape[0] > 1:
            raise torch.OutOfMemoryError("no room")
        return self.launch(source, *arguments, **options)


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_out_of_memory_halves_the_group_and_changes_nothing(uneven, monkeypatch, scope):
    recipe = {"method": "ties", "density": 0.3, "scope": scope, "rank": 24, "backend": "triton"}
    want = merge_engine.merge(uneven, **recipe).modules
    short = ShortOfMemory(triton_backend.kernels.merge_deltas)
    monkeypatch.setattr(triton_backend.kernels, "merge_deltas", short)
    got = merge_engine.merge(uneven, **recipe).modules
    assert sorted(short.sizes) == [1, 1, 1, 1, 2]
    for name in want:
        assert torch.equal(got[name].A, want[name].A) and torch.equal(got[name].B, want[name].B)


def test_a_group_that_is_halved_holds_nothing_of_the_first_attempt(monkeypatch, tmp_path):
    """Neither its base nor its output, of which a device has no room for one and a half."""
    held: list[weakref.ref[torch.Tensor]] = []
    short = ShortOfMemory(triton_backend.kernels.merge_deltas)
    stacked = triton_backend.TritonBackend._stacked

    def launch(source, *arguments, **options):
        if source.shape[0] > 1:
            held.extend(weakref.ref(options[name]) for name in ("base", "out"))
        return short(source, *arguments, **options)

    def stack(self, base):
        assert all(each() is None for each in held)
        return stacked(self, base)

    generator = torch.Generator().manual_seed(5)
    names = [f"layers.{i}.q" for i in range(2)]
    factors = {
        name: [torch.randn(2, 24, generator=generator), torch.randn(20, 2, generator=generator)] for name in names
    }
    save_factors(tmp_path / "a", factors)
    (tmp_path / "base").mkdir()
    weights = {f"{name}.weight": torch.randn(20, 24, generator=generator) for name in names}
    save_file(weights, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    monkeypatch.setattr(triton_backend.kernels, "merge_deltas", launch)
    monkeypatch.setattr(triton_backend.TritonBackend, "_stacked", stack)
    inputs = tmp_path / "base", [tmp_path / "a"]
    merge_engine.merge_into(*inputs, tmp_path / "out", method="ties", density=0.3, backend="triton")
    assert sorted(short.sizes) == [1, 1, 2] and len(held) == 2
    monkeypatch.undo()
    merge_engine.merge_into(*inputs, tmp_path / "want", method="ties", density=0.3, backend="torch")
    got, want = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "want"))
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-5, atol=1e-5)


def test_out_of_memory_with_a_single_module_is_an_error(uneven, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(triton_backend.kernels, "merge_deltas", full)
    with pytest.raises(torch.OutOfMemoryError):
        merge_engine.merge(uneven, method="ties", backend="triton")
    monkeypatch.setattr(triton_backend.select, "model_trims", full)
    with pytest.raises(MergeError, match=r"scope='model' holds the factors of all adapters there, and they do not fit"):
        merge_engine.merge(uneven, method="ties", scope="model", backend="triton")
