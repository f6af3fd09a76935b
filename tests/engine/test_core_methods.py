"""Whole merges by methods on cores, against dense deltas in float64."""

import logging

import pytest
import spectral_textbook as textbook
import torch
from dense_merges import U32, WEIGHTS, dense_merge, product, save_zoo, tasks_of
from lora_files import save_factors
from peft_adapters import rewrite

import merge_engine
from merge_engine.errors import RecipeError

METHODS = list(textbook.METHODS)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return save_zoo(tmp_path_factory.mktemp("zoo"))


def check(merged, tasks, recipe):
    """B A is the textbook's, but for rounding, and what a module's condition makes of float64's."""
    wanted = dense_merge(tasks, recipe)
    assert merged.modules.keys() == wanted.keys()
    for name, dense in wanted.items():
        deltas = list(tasks[name].values())
        weights = [recipe["weights"][number] for number in tasks[name]]
        share = textbook.condition(recipe["method"], deltas, weights)
        limit = (2 * U32 * max(merged.ranks[name], 1) + 1e-10 / share**2) * float(dense.norm())
        assert float((product(merged.modules[name]) - dense).norm()) <= limit, name
        assert merged.energy[name] == 1.0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weights", [WEIGHTS, [1.0, 1.0, 1.0], [2.0, 0.0, -0.5]], ids=str)
def test_every_method_is_the_textbooks(zoo, method, weights):
    """Mixed ranks and scalings, a convolution, an embedding, modules of one adapter, of zeros, and of few rows."""
    recipe = {"method": method, "weights": weights, "scale": 0.7}
    merged = merge_engine.merge(zoo, **recipe)
    check(merged, tasks_of(zoo), recipe)
    assert not merged.modules["layers.1.zero"].B.any()


@pytest.mark.parametrize("method", METHODS)
def test_adapters_in_bfloat16(tmp_path, method):
    folders = save_zoo(tmp_path, torch.bfloat16)
    recipe = {"method": method, "weights": WEIGHTS}
    check(merge_engine.merge(folders, **recipe), tasks_of(folders), recipe)


@pytest.mark.parametrize("ridge", [0.0, 0.3, 5.0])
def test_ridges(zoo, ridge):
    recipe = {"method": "actmat", "weights": WEIGHTS, "ridge": ridge}
    tasks = {name: each for name, each in tasks_of(zoo).items() if name != "layers.1.small"}  # singular without one
    merged = merge_engine.merge(zoo, **recipe)
    small = merged.modules.pop("layers.1.small"), merged.figures["layers.1.small"]
    check(merged, tasks, recipe)
    assert small[0].B.isfinite().all() and small[1]["numerical_rank"] == 5


def alike(folder, kind):
    """Three adapters of one module that have much in common."""
    generator = torch.Generator().manual_seed(7)
    A, B = torch.randn(4, 40, generator=generator), torch.randn(30, 4, generator=generator)
    made = []
    for number in range(3):
        other = torch.randn(4, 40, generator=generator), torch.randn(30, 4, generator=generator)
        pair = {"shared A": (A, other[1]), "repeated": (A, B), "a zero one": (other[0], other[1] * (number != 1))}[kind]
        made.append(save_factors(folder / str(number), {"q": pair}))
    return made


@pytest.mark.parametrize("kind", ["shared A", "repeated", "a zero one"])
@pytest.mark.parametrize("method", METHODS)
def test_adapters_that_are_alike(tmp_path, kind, method):
    folders = alike(tmp_path, kind)
    recipe = {"method": method, "weights": [1.0, 0.5, 2.0]}
    merged = merge_engine.merge(folders, **recipe)
    check(merged, tasks_of(folders), recipe)
    if kind == "repeated" and method == "tsv":  # w_1 + w_2 + w_3 times it, and no larger for being there thrice
        one = tasks_of(folders)["q"][0]
        assert float((product(merged.modules["q"]) - 3.5 / 3 * one).norm()) <= 16 * U32 * float(one.norm())


def test_one_adapter_is_what_it_is(zoo):
    """For tsv times its weight; weights of means are shares, and one adapter has all of it."""
    tasks = tasks_of(zoo[:1])
    for method, scale in (("tsv", 0.7), ("multislerp", 1.0), ("karcher", 1.0)):
        merged = merge_engine.merge(zoo[:1], method=method, weights=[0.7])
        for name, each in tasks.items():
            limit = 16 * U32 * float(each[0].norm())
            assert float((product(merged.modules[name]) - scale * each[0]).norm()) <= limit, (method, name)


@pytest.mark.parametrize("method", METHODS)
def test_cuts(zoo, method):
    """The best of a rank, or the smallest rank that keeps enough; with what is kept of the textbook's squares."""
    tasks = tasks_of(zoo)
    wanted = dense_merge(tasks, {"method": method, "weights": WEIGHTS})
    for cut in ({"rank": 3}, {"energy": 0.7}, {"energy": 0.9, "rank": 2}):
        merged = merge_engine.merge(zoo, method=method, weights=WEIGHTS, **cut)
        for name, dense in wanted.items():
            squares = torch.linalg.svdvals(dense).square()
            shares = squares.cumsum(0) / squares.sum() if squares.any() else torch.ones_like(squares)
            k = min(cut.get("rank", len(squares)), 1 + int((shares < cut.get("energy", 2.0) - 1e-9).sum()))
            assert merged.ranks[name] == k, name
            assert merged.energy[name] == pytest.approx(float(shares[k - 1]), abs=1e-6)
            least = float(squares[k:].sum()) ** 0.5
            error = float((product(merged.modules[name]) - dense).norm())
            assert error <= least * (1 + 1e-6) + 4 * U32 * k * float(dense.norm()), name


@pytest.mark.quick
def test_figures(zoo):
    """Numerical ranks are whole numbers; how parallel adapters are, where a method divides by it."""
    tasks = tasks_of(zoo)
    for method in METHODS:
        merged = merge_engine.merge(zoo, method=method, weights=WEIGHTS)
        dense = dense_merge(tasks, {"method": method, "weights": WEIGHTS})
        for name, figures in merged.figures.items():
            rank = len(textbook.svd(dense[name])[1])
            assert figures["numerical_rank"] == rank and isinstance(figures["numerical_rank"], int)
            assert ("smallest_singular_value" in figures) == (method not in ("multislerp", "karcher"))
    u, _, vh = textbook.unit_directions(list(tasks["layers.0.q"].values()), WEIGHTS)
    smallest = min(float(torch.linalg.svdvals(side)[-1]) for side in (u, vh))
    figures = merge_engine.merge(zoo, method="tsv", weights=WEIGHTS).figures["layers.0.q"]
    assert figures["smallest_singular_value"] == pytest.approx(smallest, rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_refactored_adapters_give_the_same(zoo, tmp_path, method):
    """B G and G^-1 A: rounded to float32 anew, which a method passes on by its condition."""
    turned = [rewrite_in(folder, tmp_path / folder.name, seed) for seed, folder in enumerate(zoo)]
    options = {"method": method, "weights": WEIGHTS}
    one, other = (merge_engine.merge(folders, **options).modules for folders in (zoo, turned))
    tasks = tasks_of(zoo)
    for name in one:
        share = textbook.condition(method, list(tasks[name].values()), [WEIGHTS[number] for number in tasks[name]])
        norm = float(product(one[name]).norm())
        assert float((product(other[name]) - product(one[name])).norm()) <= 1e-5 / share * norm, name


def rewrite_in(folder, target, seed):
    generator = torch.Generator().manual_seed(seed)

    def turn(A, B):
        G = torch.linalg.qr(torch.randn(len(A), len(A), generator=generator, dtype=torch.float64))[0] * 2
        left = torch.einsum("mr...,rs->ms...", B.double(), G).float()
        return torch.einsum("sr,r...->s...", torch.linalg.inv(G), A.double()).float(), left

    return rewrite(folder, target, turn)


def test_space_core_changes_nothing(zoo):
    for method in METHODS:
        one, other = (merge_engine.merge(zoo, method=method, space=space).modules for space in ("delta", "core"))
        assert all(torch.equal(one[n].A, other[n].A) and torch.equal(one[n].B, other[n].B) for n in one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.5}, "density: {} does not know it; it belongs to magnitude_prune, ties, dare_linear, "),
        ({"module_densities": {"q": [1.0]}}, "module_densities: {} does not know it"),
        ({"convention": "paper"}, "convention: {} does not know it"),
        ({"scope": "model"}, "scope: {} does not know it"),
        ({"election": "frequency"}, "election: {} does not know it"),
        ({"trim_ties": "keep"}, "trim_ties: {} does not know it"),
        ({"seed": 1}, "seed: {} does not know it; it belongs to dare_linear, dare_ties"),
        ({"gamma": 0.1}, "gamma: {} does not know it; it belongs to breadcrumbs, breadcrumbs_ties"),
        ({"normalize": False}, "normalize: wanted true or false, of ties or dare_ties, got False"),
        ({"space": "factors"}, "space: {} merges the cores of the deltas; wanted delta, got 'factors'"),
        ({"space": "knots"}, "space: {} merges the cores of the deltas; wanted delta, got 'knots'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", METHODS)
def test_what_they_do_not_know_is_refused_by_name(zoo, method, options, message):
    with pytest.raises(RecipeError) as error:
        merge_engine.merge(zoo, method=method, **options)
    assert str(error.value).startswith(message.format(method))


def test_a_ridge_belongs_to_actmat(zoo):
    with pytest.raises(RecipeError, match=r"^ridge: tsv does not know it; it belongs to actmat$"):
        merge_engine.merge(zoo, method="tsv", ridge=2)
    with pytest.raises(RecipeError, match=r"^ridge: wanted a number of at least 0, got -1\.0$"):
        merge_engine.merge(zoo, method="actmat", ridge=-1)


def test_directions_that_cancel_are_an_error_of_their_module(zoo):
    with pytest.raises(RecipeError, match=r"^conv: the weighted directions of the adapters cancel: wanted weights"):
        merge_engine.merge([zoo[0], zoo[0]], method="multislerp", weights=[1, -1])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_change_no_bit(zoo, count):
    from merge_engine.runtime.threads import threads

    for method in METHODS:
        one = merge_engine.merge(zoo, method=method, weights=WEIGHTS, scale="auto")
        with threads(count):
            other = merge_engine.merge(zoo, method=method, weights=WEIGHTS, scale="auto")
        for name, module in one.modules.items():
            assert torch.equal(module.A, other.modules[name].A) and torch.equal(module.B, other.modules[name].B)
        assert one.figures == other.figures


@pytest.mark.parametrize("method", METHODS)
def test_through_the_triton_backend(zoo, method):
    pytest.importorskip("triton")
    options = {"method": method, "weights": WEIGHTS, "scale": "auto"}
    one, other = (merge_engine.merge(zoo, backend=backend, **options) for backend in ("torch", "triton"))
    for name, module in one.modules.items():
        limit = 8 * U32 * float(product(module).norm())
        assert float((product(other.modules[name]) - product(module)).norm()) <= limit


def lines(caplog):
    """What was logged, and nothing more is kept."""
    found = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    found = [line for line in found if "servers" not in line]  # of embeddings, which they may refuse
    caplog.clear()
    return found


def test_what_a_cut_loses_is_logged_once_a_merge(zoo, tmp_path, caplog):
    merge_engine.merge(zoo, method="tsv")
    assert lines(caplog) == []
    for options, who in (({}, "merge by linear"), ({"output": tmp_path / "out"}, str(tmp_path / "out"))):
        merged = merge_engine.merge(zoo, **options, method="linear", rank=1)
        dense = dense_merge(tasks_of(zoo), {"method": "linear", "weights": [1.0, 1.0, 1.0]})
        ranks = {}
        for name, delta in dense.items():
            squares = torch.linalg.svdvals(delta).square()
            if squares.any() and squares[0] / squares.sum() < 0.9:
                ranks[name] = 1 + int((squares.cumsum(0) / squares.sum() < 0.99).sum())
        assert {n: f["rank_that_keeps_0.99"] for n, f in merged.figures.items() if f} == ranks and len(ranks) > 3
        told = f"{who}: rank up to 1 keeps {merged.total_energy:.2f} of the energy; rank {max(ranks.values())}"
        assert lines(caplog) == [f"{told} would keep 0.99 in every module that is below 0.9"]
        assert merged.total_energy < 0.9
    merged = merge_engine.merge(zoo, method="ties", rank=1)
    told = f"merge by ties: rank up to 1 keeps {merged.total_energy:.2f} of the energy; a larger rank keeps more"
    assert lines(caplog) == [told]
    assert all("rank_that_keeps_0.99" not in figures for figures in merged.figures.values())
    merge_engine.merge(zoo, method="linear", energy=0.95)
    assert lines(caplog) == []


@pytest.mark.parametrize("method", ["iso_c", "tsv_iso"])
def test_a_flat_spectrum_that_is_cut_is_logged(zoo, caplog, method):
    """Even where most of it is kept: no direction is worth less than another."""
    whole = max(figures["numerical_rank"] for figures in merge_engine.merge(zoo, method=method).figures.values())
    assert lines(caplog) == [] and whole == 9
    for rank in (8, 2):
        kept = merge_engine.merge(zoo, method=method, rank=rank).total_energy
        told = f"merge by {method}: rank up to {rank} keeps {kept:.2f} of the energy; all directions of {method} are"
        assert lines(caplog) == [f"{told} equally strong, wanted rank 9"]
        assert (kept > 0.9) == (rank == 8)


def test_a_sweep_logs_a_line_for_each_merge(zoo, caplog):
    recipes = [{"method": "tsv", "rank": 1, "scale": scale} for scale in (1.0, 0.5, "auto")]
    assert len(list(merge_engine.merge_many(zoo, recipes))) == 3
    assert len(lines(caplog)) == 3
