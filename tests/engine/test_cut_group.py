"""Whole groups cut at once by the engine, on both backends, against the cut of one module after the other."""

import logging

import pytest
import torch
from lora_files import save_factors

import merge_engine
from merge_engine.engine import cut_group as engine_cut_group
from merge_engine.engine.cpu_backend import TorchBackend
from merge_engine.engine.cut import cut
from merge_engine.engine.cut_group import _stacked, cut_group
from merge_engine.engine.merge import run
from merge_engine.engine.plan import make_plan
from merge_engine.engine.prepare import merge_groups, prepare
from merge_engine.errors import RecipeError
from merge_engine.lowrank.batched_stack import Stacks
from merge_engine.many import merge_many as many
from merge_engine.rules.recipe import Recipe

U32 = 2.0**-24
SHAPES = {
    "layers.0.q": (170, 150),
    "layers.1.q": (170, 150),
    "layers.2.q": (170, 150),
    "layers.0.k": (24, 40),
    "layers.1.k": (24, 40),
    "layers.0.up": (130, 190),
}
WEIGHTS = [1.0, -0.5, 2.0]


def saved(folder, seed, rank, dtype, names, **config):
    """An adapter whose deltas have singular values from 1 to 0.01, some of them of rank 3."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name in names:
        r = config.get("rank_pattern", {}).get(name, rank)
        sizes = torch.logspace(0, -2, r)
        A, B = (torch.randn(r, SHAPES[name][side], generator=generator) for side in (1, 0))
        factors[name] = A.to(dtype), (B.T * sizes).to(dtype)
    return save_factors(folder, factors, **config)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Adapters of different ranks, dtypes and modules, with one module of a rank of its own."""
    root, pattern = tmp_path_factory.mktemp("mixed"), {"layers.2.q": 3}
    return [
        saved(root / "a", 1, 4, torch.float32, SHAPES),
        saved(root / "b", 2, 7, torch.bfloat16, SHAPES, r=7, rank_pattern=pattern, alpha_pattern={"up": 3}),
        saved(root / "c", 3, 4, torch.float16, [name for name in SHAPES if name != "layers.1.k"]),
    ]


def backends(name):
    """The backend, and what differs from it in that it cuts groups."""
    if name == "torch":
        normal, cutting = TorchBackend(), TorchBackend()
    else:
        pytest.importorskip("triton")
        from merge_engine.engine.choose_backend import triton_device
        from merge_engine.engine.triton_backend import TritonBackend

        device = triton_device()[0]
        normal, cutting = TritonBackend(device), TritonBackend(device)
        assert cutting.cuts_groups == (device.type != "cpu")
    normal.cuts_groups, cutting.cuts_groups = False, True
    return normal, cutting


@pytest.fixture
def one_by_one(monkeypatch):
    """The names of modules that were not cut with their group, since this was last cleared."""
    names = []
    real = engine_cut_group.cut

    def counted(plan, backend, work):
        names.append(work.module.name)
        return real(plan, backend, work)

    monkeypatch.setattr(engine_cut_group, "cut", counted)
    return names


def planned(adapters, recipe):
    return make_plan([merge_engine.open_adapter(each) for each in adapters], Recipe.from_mapping(recipe))


def products(merged):
    return {name: factors.B.double() @ factors.A.double() for name, factors in merged.modules.items()}


DENSE = [
    {"method": "ties", "density": 0.4, "rank": 4},
    {"method": "ties", "density": 0.4},
    {"method": "ties", "density": 0.4, "energy": 0.6},
    {"method": "ties", "density": 0.3, "rank": 2, "scope": "model"},
    {"method": "dare_ties", "density": 0.4, "rank": 3, "seed": 5},
    {"method": "dare_linear", "density": 0.5, "rank": 4, "scale": "auto"},
]


INTERPRETED = [DENSE[0], DENSE[4]]  # which takes some seconds


@pytest.mark.parametrize(
    ("backend", "recipe"), [*(("torch", each) for each in DENSE), *(("triton", each) for each in INTERPRETED)], ids=str
)
def test_merged_deltas(mixed, backend, recipe, one_by_one):
    recipe = {"weights": WEIGHTS, **recipe}
    normal, cutting = backends(backend)
    want = run(planned(mixed, recipe), backend=normal)
    one_by_one.clear()
    got = run(planned(mixed, recipe), backend=cutting)
    assert one_by_one == []
    whole = products(run(planned(mixed, {**recipe, "rank": 200, "energy": None}), backend=normal))
    ours, theirs = products(got), products(want)
    assert sorted(ours) == sorted(theirs) == sorted(SHAPES)
    assert got.ranks == want.ranks
    for name, delta in whole.items():
        norm = float(delta.norm())
        errors = [float((delta - each[name]).norm()) for each in (ours, theirs)]
        # Both errors are within 1e-5 / 2 of the least; float32 rounds whole, and each product.
        assert abs(errors[0] - errors[1]) <= 5e-6 * errors[1] + 8 * U32 * norm
        left = 1 - want.energy[name]
        assert got.energy[name] == pytest.approx(want.energy[name], abs=1e-5 * left + 2.0**-22)
        assert got.modules[name].A.is_contiguous() and got.modules[name].B.is_contiguous()
        assert got.modules[name].A.untyped_storage().nbytes() == 4 * got.modules[name].A.numel()
    assert got.total_energy == pytest.approx(want.total_energy, abs=1e-5)
    if recipe.get("scale") == "auto":
        for name, figures in want.figures.items():
            assert got.figures[name]["scale"] == pytest.approx(figures["scale"], rel=1e-4)


EXACT = [
    {"method": "linear"},
    {"method": "linear", "rank": 3},
    {"method": "linear", "energy": 0.9, "scale": "auto"},
    {"method": "tsv"},
    {"method": "tsv", "rank": 5, "scale": 0.7},
    {"method": "iso_c"},
    {"method": "actmat", "ridge": 0.3},
    {"method": "karcher"},
]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("recipe", EXACT, ids=str)
def test_sums_and_methods_on_cores(mixed, backend, recipe, one_by_one):
    recipe = {"weights": WEIGHTS, **recipe}
    normal, cutting = backends(backend)
    want = run(planned(mixed, recipe), backend=normal)
    one_by_one.clear()
    got = run(planned(mixed, recipe), backend=cutting)
    assert one_by_one == []
    ours, theirs = products(got), products(want)
    assert sorted(ours) == sorted(theirs) == sorted(SHAPES) and got.ranks == want.ranks
    for name in SHAPES:
        # Each is rounded once to float32, by 2 U32 of its norm, and scaled there.
        assert float((ours[name] - theirs[name]).norm()) <= 6 * U32 * float(theirs[name].norm())
        assert got.energy[name] == pytest.approx(want.energy[name], abs=1e-9)
        assert got.figures[name].keys() == want.figures[name].keys()
        for figure, value in want.figures[name].items():
            assert got.figures[name][figure] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("recipe", [{"method": "cat"}, {"method": "ties", "density": 0.5, "space": "knots"}], ids=str)
def test_what_needs_no_decomposition_is_cut_one_by_one(mixed, recipe, one_by_one):
    recipe = {"weights": WEIGHTS, **recipe}
    normal, cutting = backends("torch")
    want = run(planned(mixed, recipe), backend=normal)
    one_by_one.clear()
    got = run(planned(mixed, recipe), backend=cutting)
    assert sorted(one_by_one) == sorted(SHAPES)
    for name, factors in want.modules.items():
        assert torch.equal(got.modules[name].A, factors.A) and torch.equal(got.modules[name].B, factors.B)


def test_more_ranks_than_a_side_are_cut_one_by_one(mixed, one_by_one):
    """Six adapters, whose ranks add up to 30, in a module of 24 rows; another of 24 has four of them."""
    recipe = {"method": "linear", "weights": [1.0] * 6}
    normal, cutting = backends("torch")
    want = run(planned([*mixed, *mixed], recipe), backend=normal)
    one_by_one.clear()
    got = run(planned([*mixed, *mixed], recipe), backend=cutting)
    assert one_by_one == ["layers.0.k"]
    for name, product in products(want).items():
        assert float((products(got)[name] - product).norm()) <= 4 * U32 * float(product.norm())


def test_factors_are_decomposed_some_modules_at_a_time(mixed, monkeypatch):
    _, cutting = backends("triton")
    plan, sizes = planned(mixed, {"method": "linear", "weights": WEIGHTS, "rank": 3}), []

    class Spied(Stacks):
        def __init__(self, rows, *arguments):
            sizes.append(len(rows))
            super().__init__(rows, *arguments)

    monkeypatch.setattr(engine_cut_group, "Stacks", Spied)
    want = run(plan, backend=cutting)
    assert sorted(sizes) == [1, 1, 1, 1, 2]  # layers.2.q and layers.1.k have ranks of their own
    for at_a_time, expected in ((1, [1] * 6), (2, [1, 1, 1, 1, 2])):
        sizes.clear()
        monkeypatch.setattr(engine_cut_group, "PART_BYTES", at_a_time * Stacks.nbytes(15, 170, 150))
        got = run(plan, backend=cutting)
        assert sorted(sizes) == expected
        for name, factors in want.modules.items():
            assert torch.equal(got.modules[name].A, factors.A) and torch.equal(got.modules[name].B, factors.B)


def test_many_adapters_start_from_random_sums(mixed, monkeypatch, one_by_one):
    starts = []
    real = engine_cut_group.cut_matrices

    def spied(matrices, start, *arguments):
        starts.append(tuple(start.shape))
        return real(matrices, start, *arguments)

    monkeypatch.setattr(engine_cut_group, "cut_matrices", spied)
    monkeypatch.setattr("merge_engine.engine.cut.WIDEST_START", 12)
    recipe = {"method": "ties", "density": 0.4, "rank": 2, "weights": WEIGHTS}
    normal, cutting = backends("torch")
    want = run(planned(mixed, recipe), backend=normal)
    one_by_one.clear()
    got = run(planned(mixed, recipe), backend=cutting)
    assert {shape[1] for shape in starts} == {11, 12} and one_by_one == []  # one module has ranks 4 and 7 only
    assert got.energy == pytest.approx(want.energy, abs=1e-5)


@pytest.mark.parametrize("recipe", [DENSE[0], EXACT[1], EXACT[3]], ids=str)
def test_modules_of_several_shapes_and_ranks(mixed, recipe):
    """As many groups as there are kinds; the results come in the order of the modules."""
    _, backend = backends("torch")
    plan = planned(mixed, {"weights": WEIGHTS, **recipe})
    works = list(merge_groups(plan, backend, prepare(plan, backend, lambda covered: None)))
    results = cut_group(plan, backend, works)
    for work, got in zip(works, results, strict=True):
        want = cut(plan, backend, work)
        assert got.factors.A.shape == want.factors.A.shape and got.factors.B.shape == want.factors.B.shape
        assert got.factors.energy == pytest.approx(want.factors.energy, abs=1e-5)
        assert got.squared_norm == pytest.approx(want.squared_norm, rel=1e-5)


def test_out_of_memory_cuts_each_module_of_a_group(mixed, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(engine_cut_group, "cut_matrices", full)
    _, backend = backends("torch")
    plan = planned(mixed, {"method": "ties", "density": 0.4, "rank": 4, "weights": WEIGHTS})
    works = list(merge_groups(plan, backend, prepare(plan, backend, lambda covered: None)))
    for work, got in zip(works, cut_group(plan, backend, works), strict=True):
        want = cut(plan, backend, work).factors
        assert torch.equal(got.factors.A, want.A) and torch.equal(got.factors.B, want.B), work.module.name


def test_out_of_memory_goes_on_one_by_one(mixed, monkeypatch, caplog, one_by_one):
    def full(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(engine_cut_group, "cut_matrices", full)
    recipe = {"method": "ties", "density": 0.4, "rank": 4, "weights": WEIGHTS}
    normal, cutting = backends("torch")
    want = run(planned(mixed, recipe), backend=normal)
    one_by_one.clear()
    with caplog.at_level(logging.INFO, logger="merge_engine.engine.cut_group"):
        got = run(planned(mixed, recipe), backend=cutting)
    assert sorted(one_by_one) == sorted(SHAPES) and "out of memory with 1 modules" in caplog.text
    for name, factors in want.modules.items():
        assert torch.equal(got.modules[name].A, factors.A) and torch.equal(got.modules[name].B, factors.B)


def test_a_launch_is_cut_as_one_group(mixed, monkeypatch):
    """Modules of one shape come together from the kernels, and as a view of what they wrote."""
    _, cutting = backends("triton")
    shapes, views = [], []
    cut, stack = engine_cut_group.cut_matrices, engine_cut_group._stacked

    def spied(matrices, *arguments):
        shapes.append(tuple(matrices.shape))
        return cut(matrices, *arguments)

    def viewed(matrices):
        stacked = stack(matrices)
        views.append(stacked.data_ptr() == matrices[0].data_ptr())
        return stacked

    monkeypatch.setattr(engine_cut_group, "cut_matrices", spied)
    monkeypatch.setattr(engine_cut_group, "_stacked", viewed)
    run(planned(mixed[:1], {"method": "magnitude_prune", "density": 0.4, "rank": 4}), backend=cutting)
    assert sorted(shapes) == [(1, 130, 190), (2, 24, 40), (3, 170, 150)] and all(views)


@pytest.mark.parametrize("recipe", [DENSE[0], EXACT[1], EXACT[3]], ids=str)
def test_many_merges_use_it(mixed, monkeypatch, recipe, one_by_one):
    """Where they run plan by plan, as on a GPU; two that differ in their scale are one."""
    _, cutting = backends("torch")
    cutting.merges_several = False
    groups = []
    real = engine_cut_group.cut_group
    monkeypatch.setattr(many, "choose", lambda name: cutting)
    monkeypatch.setattr(
        engine_cut_group, "cut_group", lambda *arguments: (groups.append(arguments[2]), real(*arguments))[1]
    )
    recipes = [{"weights": WEIGHTS, **recipe, "scale": scale} for scale in (1.0, 0.5)]
    merged = list(merge_engine.merge_many(mixed, recipes))
    assert len(groups) == len(SHAPES) and one_by_one == []
    for one, own in zip(merged, recipes, strict=True):
        for name, factors in run(planned(mixed, own), backend=cutting).modules.items():
            assert torch.equal(one.modules[name].A, factors.A) and torch.equal(one.modules[name].B, factors.B)


@pytest.mark.parametrize("method", ["linear", "ties", "tsv"])
def test_what_overflows_float32_names_the_module(mixed, method):
    _, cutting = backends("torch")
    recipe = {"method": method, "weights": [1.0, 1.0, 3e38], "rank": 3}
    with pytest.raises(RecipeError, match=r"^layers\.\d\.\w+: "):
        run(planned(mixed, recipe), backend=cutting)


def test_slices_of_one_tensor_are_stacked_without_a_copy():
    whole = torch.arange(60.0).view(5, 3, 4)
    stacked = _stacked(list(whole[1:4].unbind()))
    assert stacked.data_ptr() == whole[1].data_ptr() and torch.equal(stacked, whole[1:4])
    one = _stacked([whole[2]])
    assert one.data_ptr() == whole[2].data_ptr() and torch.equal(one, whole[2:3])
    for matrices in (
        [whole[0], whole[2]],
        [whole[2], whole[1]],
        [whole[0], whole[1].clone()],
        [whole[0].clone(), whole[1].clone()],
        [whole[0, :, ::2], whole[1, :, ::2]],
        list(whole.mT.unbind()),
    ):
        assert torch.equal(_stacked(matrices), torch.stack(matrices))
