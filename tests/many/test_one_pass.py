"""Recipes over the same adapters through the kernels: one launch for all that share a kernel, with the bits of each."""

from collections import Counter

import pytest
import torch
from grids import W, alone, identical, save_adapter

from merge_engine.many.merge_many import merge_many

pytest.importorskip("triton")
from triton.runtime.interpreter import GridExecutor

from merge_engine.engine import triton_backend

SHAPES = {"0.q": (37, 45), "1.q": (37, 45), "0.up": (70, 24)}  # two groups
TIES = {"method": "ties", "rank": 5}
DARE = {"method": "dare_ties", "density": 0.4, "weights": W[0], "rank": 5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """float32: the tiles of two recipes in one program are smaller than those of one."""
    root = tmp_path_factory.mktemp("adapters")
    return [save_adapter(root / name, seed, SHAPES) for seed, name in enumerate("abc")]


@pytest.fixture
def launches(monkeypatch):
    """How often each kernel was launched."""
    if torch.cuda.is_available():
        pytest.skip("counts launches of the interpreter")
    counts, launch = Counter(), GridExecutor.__call__

    def counted(self, *arguments, **options):
        counts[self.fn.__name__] += 1
        launch(self, *arguments, **options)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    return counts


# {name: ([recipes], launches of the merge kernel for each group)}
TOGETHER = {
    "ties": ([{**TIES, "density": d, "weights": w} for d, w in ((0.1, W[0]), (0.3, W[2]), (0.3, W[0]))], 1),
    "equal and other weights": (
        [{**TIES, "density": {"0.*": 0.2, "1.*": d}, "weights": [1, 1, w]} for d in (0.6, 0.3) for w in (1, 0.5)],
        2,
    ),
    "seeds": ([{**DARE, "seed": seed, "density": d} for seed, d in ((7, 0.4), (8, 0.4), (8, 0.9))], 1),
    "L1 norms": ([{**DARE, "seed": seed, "convention": "mergekit"} for seed in (7, 8)], 1),
    "bands": ([{**TIES, "method": "breadcrumbs", "density": 0.3, "gamma": g, "weights": W[0]} for g in (0.05, 0.2)], 1),
    "consensus": ([{"method": "consensus", "mask": m, "min_tasks": n, "rank": 5} for m, n in ((0.2, 1), (0.6, 2))], 1),
    "model": ([{**TIES, "density": d, "scope": "model", "weights": W[0]} for d in (0.2, 0.4)], 1),
    "majority": (
        [{**TIES, "density": 0.3, "convention": c, "trim_ties": "exact", "scope": "tensor"} for c in ("peft", "paper")],
        1,
    ),
}


@pytest.mark.parametrize(("recipes", "each"), TOGETHER.values(), ids=TOGETHER)
def test_one_launch_for_recipes_that_share_a_kernel(folders, launches, recipes, each):
    results = list(merge_many(folders, recipes, backend="triton"))
    assert launches["_merge_deltas_kernel"] == 2 * each, launches
    for recipe, got in zip(recipes, results, strict=True):
        assert identical(got, alone(folders, recipe, backend="triton")), recipe


def test_different_methods_and_cuts_in_one_pass(folders, launches):
    """Three kernels for two groups; thresholds are searched once for each density, and linear merges need no kernel."""
    recipes = [
        {**TIES, "density": 0.3, "weights": W[0]},
        {**DARE, "seed": 1},
        {"method": "linear", "weights": W[0], "rank": 5},
        {**TIES, "density": 0.3, "weights": W[2]},
        {**TIES, "density": 0.3, "weights": W[1]},
        {**TIES, "density": 0.3, "weights": W[0], "rank": 3, "scale": 0.5},
    ]
    results = list(merge_many(folders, recipes, backend="triton"))
    assert launches["_merge_deltas_kernel"] == 6 and launches["_sample_kernel"] == 4
    for recipe, got in zip(recipes, results, strict=True):
        assert identical(got, alone(folders, recipe, backend="triton")), recipe


def test_factors_of_bfloat16(launches, tmp_path):
    folders = [
        save_adapter(tmp_path / name, seed, {"q": (70, 45)}, dtype=torch.bfloat16) for seed, name in enumerate("abc")
    ]
    recipes = [*TOGETHER["ties"][0], *TOGETHER["seeds"][0]]
    results = list(merge_many(folders, recipes, backend="triton"))
    assert launches["_merge_deltas_kernel"] == 2
    for recipe, got in zip(recipes, results, strict=True):
        assert identical(got, alone(folders, recipe, backend="triton")), recipe


def test_factors_are_merged_together_side_by_side(folders, launches):
    recipes = [{"method": "ties", "density": d, "space": "factors", "weights": W[0]} for d in (0.2, 0.4)]
    results = list(merge_many(folders, recipes, backend="triton"))
    assert launches["_merge_deltas_kernel"] == 4  # two groups, two sides
    for recipe, got in zip(recipes, results, strict=True):
        assert identical(got, alone(folders, recipe, backend="triton")), recipe


RECIPES = [{**DARE, "seed": seed} for seed in range(4)]


def test_memory_bounds_modules_times_recipes(folders, launches, monkeypatch):
    """Room for two recipes of the two modules q, so for three of the one module up."""
    q, up = (4 * rows * columns for rows, columns in (SHAPES["0.q"], SHAPES["0.up"]))
    monkeypatch.setattr(triton_backend, "HOST_GROUP_BYTES", 4 * q)
    assert 4 * q // up == 3
    sizes, merge = [], triton_backend.kernels.merge_deltas

    def merge_deltas(*arguments, **options):
        out = merge(*arguments, **options)
        sizes.append((out.nbytes, len(out)))
        return out

    monkeypatch.setattr(triton_backend.kernels, "merge_deltas", merge_deltas)
    results = list(merge_many(folders, RECIPES, backend="triton"))
    assert sorted(sizes) == sorted([(4 * q, 2)] * 2 + [(3 * up, 3), (up, 1)])
    for recipe, got in zip(RECIPES, results, strict=True):
        assert identical(got, alone(folders, recipe, backend="triton")), recipe


def test_searches_count_as_memory(folders, launches, monkeypatch):
    """What a search takes is more than the deltas of small modules: room for one recipe of both q, or two of up."""
    rows, columns = SHAPES["0.up"]
    one = 4 * rows * columns + 3 * triton_backend.search_bytes(rows * columns)
    monkeypatch.setattr(triton_backend, "HOST_GROUP_BYTES", 2 * one)
    recipes = [{**TIES, "density": d, "weights": W[0]} for d in (0.1, 0.3)]
    list(merge_many(folders, recipes, backend="triton"))
    assert launches["_merge_deltas_kernel"] == 2 + 1


def test_out_of_memory_halves_the_recipes_first(folders, monkeypatch):
    tried, merge = [], triton_backend.kernels.merge_deltas

    def merge_deltas(source, weights, *arguments, **options):
        tried.append((len(weights), source.shape[0]))
        if len(weights) * source.shape[0] > 1:
            raise torch.OutOfMemoryError
        return merge(source, weights, *arguments, **options)

    monkeypatch.setattr(triton_backend.kernels, "merge_deltas", merge_deltas)
    results = list(merge_many(folders, RECIPES, backend="triton"))
    one = [(1, 2), (1, 1), (1, 1)]
    assert tried == [(4, 2), *2 * [(2, 2), *2 * one], (4, 1), *2 * [(2, 1), (1, 1), (1, 1)]]
    for recipe, got in zip(RECIPES, results, strict=True):
        assert identical(got, alone(folders, recipe, backend="triton")), recipe
