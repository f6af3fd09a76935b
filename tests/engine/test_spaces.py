"""Elementwise rules in the spaces that adapters share, and balanced adapters, against dense deltas in float64."""

import logging
import math
import re

import pytest
import spectral_textbook as textbook
import torch
from dense_merges import U32, WEIGHTS, dense_merge, product, save_one, save_zoo, sizes_of, tasks_of
from lora_files import save_factors
from peft_adapters import rewrite

import merge_engine
from merge_engine.engine import joint as engine_joint
from merge_engine.errors import RecipeError
from merge_engine.rules.methods import METHODS
from merge_engine.runtime.threads import threads

ELEMENTWISE = [method for method, row in METHODS.items() if row.kind == "elementwise"]
OPTIONS = [
    {},
    {"convention": "mergekit"},
    {"convention": "paper"},
    {"scope": "model"},
    {"election": "frequency"},
    {"trim_ties": "keep"},
    {"weights": [1.0, 0.0, -2.0]},
    {"balance": "pico"},
    {"balance": "pico", "scope": "model", "scale": "auto"},
]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return save_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def tasks(zoo):
    return tasks_of(zoo)


def check(merged, zoo, tasks, recipe):
    """Task tensors are off by 8 U32 |s B| |A| or less, drops divide that by 0.4; no element changes sides here."""
    sizes = sizes_of(zoo, recipe["weights"])
    wanted = dense_merge(tasks, recipe)
    assert merged.modules.keys() == wanted.keys()
    for name, dense in wanted.items():
        assert float((product(merged.modules[name]) - dense).norm()) <= 20 * U32 * sizes[name], name


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("method", ELEMENTWISE)
@pytest.mark.parametrize("space", ["knots", "core"])
def test_every_rule_is_the_textbooks(zoo, tasks, space, method, options):
    """Convolution, embedding, one adapter, zeros, fewer rows than ranks; a trim may span the model."""
    if METHODS[method].keep == "band" and options.get("scope") == "model":
        pytest.skip("a band has thresholds for each tensor")
    recipe = {"method": method, "space": space, "density": 0.4, "seed": 3, "weights": WEIGHTS, **options}
    check(merge_engine.merge(zoo, **recipe), zoo, tasks, recipe)


@pytest.mark.parametrize("scale", [1.0, "auto"])
@pytest.mark.parametrize("method", [*ELEMENTWISE, "tsv", "actmat", "karcher"])
def test_balanced_adapters(zoo, tasks, method, scale):
    """T is that of a module: adapters that do not have it are not counted."""
    recipe = {"method": method, "weights": WEIGHTS, "balance": "pico", "scale": scale}
    if METHODS[method].keep != "all":
        recipe |= {"density": 0.4, "seed": 3}
    check(merge_engine.merge(zoo, rank=10**6, **recipe), zoo, tasks, recipe)
    assert {len(each) for each in tasks.values()} == {1, 2, 3}


@pytest.mark.quick
def test_the_ties_of_knots(zoo, tasks):
    """As its authors compute it: per model one threshold over all modules, a majority for tied votes, a mean."""
    merged = merge_engine.merge(zoo, method="ties", space="knots", convention="paper", density=0.2, scale=0.6)
    bases = {name: textbook.bases(list(each.values()))[0][0] for name, each in tasks.items()}
    rows = {name: {t: bases[name].T @ task for t, task in each.items()} for name, each in tasks.items()}
    trimmed = {name: {} for name in tasks}
    for t in range(3):
        flat = torch.cat([each[t].flatten() for each in rows.values() if t in each])
        k = flat.numel() - int(flat.numel() * 0.2)
        threshold = flat.abs().kthvalue(k).values  # their code keeps what is at least the k-th smallest magnitude
        for name, each in rows.items():
            if t in each:
                trimmed[name][t] = each[t] * (each[t].abs() >= threshold)
    votes = {name: sum(each.values()).sign() for name, each in trimmed.items()}
    majority = sum(int(sign.sum()) for sign in votes.values())
    assert majority != 0
    sizes = sizes_of(zoo, [1, 1, 1])
    for name, each in trimmed.items():
        sign = torch.where(votes[name] == 0, math.copysign(1, majority), votes[name])
        kept = [task * (task.sign() == sign) for task in each.values()]
        mean = sum(kept) / sum(task != 0 for task in kept).clamp(min=1)
        error = product(merged.modules[name]) - 0.6 * bases[name] @ mean
        assert float(error.norm()) <= 16 * U32 * sizes[name], name


def test_a_majority_that_is_tied_elects_the_negative_side(tmp_path):
    """As the code of TIES does: it compares the elected sign with 0, and 0 is not above it."""
    tasks = [[1.0, -1.0, 0.25], [1.0, -1.0, -0.25]]  # votes of +, - and 0: none is the majority
    for name, task in zip("ab", tasks, strict=True):
        save_factors(tmp_path / name, {"q": (torch.tensor([task]), torch.ones(1, 1))}, r=1, lora_alpha=1)
    merged = merge_engine.merge([tmp_path / "a", tmp_path / "b"], method="ties", convention="paper", density=1.0)
    assert product(merged.modules["q"]).flatten().tolist() == pytest.approx([1.0, -1.0, -0.25])


@pytest.mark.parametrize("space", ["knots", "core"])
def test_linear_in_a_space_is_linear(zoo, space):
    for options in ({}, {"rank": 2}, {"scale": "auto"}, {"balance": "pico"}):
        one, other = (
            merge_engine.merge(zoo, method="linear", weights=WEIGHTS, space=each, **options)
            for each in ("delta", space)
        )
        for name, module in one.modules.items():
            assert torch.equal(module.A, other.modules[name].A) and torch.equal(module.B, other.modules[name].B)
        assert one.figures == other.figures


@pytest.mark.parametrize("space", ["knots", "core"])
@pytest.mark.parametrize("cut", [{"rank": 3}, {"energy": 0.8}, {"rank": 2, "energy": 0.99}], ids=str)
def test_cuts(zoo, tasks, space, cut):
    recipe = {"method": "ties", "space": space, "density": 0.5, "weights": WEIGHTS}
    merged = merge_engine.merge(zoo, **recipe, **cut)
    for name, dense in dense_merge(tasks, recipe).items():
        squares = torch.linalg.svdvals(dense).square()
        shares, most = squares.cumsum(0) / squares.sum(), cut.get("rank", len(squares))
        if not squares.any():
            shares, most = torch.ones_like(squares), 1
        k = min(most, 1 + int((shares < cut.get("energy", 2.0)).sum()))
        assert merged.ranks[name] == k and merged.energy[name] == pytest.approx(float(shares[k - 1]), abs=1e-5)
        error = float((product(merged.modules[name]) - dense).norm())
        assert error <= float(squares[k:].sum()) ** 0.5 + 20 * U32 * sizes_of(zoo, WEIGHTS)[name], name


@pytest.mark.parametrize("space", ["knots", "core"])
def test_nothing_is_lost_without_a_cut(zoo, tasks, space):
    """Of rank K at most, and exact: no iteration is needed."""
    merged = merge_engine.merge(zoo, method="ties", space=space)
    for name, each in tasks.items():
        (_, left), (_, right) = textbook.bases(list(each.values()))
        wanted = len(left) if space == "knots" else min(len(left), len(right))
        assert merged.ranks[name] == max(wanted, 1) and merged.energy[name] == 1.0
        if space == "knots" and wanted:
            B = merged.modules[name].B.double()
            torch.testing.assert_close(B.T @ B, torch.eye(wanted).double(), rtol=0, atol=4 * U32)


@pytest.mark.parametrize("recipe", [{}, {"convention": "paper"}, {"election": "frequency"}, {"method": "dare_ties"}])
@pytest.mark.parametrize("space", ["delta", "knots", "core"])
def test_refactored_adapters_give_the_same(zoo, tmp_path, space, recipe):
    """B G and G^-1 A: other factors of the same deltas, also where the signs of singular vectors come into a vote."""
    generator = torch.Generator().manual_seed(1)

    def turn(A, B):
        G = torch.linalg.qr(torch.randn(len(A), len(A), generator=generator, dtype=torch.float64))[0] * 2
        left = torch.einsum("mr...,rs->ms...", B.double(), G).float()
        return torch.einsum("sr,r...->s...", torch.linalg.inv(G), A.double()).float(), left

    turned = [rewrite(folder, tmp_path / folder.name, turn) for folder in zoo]
    options = {"method": "ties", "space": space, "weights": WEIGHTS, "density": 0.5, "rank": 10**6, **recipe}
    one, other = (merge_engine.merge(folders, **options).modules for folders in (zoo, turned))
    for name, size in sizes_of(zoo, WEIGHTS).items():
        assert float((product(other[name]) - product(one[name])).norm()) <= 40 * U32 * size, name


def test_all_of_a_model_is_zero(tmp_path):
    """Spaces of no dimension: nothing is merged, and one row of zeros written."""
    folders = [save_one(tmp_path / name, seed, ["layers.1.zero"], 2) for seed, name in enumerate("ab")]
    for method in ELEMENTWISE[1:]:  # linear is linear without a space
        for options in ({}, {"scale": "auto"}, {"convention": "paper"}, {"balance": "pico"}):
            for space in ("knots", "core"):
                merged = merge_engine.merge(folders, method=method, space=space, **options)
                A, B, energy = merged.modules["layers.1.zero"]
                assert A.shape == (1, 8) and B.shape == (9, 1) and not B.any() and energy == 1.0


def test_a_module_is_joined_once(zoo, monkeypatch):
    """One decomposition of the stacked factors a module, and two with balanced ones, however often it is looked at."""
    made, real = [], engine_joint.Stack

    def counted(As, Bs):
        made.append(len(As))
        return real(As, Bs)

    monkeypatch.setattr(engine_joint, "Stack", counted)
    for options, times in (
        ({}, 1),
        ({"scope": "model"}, 1),
        ({"convention": "paper"}, 1),
        ({"balance": "pico"}, 2),
        ({"balance": "pico", "convention": "paper", "scale": "auto"}, 2),
    ):
        for space in ("knots", "core"):
            made.clear()
            merge_engine.merge(zoo, space=space, **options)
            assert len(made) == 8 * times, options
    made.clear()
    merge_engine.merge(zoo, method="tsv", balance="pico")
    assert len(made) == 8


@pytest.mark.parametrize("recipe", [{}, {"convention": "paper"}, {"balance": "pico", "scale": "auto"}])
def test_threads_change_no_bit(tmp_path, recipe):
    """Modules that a BLAS shares out over its threads."""
    generator = torch.Generator().manual_seed(3)
    folders = []
    for number in range(3):
        shapes = {"a": ((32, 300), (257, 32)), "b": ((16, 257), (300, 16))}
        factors = {n: [torch.randn(shape, generator=generator) for shape in pair] for n, pair in shapes.items()}
        patterns = {"rank_pattern": {"b": 16}, "alpha_pattern": {"b": 9}}
        folders.append(save_factors(tmp_path / str(number), factors, **patterns))
    for space in ("knots", "core"):
        found = []
        for count in (1, 2):
            with threads(count):
                found.append(merge_engine.merge(folders, method="ties", space=space, **recipe))
        one, other = found
        for name, module in one.modules.items():
            assert torch.equal(module.A, other.modules[name].A) and torch.equal(module.B, other.modules[name].B)
        assert one.figures == other.figures


@pytest.mark.parametrize(
    "recipe", [{"scope": "model"}, {"balance": "pico", "convention": "paper"}, {"method": "dare_ties"}]
)
@pytest.mark.parametrize("space", ["knots", "core"])
def test_through_the_triton_backend(tmp_path, space, recipe):
    pytest.importorskip("triton")
    modules = ["conv", "layers.1.small", "layers.1.zero"]
    folders = [save_one(tmp_path / name, seed, modules[: 3 - seed], 2 + seed) for seed, name in enumerate("abc")]
    recipe = {"method": "ties", "space": space, "density": 0.4, "weights": WEIGHTS, "scale": "auto", **recipe}
    check(merge_engine.merge(folders, backend="triton", **recipe), folders, tasks_of(folders), recipe)


def test_balance_is_refused_by_name(zoo):
    for options, message in (
        ({"space": "factors"}, "balance: acts on deltas; wanted a space other than factors"),
        (
            {"method": "cat"},
            "balance: cat does not know it; it belongs to linear, magnitude_prune, ties, dare_linear, ",
        ),
    ):
        with pytest.raises(RecipeError) as error:
            merge_engine.merge(zoo, balance="pico", **options)
        assert str(error.value).startswith(message)
    with pytest.raises(RecipeError, match=r"^balance: wanted pico, got 'Pico'$"):
        merge_engine.merge(zoo, balance="Pico")


def test_factors_that_do_not_fit_are_an_error_of_their_module(tmp_path):
    """A delta of float32, whose scaled B is none: named, in a merge, in a session and among many."""
    factors = {"q": (torch.full((2, 9), 1e-30), torch.full((8, 2), 1e30))}
    folders = [save_factors(tmp_path / name, factors, lora_alpha=2e10) for name in "ab"]
    message = r"^q: a factor of a task tensor reaches \d\.\de\+\d+: it does not fit torch.float32$"
    for space in ("knots", "core"):
        with pytest.raises(RecipeError, match=message):
            merge_engine.merge(folders, space=space)
        with merge_engine.Session(folders) as session, pytest.raises(RecipeError, match=message):
            session.merge(space=space)
        (failed,) = merge_engine.merge_many(folders, [{"space": space}])
        assert isinstance(failed.error, RecipeError) and re.match(message, str(failed.error))


def near(folder, shift, count=3, rows=30, columns=40):
    """Adapters of two modules whose A are one and the same but for a shift of its size."""
    generator = torch.Generator().manual_seed(7)
    shared = {name: torch.randn(4, columns, generator=generator) for name in ("a", "b")}
    made = []
    for number in range(count):
        factors = {
            name: (A + shift * torch.randn(A.shape, generator=generator), torch.randn(rows, 4, generator=generator))
            for name, A in shared.items()
        }
        made.append(save_factors(folder / str(number), factors))
    return made


def test_how_near_adapters_are_is_reported_and_logged(tmp_path, caplog):
    told = "the adapters' A are nearly the same, as if trained from one initialisation; space='{}' was measured"
    for shift, warned in ((1e-4, True), (0.3, False)):
        folders = near(tmp_path / str(shift), shift)
        tasks = tasks_of(folders)
        for space in ("delta", "knots", "core"):
            caplog.clear()
            merged = merge_engine.merge(folders, method="ties", space=space, density=0.9)
            lines = [each.getMessage() for each in caplog.records if "one initialisation" in each.getMessage()]
            for name, each in tasks.items():
                rows = torch.cat([textbook.svd(task)[2] for task in each.values()])
                smallest = float(torch.linalg.svdvals(rows)[-1])
                assert (smallest < 1e-2) == warned
                if space == "delta":
                    assert "smallest_row_singular_value" not in merged.figures[name]
                else:
                    found = merged.figures[name]["smallest_row_singular_value"]
                    assert found == pytest.approx(smallest, rel=1e-6)
            assert len(lines) == (1 if warned and space != "delta" else 0)
            if lines:
                assert lines[0].startswith(f"merge by ties: in 2 of 2 modules {told.format(space)}")
    caplog.clear()
    merge_engine.merge(near(tmp_path / "linear", 1e-4), method="linear", space="knots")
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]  # which is the same in any space


def test_rows_of_high_ranks_depend_on_each_other_and_are_not_told_of(tmp_path, caplog):
    """Three adapters of rank 4 have 12 rows; ten columns say nothing of where they started."""
    merged = merge_engine.merge(near(tmp_path, 1.0, columns=10), method="ties", space="core", density=0.9)
    assert {figures["smallest_row_singular_value"] for figures in merged.figures.values()} == {0.0}
    assert not [each for each in caplog.records if "one initialisation" in each.getMessage()]
