"""Many merges of the same adapters, at once and in a session: with the bits of single merges, and within a budget."""

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Barrier, Event
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_files import STEM, save_factors

from merge_engine.cpu import merge_several as cpu_merge_several
from merge_engine.cpu.keep import Drop, MergeSpec
from merge_engine.cpu.merge import merge_deltas
from merge_engine.cpu.merge_several import merge_several
from merge_engine.cpu.select import trims, trims_of_each
from merge_engine.cpu.source import Product
from merge_engine.engine import cpu_backend as engine_cpu_backend
from merge_engine.engine import cpu_keeps as engine_cpu_keeps
from merge_engine.engine.merge import merge
from merge_engine.errors import AdapterError, MergeError, OutputError, RecipeError
from merge_engine.formats.open import open_adapter
from merge_engine.loops import door
from merge_engine.lowrank.stack import Stack
from merge_engine.many import merge_many as many_merge_many
from merge_engine.many import pool as many_pool
from merge_engine.many.budget import Room
from merge_engine.many.cache import Cache
from merge_engine.many.merge_many import Failed, _Making, merge_many
from merge_engine.many.session import Session
from merge_engine.rules.recipe import Recipe
from merge_engine.rules.rule import make_rule
from merge_engine.runtime.threads import threads

U = 2**-24  # unit roundoff of float32
ROOT = Path(__file__).parents[2]


def save_adapter(folder, seed, shapes, rank=4, dtype=torch.float32, **more):
    """An adapter of random factors."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    factors = {name: (draw(rank, columns), draw(rows, rank)) for name, (rows, columns) in shapes.items()}
    return save_factors(folder, factors, **more)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three adapters: different ranks and dtypes, a module that one lacks, and one large enough to be sampled."""
    root = tmp_path_factory.mktemp("adapters")
    shapes = {"0.q": (24, 40), "0.up": (72, 24), "1.q": (257, 263)}
    return [
        save_adapter(root / "sql", 1, shapes),
        save_adapter(root / "chat", 2, {name: shapes[name] for name in ("0.q", "1.q")}, rank=7, dtype=torch.bfloat16),
        save_adapter(root / "ads", 3, shapes, rank=4, dtype=torch.float16),
    ]


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    """Three adapters of one rank, whose factors can be merged, too."""
    root = tmp_path_factory.mktemp("alike")
    return [save_adapter(root / name, seed, {"q": (23, 37), "up": (41, 19)}) for seed, name in enumerate("abc")]


W = [[0.9, -0.4, 1.3], [1.0, 1.0, 1.0], [2.0, 0.0, 0.25]]
GRID = [
    *({"method": "ties", "density": d, "weights": w, "rank": 5} for d in (0.1, 0.3) for w in W),
    *({"method": "ties", "density": 0.3, "weights": W[0], "rank": 5, "scale": s} for s in (0.5, -3.0, 0.0)),
    {"method": "ties", "density": [0.1, 0.3, 1.0], "weights": W[0], "election": "frequency", "energy": 0.7},
    {"method": "ties", "density": {"q": 0.3, ".*": 0.6}, "weights": W[0], "convention": "mergekit"},
    {"method": "ties", "density": 0.3, "weights": W[1], "convention": "mergekit", "rank": 3},
    {"method": "ties", "density": 0.3, "weights": W[0], "scope": "model", "rank": 3},
    {"method": "ties", "density": 0.3, "weights": W[0], "convention": "paper", "scale": 0.5},
    {"method": "ties", "density": 0.3, "weights": W[2], "convention": "paper", "scale": 0.3},
    {"method": "ties", "density": 0, "rank": 2},
    {"method": "magnitude_prune", "density": 0.3, "weights": W[0]},
    {"method": "magnitude_prune", "density": 0.3, "weights": W[0], "rank": 2, "dtype": "float16"},
    {"method": "dare_linear", "density": 0.4, "weights": W[0], "seed": 7},
    {"method": "dare_linear", "density": 0.4, "weights": W[0], "seed": 8},
    {"method": "dare_ties", "density": 0.4, "weights": W[0], "convention": "mergekit"},
    {"method": "dare_ties", "density": 0.4, "weights": W[2]},
    {"method": "dare_ties", "density": 0.4, "weights": W[2], "adapters": ["ads", "sql", "chat"]},
    {"method": "ties", "density": 0.3, "adapters": [2, 0], "weights": W[0][:2]},
    {"method": "ties", "density": 0.1, "adapters": ["sql"]},
    {"method": "linear", "weights": W[0]},
    {"method": "linear", "weights": W[0], "rank": 3, "scale": 0.7},
    {"method": "linear", "weights": W[2], "energy": 0.9},
    {"method": "cat", "weights": W[0]},
    {"method": "cat", "weights": [0.9], "scale": 2.0, "adapters": [1]},
]
FACTORS = [
    {"method": method, "density": d, "weights": w, "space": "factors", "scale": s}
    for method, d in (("ties", 0.4), ("ties", 0.2), ("dare_ties", 0.5), ("linear", None))
    for w, s in ((W[0], 1.0), (W[0], 0.5), (W[1], 2.0))
] + [{"method": "linear", "weights": W[0], "space": "factors", "rank": 2}]


def alone(adapters, recipe, output=None, **options):
    """The same by one merge of its own."""
    fields = dict(recipe)
    names = [folder.name for folder in adapters]
    chosen = [names.index(each) if isinstance(each, str) else each for each in fields.pop("adapters", range(3))]
    return merge([adapters[number] for number in chosen], output, **fields, **options)


def bits(tensor):
    return tensor.contiguous().view(torch.int32)


def identical(got, want):
    """Every bit of the factors, signs of zeros included, and all that is said of them."""
    assert got.modules.keys() == want.modules.keys()
    for name, result in want.modules.items():
        for side in ("A", "B"):
            one, other = getattr(got.modules[name], side), getattr(result, side)
            assert one.shape == other.shape and torch.equal(bits(one), bits(other)), f"{side} of {name}"
    return got.energy == want.energy and got.total_energy == want.total_energy


@pytest.fixture(scope="module")
def singly(folders):
    """What each recipe of GRID makes by a merge of its own."""
    return [alone(folders, recipe, backend="torch") for recipe in GRID]


def test_each_result_has_the_bits_of_a_merge_alone(folders, singly):
    results = merge_many(folders, GRID, backend="torch")
    for recipe, got, want in zip(GRID, results, singly, strict=True):
        assert identical(got, want), recipe


def test_factors_have_the_bits_of_a_merge_alone(alike):
    for recipe, got in zip(FACTORS, merge_many(alike, FACTORS, backend="torch"), strict=True):
        assert identical(got, alone(alike, recipe, backend="torch")), recipe


def test_no_room_to_spare_and_many_passes_change_no_bit(folders, singly, monkeypatch):
    monkeypatch.setattr(many_merge_many, "MOST_TOGETHER", 4)
    for module in (many_merge_many, many_pool):
        monkeypatch.setattr(module, "room", lambda *_, **__: Room(1, 1, 0))
    for recipe, got, want in zip(GRID, merge_many(folders, GRID, backend="torch"), singly, strict=True):
        assert identical(got, want), recipe


def test_through_the_kernels_too(alike):
    pytest.importorskip("merge_engine.triton_backend")
    swapped = {"method": "ties", "density": 0.3, "adapters": ["c", "a"]}
    grid = [GRID[0], {**GRID[0], "scale": 0.3}, swapped, {"method": "linear", "weights": W[0]}, FACTORS[1]]
    grid += FACTORS[6:8]  # drops: random, and so without a search for thresholds
    results = list(merge_many(alike, grid, backend="triton"))
    with Session(alike, backend="triton") as session:
        for recipe, got in zip(grid, results, strict=True):
            want = alone(alike, recipe, backend="triton")
            assert identical(got, want) and identical(session.merge(**recipe), want), recipe


def test_each_folder_has_the_bytes_of_a_merge_alone(folders, tmp_path):
    grid = [GRID[0], GRID[1], GRID[17], GRID[21], {**GRID[0], "scale": 0.3, "dtype": "bfloat16"}]
    names = ["first", "second", "cut", "swapped", "scaled"]
    for name, result in zip(names, merge_many(folders, grid, tmp_path / "all", names=names), strict=True):
        assert result.path == tmp_path / "all" / name and not result.modules
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == sorted(names)
    for name, recipe in zip(names, grid, strict=True):
        alone(folders, recipe, tmp_path / name)
        ours, theirs = ({path.name: path.read_bytes() for path in sorted(folder.iterdir())} for folder in
                        (tmp_path / "all" / name, tmp_path / name))  # fmt: skip
        assert ours == theirs, name


def test_recipes_as_objects_and_names_by_default(alike, tmp_path):
    recipe = Recipe(method="linear", rank=2)
    results = list(merge_many([open_adapter(folder) for folder in alike], [recipe, recipe], tmp_path / "out"))
    assert [result.path.name for result in results] == ["000", "001"]
    assert list(merge_many(alike, [])) == []


def test_results_own_their_memory(alike):
    """What a caller does to one result shows in no other, nor in what a session merges later."""
    recipes = [{"method": "linear"}, {"method": "linear"}, {"method": "linear", "scale": 2.0}]
    one, other, doubled = merge_many(alike, recipes)
    with Session(alike) as session:
        first = session.merge(method="linear")
        for result in (one, first):
            for module in result.modules.values():
                module.A.zero_(), module.B.zero_()
        want = merge(alike, method="linear")
        assert identical(other, want) and identical(session.merge(method="linear"), want)
    assert identical(doubled, merge(alike, method="linear", scale=2.0))


OWNED = [
    {"method": "ties", "density": 0.3, "rank": 5},
    {"method": "linear"},
    {"method": "cat"},
    {"method": "linear", "space": "factors"},
    {"method": "ties", "density": 0.4, "space": "factors", "rank": 2},
]


@pytest.mark.parametrize("recipe", OWNED, ids=str)
@pytest.mark.parametrize("scale", [1.0, 2.0, 0.0])
def test_a_result_that_is_changed_changes_no_other(alike, recipe, scale):
    """Of a session, whatever it has kept, or of recipes that are one until the last step."""
    others = [{**recipe, "scale": other} for other in (1.0, 2.0, 0.0)]
    want = [alone(alike, other, backend="torch") for other in others]

    def spoil(merged):
        for module in merged.modules.values():
            for side in (module.A, module.B):
                assert side.is_contiguous() and side.untyped_storage().nbytes() == 4 * side.numel()
                side.fill_(math.nan)

    with Session(alike, backend="torch") as session:
        for _ in range(2):
            spoil(session.merge(**recipe, scale=scale))
        for other, each in zip(others, want, strict=True):
            assert identical(session.merge(**other), each)
    first, *rest = merge_many(alike, [{**recipe, "scale": scale}, *others, {**recipe, "scale": scale}], backend="torch")
    spoil(first)
    for got, each in zip(rest, [*want, alone(alike, {**recipe, "scale": scale}, backend="torch")], strict=True):
        assert identical(got, each)


@pytest.mark.parametrize("recipe", OWNED, ids=str)
def test_energy_is_that_of_scale_one(alike, recipe):
    """Even where nothing is left: a scale of 0, or one that takes every factor below float32; a sign stays in B."""
    plain = merge(alike, **recipe, backend="torch")
    kept = sum(float((m.B.double() @ m.A.double()).square().sum()) for m in plain.modules.values())
    whole_norm = sum(float((m.B.double() @ m.A.double()).square().sum()) / m.energy for m in plain.modules.values())
    assert plain.total_energy == pytest.approx(kept / whole_norm, rel=1e-12)
    with Session(alike, backend="torch") as session:
        for scale in (0.0, -0.0, 1e-60, -2.0, 1e20):
            for got in (merge(alike, **recipe, scale=scale, backend="torch"), session.merge(**recipe, scale=scale)):
                assert got.energy == plain.energy and got.total_energy == plain.total_energy
                for name, (A, B, _) in got.modules.items():
                    assert torch.equal(bits(A), bits(plain.modules[name].A))
                    assert torch.equal(bits(B), bits(plain.modules[name].B * scale))
        for scale in (3.4e38, -3e38):
            with pytest.raises(RecipeError, match=r"^scale: .* is no float32$"):
                session.merge(**recipe, scale=scale)
        assert identical(session.merge(**recipe), plain)


def test_the_scale_comes_last(folders):
    """scale * B @ A: A is that of scale 1, and each element of B rounded once."""
    for recipe in ({"method": "ties", "density": 0.3, "rank": 5}, {"method": "linear"}, {"method": "cat"}):
        one, scaled = merge(folders, **recipe), merge(folders, **recipe, scale=0.3)
        assert scaled.energy == one.energy
        for name, result in one.modules.items():
            assert torch.equal(bits(scaled.modules[name].A), bits(result.A))
            want = result.B.double() * 0.3
            assert ((scaled.modules[name].B.double() - want).abs() <= 2 * U * want.abs()).all()


def test_one_that_goes_wrong_leaves_the_others_alone(folders, tmp_path):
    good = {"method": "ties", "density": 0.3, "rank": 5}
    grid = [good, {**good, "scale": 1e38}, {**good, "scale": 1e6, "dtype": "float16"}, {**good, "weights": W[0]}]
    before, huge, too_wide, after = merge_many(folders, grid, tmp_path / "out", names=["a", "b", "c", "d"])
    assert (huge.index, huge.name, type(huge.error)) == (1, "b", RecipeError)
    assert str(huge.error).startswith("scale: 1e+38 times ")
    assert (too_wide.index, too_wide.name, type(too_wide.error)) == (2, "c", OutputError)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a", "d"}
    for result, recipe in ((before, grid[0]), (after, grid[3])):
        alone(folders, recipe, tmp_path / "one", overwrite=True)
        name = "adapter_model.safetensors"
        assert (result.path / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_adapter_that_vanishes_fails_its_own_merges_only(alike, tmp_path, backend):
    if backend == "triton":
        pytest.importorskip("merge_engine.triton_backend")
    own = [alike[0], alike[1], save_adapter(tmp_path / "gone", 9, {"q": (23, 37), "up": (41, 19)})]
    grid = [{"method": "ties", "adapters": [0, 1]}, {"method": "ties"}, {"method": "linear", "adapters": [2]}]
    results = merge_many(own, grid, tmp_path / "out", backend=backend)
    os.remove(own[2] / "adapter_model.safetensors")
    first, second, third = results
    assert first.path.is_dir()
    for failed in (second, third):
        assert isinstance(failed, Failed) and isinstance(failed.error, AdapterError)
        assert "adapter_model.safetensors cannot be read" in str(failed.error)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["000"]


def test_an_interrupted_pass_leaves_nothing_half_written(alike, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_Making, "take", stop)
    with pytest.raises(KeyboardInterrupt):
        list(merge_many(alike, [{"method": "ties"}, {"method": "linear"}], tmp_path / "out"))
    assert not (tmp_path / "out").exists()


WRONG = [
    ({"recipes": [{}, {"density": 2}]}, r"^recipe 001: density: wanted a number from 0 to 1, got 2$"),
    ({"recipes": [{"adapters": ["a", "d"]}]}, r"^recipe 000: adapters: wanted .* or one of a, b, c, got 'd'$"),
    ({"recipes": [{"adapters": [3]}]}, r"adapters: wanted a number below 3 or one of a, b, c, got 3$"),
    ({"recipes": [{"adapters": [True]}]}, r"got True$"),
    ({"recipes": [{"adapters": "ab"}]}, r"adapters: wanted a list of numbers or names, got 'ab'$"),
    ({"recipes": [{"adapters": []}]}, r"^recipe 000: adapters: wanted at least one, got none$"),
    ({"recipes": [{"weight": [1]}], "names": ["x"]}, r"^recipe x: recipe: wanted one of .*, got 'weight'$"),
    ({"names": ["x", "y"]}, r"^names: wanted 1, one for each recipe, got 2$"),
    ({"recipes": [{}, {}], "names": ["x", "x"]}, r"^names: wanted each one once, got 'x' 2 times$"),
    ({"names": ["../x"]}, r"^names: wanted the name of a folder, got '\.\./x'$"),
    ({"names": [""]}, r"^names: wanted the name of a folder, got ''$"),
    ({"names": ["taken"]}, r"taken already exists; pass overwrite to replace it$"),
    ({"memory": "much"}, r"^memory: wanted a size such as 5GB or 200MB, got 'much'$"),
    ({"memory": "100MB"}, r"^memory: wanted at least 0\.\d\dGB for this merge, got 0\.10GB$"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_wrong_is_told_before_anything_is_written(alike, tmp_path, changes, message):
    (tmp_path / "out" / "taken").mkdir(parents=True)
    with pytest.raises(MergeError, match=message):
        merge_many(alike, **{"recipes": [{}], "output_dir": tmp_path / "out", **changes})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["taken"]
    assert list((tmp_path / "out" / "taken").iterdir()) == []


def test_a_name_that_two_adapters_have_is_refused(alike, tmp_path):
    twin = save_adapter(tmp_path / "a", 5, {"q": (23, 37)})
    with pytest.raises(RecipeError, match=r"got 'a', the name of 2$"):
        merge_many([*alike, twin], [{"adapters": ["a", "b"]}])
    assert not isinstance(next(merge_many([*alike, twin], [{"adapters": [3, 1]}])), Failed)


def counting(monkeypatch, owner, name):
    calls, real = [], getattr(owner, name)

    def counted(*arguments, **options):
        calls.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_a_session_pays_for_what_changed(folders, monkeypatch):
    sweeps, stacks = counting(monkeypatch, engine_cpu_keeps, "trims_of_each"), counting(monkeypatch, many_pool, "Stack")
    merges, reads = (
        counting(monkeypatch, engine_cpu_backend, "merge_several"),
        counting(monkeypatch, many_pool, "_bytes_of"),
    )
    spaces = counting(monkeypatch, many_pool, "first_space")
    with Session(folders, backend="torch") as session:

        def merged(**recipe):
            for calls in (sweeps, stacks, merges, reads, spaces):
                calls.clear()
            got = session.merge(**recipe)
            searched = sum(len(ks) for _, (ks,), _ in sweeps)
            spent = (searched, len(merges), len(stacks), len(reads), len(spaces))
            assert identical(got, alone(folders, recipe, backend="torch"))
            return spent

        assert merged(method="ties", density=0.2, weights=W[0]) == (8, 3, 0, 8, 1)
        assert merged(method="ties", density=0.2, weights=W[1]) == (0, 3, 0, 0, 0)
        assert merged(method="ties", density=0.2, weights=W[1], scale=3.0) == (0, 0, 0, 0, 0)
        assert merged(method="ties", density=[0.2, 0.3, 0.2], weights=W[1]) == (2, 2, 0, 0, 0)
        assert merged(method="magnitude_prune", density=0.3, adapters=["sql", "chat"]) == (3, 3, 0, 0, 1)
        assert merged(method="linear", weights=W[0], rank=3) == (0, 0, 3, 0, 0)
        assert merged(method="linear", weights=W[1], energy=0.5) == (0, 0, 0, 0, 0)
        assert merged(method="ties", density=0.2, scope="model") == (0, 3, 0, 0, 0)


TRIMMED = {"method": "magnitude_prune", "density": 0.5}
SPACES = [  # of a module of rank 15, from 257 x 263 on: what each begins with differs from all before it
    {**TRIMMED, "rank": 5},
    {**TRIMMED, "rank": 20},
    {**TRIMMED, "rank": 20, "energy": 0.3},  # begins with 16 rows
    {**TRIMMED, "rank": 5, "adapters": [0, 1]},
    {**TRIMMED, "rank": 5, "adapters": [1, 0]},
    {**TRIMMED, "rank": 5, "adapters": ["ads"]},
]
SAME_SPACES = [  # nothing of what these begin with is new
    {**TRIMMED, "rank": 20, "energy": 0.97},  # grows from 16 rows to 20 vectors: those before are what it starts from
    {**TRIMMED, "rank": 20, "energy": 0.97, "weights": W[0]},
    {**TRIMMED, "rank": 20, "weights": W[0]},
    {"method": "dare_ties", "density": 0.4, "rank": 5, "seed": 3, "weights": W[2]},
    {"method": "ties", "density": 0.2, "rank": 5, "adapters": [1, 0], "weights": [1.0, -2.0], "scale": 3.0},
]


@pytest.mark.parametrize("order", [1, -1])
def test_what_iterations_begin_with_is_found_once(folders, monkeypatch, order):
    """Of the same adapters in the same order, for as many vectors; a block that grows is not what one begins with."""
    grid = SPACES + SAME_SPACES
    want = [alone(folders, recipe, backend="torch") for recipe in grid]
    spaces = counting(monkeypatch, many_pool, "first_space")
    with Session(folders, backend="torch") as session:
        for number in range(len(grid))[::order]:
            assert identical(session.merge(**grid[number]), want[number]), grid[number]
            assert order == -1 or len(spaces) == min(number + 1, len(SPACES))
        for recipe, each in zip(grid, want, strict=True):
            assert identical(session.merge(**recipe), each), recipe
        assert len(spaces) == len(SPACES)
        cache = session._pool.cache
        held = {key: entry for key, entry in cache._entries.items() if key[0] == "space"}
        assert len(held) == len(SPACES)
        for value, nbytes, _ in held.values():
            assert value.untyped_storage().nbytes() == nbytes
        assert cache.held == sum(nbytes for _, nbytes, _ in cache._entries.values())
    spaces.clear()
    with threads(3):  # that cut, and ask for the same at once
        for recipe, got, each in zip(grid, merge_many(folders, grid, backend="torch"), want, strict=True):
            assert identical(got, each), recipe
    assert len(spaces) == len(SPACES)


@pytest.mark.parametrize("compiled", [True, False])
def test_the_number_of_threads_changes_no_bit(folders, compiled, monkeypatch):
    """With loops and without; those that cut run on one thread each, however many there are."""
    if not compiled:
        monkeypatch.setattr(door, "loops", lambda: None)
    grid = [GRID[0], GRID[8], GRID[13], GRID[19], GRID[21], *SPACES[:3], SAME_SPACES[0]]
    with threads(1):
        want = [alone(folders, recipe, backend="torch") for recipe in grid]
    for count in (1, 2, 3):
        with threads(count):
            assert identical(alone(folders, grid[-1], backend="torch"), want[-1])
            many_at_once = list(merge_many(folders, grid, backend="torch"))
            with Session(folders, backend="torch") as session:
                in_turn = [session.merge(**recipe) for recipe in grid]
            assert torch.get_num_threads() == count
        for recipe, *got, each in zip(grid, many_at_once, in_turn, want, strict=True):
            assert all(identical(one, each) for one in got), (count, recipe)


@pytest.mark.parametrize("cache", [0, 40_000, 10**9])
def test_a_session_gives_the_bits_of_merges_alone_whatever_it_keeps(folders, singly, cache, monkeypatch):
    for module in (many_merge_many, many_pool):
        monkeypatch.setattr(module, "room", lambda *_, **__: Room(1, 2, cache))
    with Session(folders, backend="torch") as session:
        for number in [*range(len(GRID)), *range(len(GRID))[::-3]]:
            assert identical(session.merge(**GRID[number]), singly[number]), GRID[number]
            assert session._pool.cache.held <= cache


def test_a_session_is_safe_from_threads(folders, tmp_path):
    want = [alone(folders, recipe) for recipe in GRID]
    with Session(folders) as session, ThreadPoolExecutor(4) as threads:
        got = list(threads.map(lambda recipe: session.merge(**recipe), GRID))
    assert all(map(identical, got, want))


def test_a_session_writes_and_ends(folders, tmp_path):
    recipe = {"method": "ties", "density": 0.3, "rank": 5}
    with Session(folders) as session:
        assert session.merge(tmp_path / "ours", **recipe).path == tmp_path / "ours"
        merge(folders, tmp_path / "alone", **recipe)
        name = "adapter_model.safetensors"
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
        with pytest.raises(OutputError, match="already exists"):
            session.merge(tmp_path / "ours", **recipe)
        session.merge(tmp_path / "ours", overwrite=True, **recipe)
        with pytest.raises(RecipeError, match=r"^scale: 1e\+38 times "):
            session.merge(tmp_path / "huge", scale=1e38, **recipe)
        assert {path.name for path in tmp_path.iterdir()} == {"ours", "alone"}
    with pytest.raises(RecipeError, match=r"^session: wanted an open one, got one that is closed$"):
        session.merge(**recipe)


def test_adapters_are_checked_when_a_session_opens(alike, tmp_path):
    bad = save_adapter(tmp_path / "bad", 0, {"q": (23, 37)})
    file = bad / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-4:] = np.float32("nan").tobytes()
    file.write_bytes(data)
    with pytest.raises(AdapterError, match=r"^bad: tensor .* holds NaN$"):
        Session([*alike, bad])


def test_equal_extras_are_compared_once(alike, tmp_path, monkeypatch):
    """Layers that adapters save whole are copied; no merge of a session compares them again."""
    own = []
    for seed in range(2):
        extras = {f"{STEM}head.weight": torch.arange(6.0)}
        more = {"extras": extras, "modules_to_save": ["head"]}
        own.append(save_adapter(tmp_path / f"x{seed}", seed, {"q": (23, 37)}, **more))
    with Session(own) as session:
        compared = counting(monkeypatch, sys.modules["merge_engine.adapter"], "_same_bytes")
        assert identical(session.merge(method="linear"), merge(own, method="linear"))
        assert len(compared) == 1  # by the merge alone


def product(rows, columns, rank, seed, coarse=False):
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(shape, generator=generator) for shape in ((rank, columns), (rows, rank)))
    return Product((A * 2).round() if coarse else A, (B * 2).round() if coarse else B, 0.5)


def whole(source):
    """The source's own bits: what the tiles of a merge of it alone hold."""
    return merge_deltas([source], [1.0], [None], make_rule("linear"))


@given(
    shape=st.sampled_from([(1, 1), (7, 13), (257, 263), (300, 1021)]),
    densities=st.lists(st.sampled_from([0.0, 1e-4, 0.1, 0.2, 0.5, 0.51, 0.97, 1.0]), min_size=1, max_size=5),
    coarse=st.booleans(),
    compiled=st.booleans(),
    seed=st.integers(0, 3),
)
@settings(max_examples=40)
def test_thresholds_of_several_densities_from_one_sweep(shape, densities, coarse, compiled, seed):
    """Exactly the k first of a stable sort by falling magnitude stay, ties among them or not."""
    source = product(*shape, 3, seed, coarse)
    with nullcontext() if compiled else mock.patch.object(door, "loops", lambda: None):
        delta = whole(source)
        ks = [int(density * delta.numel()) for density in densities]
        exact, keeping = (trims_of_each([source], [ks], ties)[0] for ties in ("exact", "keep"))
        trimmed = [merge_deltas([source], [1.0], [trim], make_rule("linear")) for trim in exact]
    order = np.argsort(-delta.abs().flatten().numpy(), kind="stable")
    for k, got in zip(ks, trimmed, strict=True):
        want = np.zeros(delta.numel(), np.float32)
        want[order[:k]] = delta.flatten().numpy()[order[:k]]
        assert np.array_equal(got.flatten().numpy(), want), k
    for k, trim in zip(ks, keeping, strict=True):
        if k:
            assert trim.value == abs(delta.flatten()[order[k - 1]].item()) and trim.row >= shape[0]


@given(
    shape=st.sampled_from([(1, 5), (67, 131), (300, 521)]),
    count=st.integers(1, 5),
    methods=st.lists(st.sampled_from(["ties", "magnitude_prune", "dare_ties"]), min_size=1, max_size=5),
    convention=st.sampled_from(["peft", "mergekit"]),
    election=st.sampled_from(["total", "frequency"]),
    tied=st.sampled_from([1, -1]),
    coarse=st.booleans(),
    compiled=st.booleans(),
)
@settings(max_examples=60)
def test_several_merges_of_the_same_tiles(shape, count, methods, convention, election, tied, coarse, compiled):
    """With Numba's loops and without; coarse values tie at the threshold and in the vote."""
    sources = [product(*shape, 3, seed, coarse) for seed in range(count)]
    with nullcontext() if compiled else mock.patch.object(door, "loops", lambda: None):
        asks = []
        for number, method in enumerate(methods):
            keeps = [Drop(0.5, 1, number, i) for i in range(count)]
            if method != "dare_ties":
                keeps = [trims([source], source.rows * source.columns // 3, "exact")[0] for source in sources]
            weights = tuple((-1) ** i * (number + i) / 3 for i in range(count))
            asks.append(
                MergeSpec(weights, tuple(keeps), make_rule(method, convention=convention, election=election), tied)
            )
        results = merge_several(sources, asks)
        for ask, got in zip(asks, results, strict=True):
            want = merge_deltas(sources, ask.weights, ask.keeps, ask.rule, tied=tied)
            assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("tied", [1, -1])
@pytest.mark.parametrize("election", ["total", "frequency"])
def test_several_merges_where_every_vote_is_tied(tied, election):
    source = product(67, 131, 3, 0)
    sources = [source, Product(source.A, source.B, -source.scaling)]
    asks = [MergeSpec((1.0, w), (None, None), make_rule("ties", election=election), tied) for w in (0.5, 0.25)]
    delta = whole(source)
    for ask, got in zip(asks, merge_several(sources, asks), strict=True):
        # One of the two is on the elected side, the first where delta has its sign, and is divided by itself alone.
        own = torch.where(delta * tied > 0, torch.tensor(1.0), torch.tensor(ask.weights[1]))
        assert torch.equal(got, delta.abs() * tied * own)


def test_more_adapters_than_a_thread_holds(monkeypatch):
    sources = [product(67, 131, 3, seed) for seed in range(5)]
    asks = [MergeSpec((w,) * 5, (None,) * 5, make_rule("ties")) for w in (1.0, 0.3)]
    want = merge_several(sources, asks)
    monkeypatch.setattr(cpu_merge_several, "MOST_HELD", 4)
    assert all(map(torch.equal, merge_several(sources, asks), want))


@given(
    shape=st.sampled_from([(1, 7), (13, 5), (31, 41), (97, 29)]),
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rank=st.integers(1, 40),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_a_stack_cuts_sums_of_products_as_a_dense_svd_does(shape, ranks, dtype, rank, seed):
    """Against numpy's SVD of the dense sum in float64; factors of any weights come from one decomposition."""
    generator = torch.Generator().manual_seed(seed)
    As = [torch.randn(r, shape[1], generator=generator).to(dtype) for r in ranks]
    Bs = [torch.randn(shape[0], r, generator=generator).to(dtype) for r in ranks]
    stack = Stack(As, Bs)
    for weights in torch.randn(2, len(ranks), generator=generator, dtype=torch.float64).tolist():
        dense = sum(w * (B.double() @ A.double()) for w, A, B in zip(weights, As, Bs, strict=True)).numpy()
        s = np.linalg.svd(dense, compute_uv=False)
        A, B, energy = stack.cut(weights, rank)
        k = min(rank, *shape, sum(ranks))
        assert A.shape == (k, shape[1]) and B.shape == (shape[0], k)
        assert energy == pytest.approx((s[:k] ** 2).sum() / (s**2).sum(), abs=1e-12)
        error = np.linalg.norm(dense - B.double().numpy() @ A.double().numpy())
        best = math.sqrt((s[k:] ** 2).sum())
        # The factors' rounding moves the product by 2 u |D_k|, and what of it lies in the rest adds in quadrature.
        assert error <= best + 2 * U * math.sqrt((s[:k] ** 2).sum()) + 1e-12 * s[0]
        wanted = 0.8
        least = 1 + int((np.cumsum(s**2) / (s**2).sum() < wanted).sum())
        assert len(stack.cut(weights, sum(ranks), wanted).A) == min(least, sum(ranks))


def test_a_stack_whose_products_cancel_is_zero():
    A, B = torch.randn(3, 17), torch.randn(11, 3)
    result = Stack([A, A], [B, B]).cut([0.7, -0.7], 4)
    assert not result.B.any() and result.energy == 1.0


def test_a_stack_refuses_what_does_not_fit():
    A, B = torch.randn(3, 17), torch.randn(11, 3)
    for As, Bs in (([], []), ([A], [B, B]), ([A], [B.T]), ([A, A[:, 1:]], [B, B]), ([A * math.inf], [B])):
        with pytest.raises(ValueError, match=r"wanted|not finite"):
            Stack(As, Bs)
    for weights, rank in (([], 1), ([1.0], 0), ([math.nan], 1)):
        with pytest.raises(ValueError, match=r"wanted|not finite"):
            Stack([A], [B]).cut(weights, rank)
    with pytest.raises(ValueError, match="does not fit float32"):
        Stack([A], [B]).cut([1e39], 3)


def test_the_cache_keeps_what_the_last_two_merges_used():
    cache = Cache(0)
    cache.begin(10)
    assert [cache.get(key, lambda key=key: key.upper(), lambda _: 4) for key in "abc"] == ["A", "B", "C"]
    assert (cache.find("a"), cache.find("b"), cache.find("c"), cache.held) == ("A", "B", None, 8)
    cache.begin(10)
    cache.get("b", str, len), cache.put("d", "D", 4)
    assert cache.find("a") == "A" and cache.find("d") is None  # a was used by the merge before
    cache.begin(10), cache.begin(10)
    cache.get("a", str, len), cache.put("d", "D", 4)
    assert (cache.find("a"), cache.find("b"), cache.find("d")) == ("A", None, "D")
    cache.begin(4)
    assert (cache.find("a"), cache.find("d"), cache.held) == (None, "D", 4)


def test_the_cache_makes_a_value_once_for_all_who_ask():
    cache, asked, made = Cache(100), Barrier(3), []
    go = Event()

    def make():
        made.append(1)
        go.wait(10)
        if len(made) == 1:
            raise OSError("full")
        return "value"

    def ask():
        asked.wait(10)
        return cache.get("key", make, len)

    with ThreadPoolExecutor(2) as threads:
        first = [threads.submit(ask) for _ in range(2)]
        asked.wait(10)
        while not made:
            pass
        go.set()
        outcomes = [future.exception() for future in first]
    assert all(isinstance(error, OSError) or error is None for error in outcomes) and len(made) <= 2
    assert cache.get("key", make, len) == "value" == cache.find("key")


MEASURE = """
import json, sys
import merge_engine
from merge_engine.many.merge_many import merge_many
small, adapters, recipes, memory = json.loads(sys.argv[1])
# Not ru_maxrss, which a process takes over from the one that started it.
peak = lambda: 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
for recipe in recipes[:1]:
    merge_engine.merge(small, **recipe)
before = peak()
if memory is None:
    merge_engine.merge(adapters, **recipes[0])
else:
    assert all(result.modules for result in merge_many(adapters, recipes, memory=memory))
print(json.dumps([before, peak()]))
"""


def peaks(*arguments):
    """Peak resident bytes of a process that has merged something small, and then what it is asked to."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", MEASURE, json.dumps(arguments, default=str)]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def test_memory_does_not_grow_with_the_number_of_adapters(tmp_path):
    """100 adapters of a 2048 x 2048 module, whose deltas would be 1.7 GB: less than the factors twice, and 70 MB."""
    small = [save_adapter(tmp_path / "small", 0, {"q": (512, 512)})] * 2
    large = [save_adapter(tmp_path / str(seed), seed, {"q": (2048, 2048)}, rank=16) for seed in range(100)]
    before, after = peaks(small, large, [{"method": "ties", "density": 0.2, "rank": 16}], None)
    factors = 100 * 16 * (2048 + 2048) * 4
    assert after - before < factors + 95e6


def test_the_memory_budget_holds(tmp_path):
    """12 matrices of 21 MB at once would be over it."""
    small = [save_adapter(tmp_path / "small", 0, {"q": (512, 512)})] * 2
    large = [save_adapter(tmp_path / str(seed), seed, {"q": (2048, 2560)}, rank=4) for seed in range(2)]
    grid = [{"method": "magnitude_prune", "density": 0.2, "rank": 4, "weights": [1.0, w]} for w in range(12)]
    _, after = peaks(small, large, grid, "0.7GB")
    assert after < 0.7e9
