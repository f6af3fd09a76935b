"""Many merges of the same adapters in one call: with the bits of single merges, and what goes wrong alone."""

import os

import pytest
import torch
from grids import FACTORS, GRID, W, alone, bits, identical, save_adapter
from lora_files import save_factors

from merge_engine.engine.merge import merge
from merge_engine.errors import AdapterError, MergeError, OutputError, RecipeError
from merge_engine.formats.open import open_adapter
from merge_engine.many import merge_many as many_merge_many
from merge_engine.many import pool as many_pool
from merge_engine.many.budget import Room
from merge_engine.many.merge_many import Failed, _Making, merge_each, merge_many
from merge_engine.many.session import Session
from merge_engine.rules.recipe import Recipe

U = 2**-24  # unit roundoff of float32


def test_each_result_has_the_bits_of_a_merge_alone(folders, singly):
    results = merge_many(folders, GRID, backend="torch")
    for recipe, got, want in zip(GRID, results, singly, strict=True):
        assert identical(got, want), recipe


@pytest.mark.quick
def test_factors_have_the_bits_of_a_merge_alone(alike):
    for recipe, got in zip(FACTORS, merge_many(alike, FACTORS, backend="torch"), strict=True):
        assert identical(got, alone(alike, recipe, backend="torch")), recipe


def test_merges_that_differ_in_their_energy(alike):
    grid = [{"method": "linear", "energy": energy} for energy in (0.3, 0.9)]
    few, many = results = list(merge_many(alike, grid, backend="torch"))
    for recipe, got in zip(grid, results, strict=True):
        assert identical(got, alone(alike, recipe, backend="torch")), recipe
    assert all(len(few.modules[name].A) < len(module.A) for name, module in many.modules.items())


def test_a_weight_may_turn_the_majority(tmp_path):
    """In q two adapters tie; the third, in up, makes the majority. The votes of this method are weighted."""
    row = torch.ones(1, 3)
    modules = {"a": {"q": (row, torch.ones(4, 1))}, "b": {"q": (row, -torch.ones(4, 1))}, "c": {"up": (row, row.T)}}
    folders = [save_factors(tmp_path / name, factors) for name, factors in modules.items()]
    paper = {"method": "elect_max", "convention": "paper", "density": 1.0}
    grid = [{**paper, "weights": [1.0, 1.0, weight]} for weight in (1.0, -1.0)]
    with Session(folders, backend="torch") as session:
        for results in (list(merge_many(folders, grid, backend="torch")), [session.merge(**each) for each in grid]):
            for recipe, got in zip(grid, results, strict=True):
                assert identical(got, merge(folders, backend="torch", **recipe)), recipe
            signs = [float((got.modules["q"].B @ got.modules["q"].A).sign().mean()) for got in results]
            assert signs == [1.0, -1.0]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_module_that_is_the_same_in_two_merges_may_have_another_majority(tmp_path, backend):
    """In q all votes are tied; in up the majority is - of all elements, and + of the few largest."""
    column = torch.tensor([[8.0], [4.0], *[[-1.0]] * 6])
    folders = [
        save_factors(
            tmp_path / name, {"q": (torch.ones(1, 3), sign * torch.ones(4, 1)), "up": (torch.ones(1, 3), column)}, r=1
        )
        for name, sign in (("a", 1.0), ("b", -1.0))
    ]
    paper = {"method": "ties", "convention": "paper", "scope": "tensor", "trim_ties": "exact"}
    grid = [{**paper, "density": {"q": 1.0, "up": density}} for density in (1.0, 0.25)]
    results = list(merge_many(folders, grid, backend=backend))
    for recipe, got in zip(grid, results, strict=True):
        assert identical(got, merge(folders, backend=backend, **recipe)), recipe
    signs = [float((got.modules["q"].B @ got.modules["q"].A).sign().mean()) for got in results]
    assert signs == [-1.0, 1.0]


def test_no_room_to_spare_and_many_passes_change_no_bit(folders, singly, monkeypatch):
    monkeypatch.setattr(many_merge_many, "MOST_TOGETHER", 4)
    for module in (many_merge_many, many_pool):
        monkeypatch.setattr(module, "room", lambda *_, **__: Room(1, 1, 0))
    for recipe, got, want in zip(GRID, merge_many(folders, GRID, backend="torch"), singly, strict=True):
        assert identical(got, want), recipe


def test_through_the_kernels_too(tmp_path):
    pytest.importorskip("triton")
    alike = [save_adapter(tmp_path / name, seed, {"q": (23, 37)}) for seed, name in enumerate("abc")]
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
        pytest.importorskip("triton")
    own = [alike[0], alike[1], save_adapter(tmp_path / "gone", 9, {"q": (23, 37), "up": (41, 19)})]
    grid = [{"method": "ties", "adapters": [0, 1]}, {"method": "ties"}, {"method": "linear", "adapters": [2]}]
    results = merge_each(own, grid, tmp_path / "out", backend=backend)
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
    ({"recipes": [{"weight": [1]}], "names": ["x"]}, r"^recipe x: recipe: wanted one of .*, got 'weight'; did you"),
    ({"names": ["x", "y"]}, r"^names: wanted 1, one for each recipe, got 2$"),
    ({"recipes": [{}, {}], "names": ["x", "x"]}, r"^names: wanted each one once, got 'x' 2 times$"),
    ({"names": ["../x"]}, r"^names: wanted the name of a folder, got '\.\./x'$"),
    ({"names": [""]}, r"^names: wanted the name of a folder, got ''$"),
    ({"names": ["taken"]}, r"taken already exists; pass overwrite to replace it$"),
    ({"output_dir": {"method": "linear"}}, r"^output: wanted the path to write to, got a dict; "),
    ({"memory": "much"}, r"^memory: wanted a size such as 5GB or 200MB, got 'much'$"),
    ({"memory": "100MB"}, r"^memory: wanted at least \d+\.\d\d MB for this merge, got 100\.00 MB$"),
]  # fmt: skip


@pytest.mark.quick
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


def test_with_a_folder_all_is_written_when_the_call_returns(alike, tmp_path):
    results = merge_many(alike, [{"method": "ties"}, {"method": "linear"}], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000", "001"]
    assert [result.path.name for result in results] == ["000", "001"] and results[1] is not results[0]
