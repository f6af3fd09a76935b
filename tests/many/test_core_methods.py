"""Methods on cores, common spaces, balance and the automatic scale in many merges: the bits of single ones."""

import random

import pytest
import torch
from dense_merges import save_one, save_zoo
from grids import W, alone, counting, identical, save_adapter

from merge_engine.engine import cut as engine_cut
from merge_engine.engine import joint as engine_joint
from merge_engine.engine.choose_backend import choose
from merge_engine.engine.cut import joined_bytes
from merge_engine.errors import RecipeError
from merge_engine.lowrank import cores as lowrank_cores
from merge_engine.many import merge_many as many_merge_many
from merge_engine.many import pool as many_pool
from merge_engine.many.budget import OWN, Room, room
from merge_engine.many.merge_many import merge_many
from merge_engine.many.pool import Pool
from merge_engine.many.session import Session
from merge_engine.runtime.threads import threads

CORES = ("tsv", "iso_c", "tsv_iso", "actmat", "multislerp", "karcher")
GRID = [
    *({"method": method, "weights": w} for method in (*CORES, "linear") for w in W),
    *({"method": method, "scale": "auto", "weights": W[0]} for method in (*CORES, "linear", "cat", "dare_ties")),
    *({"method": "tsv", "scale": scale, "weights": W[0]} for scale in (0.3, -2.0, 0.0)),
    {"method": "tsv", "scale": "auto", "gain": 0.5, "weights": W[0]},
    *({"method": method, "weights": W[1], "rank": 2} for method in CORES),
    {"method": "tsv", "weights": W[0], "energy": 0.7, "scale": "auto"},
    {"method": "actmat", "ridge": 0.3, "weights": W[0]},
    {"method": "actmat", "ridge": 0.3, "weights": W[1], "balance": "pico"},
    {"method": "tsv", "weights": W[0], "balance": "pico"},
    {"method": "linear", "weights": W[0], "balance": "pico", "scale": "auto"},
    {"method": "ties", "density": 0.3, "weights": W[0], "balance": "pico", "rank": 3},
    {"method": "linear", "weights": W[0], "space": "knots"},
    *(
        {"method": method, "density": 0.3, "weights": w, "space": space}
        for method in ("ties", "dare_linear", "breadcrumbs_ties")
        for w in W[:2]
        for space in ("knots", "core")
    ),
    *(
        {"density": 0.3, "weights": W[0], "space": space, **options}
        for space in ("knots", "core")
        for options in (
            {"scale": "auto"},
            {"scale": "auto", "gain": 2.0, "rank": 3},
            {"scope": "model"},
            {"convention": "paper", "scale": 0.6},
            {"balance": "pico", "convention": "paper"},
            {"energy": 0.6},
            {"adapters": [2, 0], "weights": [1.0, -2.0]},
            {"adapters": [2, 0], "weights": [1.0, -2.0], "scope": "model", "balance": "pico"},
        )
    ),
]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return save_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def singly(zoo):
    with threads(1):
        return [alone(zoo, recipe, backend="torch") for recipe in GRID]


def same(got, want):
    return identical(got, want) and got.figures == want.figures


def with_room(monkeypatch, *shares):
    for module in (many_merge_many, many_pool):
        monkeypatch.setattr(module, "room", lambda *_, **__: Room(*shares))


@pytest.mark.parametrize("count", [1, 2])
def test_each_result_has_the_bits_of_a_merge_alone(zoo, singly, count):
    with threads(count):
        for recipe, got, want in zip(GRID, merge_many(zoo, GRID, backend="torch"), singly, strict=True):
            assert same(got, want), recipe


def test_no_room_to_spare_and_many_passes_change_no_bit(zoo, singly, monkeypatch):
    monkeypatch.setattr(many_merge_many, "MOST_TOGETHER", 5)
    with_room(monkeypatch, 1, 1, 0)
    for recipe, got, want in zip(GRID, merge_many(zoo, GRID, backend="torch"), singly, strict=True):
        assert same(got, want), recipe


@pytest.mark.parametrize("cache", [0, 60_000, 10**9])
def test_a_session_gives_them_whatever_it_keeps(zoo, singly, cache, monkeypatch):
    with_room(monkeypatch, 1, 2, cache)
    order = [*range(len(GRID)), *range(len(GRID))[::3]]
    random.Random(cache).shuffle(order)
    with Session(zoo, backend="torch") as session:
        kept = session._pool.cache
        for number in order:
            assert same(session.merge(**GRID[number]), singly[number]), GRID[number]
            assert kept.held <= cache
            assert kept.held == sum(nbytes for _, nbytes, _ in kept._entries.values())


def test_through_the_kernels_too(tmp_path):
    pytest.importorskip("triton")
    folders = [save_one(tmp_path / n, seed, ["conv", "layers.1.small"], 2 + seed) for seed, n in enumerate("abc")]
    grid = [
        {"method": "tsv", "weights": W[0], "scale": "auto"},
        {"method": "tsv", "weights": W[0], "scale": 0.5},
        {"density": 0.3, "weights": W[0], "space": "core", "scale": "auto"},
        {"density": 0.3, "weights": W[0], "space": "knots", "scope": "model"},
        {"density": 0.3, "weights": W[1], "balance": "pico"},
    ]
    results = list(merge_many(folders, grid, backend="triton"))
    with Session(folders, backend="triton") as session:
        for recipe, got in zip(grid, results, strict=True):
            want = alone(folders, recipe, backend="triton")
            assert same(got, want) and same(session.merge(**recipe), want), recipe


def test_each_folder_has_the_bytes_of_a_merge_alone(zoo, tmp_path):
    grid = [GRID[0], GRID[3], {**GRID[0], "scale": "auto"}, {"space": "knots", "weights": W[0], "scale": "auto"}]
    assert all(result.path for result in merge_many(zoo, grid, tmp_path / "all"))
    for number, recipe in enumerate(grid):
        alone(zoo, recipe, tmp_path / "one" / str(number))
        ours, theirs = (
            {path.name: path.read_bytes() for path in folder.iterdir()}
            for folder in (tmp_path / "all" / f"{number:03}", tmp_path / "one" / str(number))
        )
        assert ours == theirs, recipe


def test_other_weights_decompose_nothing_again(zoo, monkeypatch):
    """Stacks, cores, their singular vectors and spaces are those of the deltas, whatever these are merged by."""
    stacks, joined = counting(monkeypatch, engine_cut, "Stack"), counting(monkeypatch, engine_joint, "Stack")
    thin, polar = (counting(monkeypatch, lowrank_cores.Cores, name) for name in ("_thin", "_polar"))
    with Session(zoo, backend="torch") as session:

        def spent(**recipe):
            for calls in (stacks, joined, thin, polar):
                calls.clear()
            session.merge(**recipe)
            return len(stacks), len(joined), len(thin), len(polar)

        modules, adapters = 8, 19  # of all modules together
        assert spent(method="tsv", weights=W[0]) == (modules, 0, adapters, 2 * modules)
        assert spent(method="tsv", weights=W[1], scale="auto") == (0, 0, 0, 0)
        for method in (*CORES, "linear"):
            assert spent(method=method, weights=W[0], rank=3) == (0, 0, 0, 0), method
        for space, balance in (("knots", None), ("core", None), ("knots", "pico")):
            recipe = {"space": space, "balance": balance}
            own = (0, modules * (2 if balance else 1), adapters * (2 if balance else 1), 0)
            assert spent(**recipe, weights=W[0]) == own
            for options in ({"weights": W[1]}, {"density": 0.5, "scope": "model"}, {"method": "dare_ties", "rank": 2}):
                assert spent(**recipe, **options) == (0, 0, 0, 0), options


def uneven(folder):
    """Three adapters: the first has no b, the last no a."""
    modules = {"x": ["layers.0.q"], "y": ["layers.0.q", "layers.1.q"], "z": ["layers.0.q", "layers.1.q"]}
    return [save_one(folder / name, seed, own, 3) for seed, (name, own) in enumerate(modules.items())]


@pytest.mark.parametrize("space", ["knots", "core"])
def test_adapters_are_told_apart_by_their_place_in_a_module(tmp_path, space):
    """Thresholds of z, which is second of those that have layers.1.q, and third or second of all."""
    folders = uneven(tmp_path)
    grid = [{"space": space, "density": 0.1}, {"space": space, "density": 0.1, "adapters": [1, 2]}]
    grid += [{**recipe, "balance": "pico"} for recipe in grid]
    for order in (1, -1):
        own = grid[::order]
        want = [alone(folders, recipe, backend="torch") for recipe in own]
        with Session(folders, backend="torch") as session:
            assert all(same(session.merge(**recipe), each) for recipe, each in zip(own, want, strict=True))
        assert all(map(same, merge_many(folders, own, backend="torch"), want))


@pytest.mark.parametrize("options", [{"space": "knots"}, {"space": "core"}, {"balance": "pico"}], ids=str)
def test_thresholds_of_the_model_are_those_of_its_adapters(tmp_path, options):
    """Where task tensors depend on all adapters, one more changes thresholds in modules that it does not have."""
    folders = uneven(tmp_path)[::-1]
    recipe = {"scope": "model", "density": 0.2, **options}
    grid = [recipe, {**recipe, "adapters": [0, 1]}]
    want = [alone(folders, recipe, backend="torch") for recipe in grid]
    one, other = (result.modules["layers.1.q"] for result in want)
    assert not torch.equal(one.B @ one.A, other.B @ other.A)
    with Session(folders, backend="torch") as session:
        assert all(same(session.merge(**recipe), each) for recipe, each in zip(grid, want, strict=True))
    assert all(map(same, merge_many(folders, grid, backend="torch"), want))


def test_an_adapter_twice(zoo):
    grid = [{"space": "core", "adapters": [0, 0], "weights": w, "density": 0.3} for w in ([1.0, 2.0], [2.0, 1.0])]
    grid += [{"method": "tsv", "adapters": [0, 0, 1], "weights": W[0]}]
    want = [alone(zoo, recipe, backend="torch") for recipe in grid]
    with Session(zoo, backend="torch") as session:
        assert all(same(session.merge(**recipe), each) for recipe, each in zip(grid, want, strict=True))


def bytes_held(value, seen):
    """Bytes of all tensors that a value holds, each storage once."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        new = storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        return storage.nbytes() if new else 0
    if isinstance(value, (tuple, list)):
        return sum(bytes_held(each, seen) for each in value)
    if isinstance(value, dict):
        return sum(bytes_held(each, seen) for each in value.values())
    return bytes_held(vars(value), seen) if hasattr(value, "__dict__") and "merge_engine" in str(type(value)) else 0


def test_what_is_kept_is_no_larger_than_the_cache_says(zoo):
    """Cores and spaces grow as they are asked: what they say of themselves is what they come to at most."""
    with Session(zoo, backend="torch") as session:
        for recipe in GRID:
            session.merge(**recipe)
        cache = session._pool.cache
        kinds = {key[0] for key in cache._entries}
        assert {"stack", "cores", "joined", "factors", "result"} <= kinds
        for key, (value, nbytes, _) in cache._entries.items():
            if key[0] in ("stack", "cores", "joined", "space", "result"):
                assert bytes_held(value, set()) <= nbytes, key[0]
        seen = set()
        assert sum(bytes_held(value, seen) for value, _, _ in cache._entries.values()) <= cache.held


def test_budgets_know_of_joined_modules(zoo):
    """What a module takes while it is joined is not left for others."""
    pool, backend = Pool(zoo, "4GB"), choose("torch")
    for recipe in ({"space": "knots"}, {"space": "core"}, {"balance": "pico"}, {"space": "knots", "balance": "pico"}):
        plan = pool.bind(recipe)
        for module in plan.modules:
            assert plan.joint.module(module.name).nbytes <= joined_bytes(plan, module)
        share = room([plan], backend, 1 << 30, in_memory=False)
        assert share.cache + OWN + 5 * max(joined_bytes(plan, module) for module in plan.modules) <= 1 << 30
    for recipe in ({}, {"method": "tsv"}, {"method": "linear", "space": "knots"}):
        assert joined_bytes(pool.bind(recipe), plan.modules[0]) == 0


def test_too_small_a_budget_is_refused(tmp_path):
    folders = [save_adapter(tmp_path / str(seed), seed, {"q": (2000, 3000)}, rank=64) for seed in range(4)]
    for recipe in ({"method": "tsv"}, {"space": "knots"}, {"space": "core", "balance": "pico"}):
        with pytest.raises(
            RecipeError, match=r"^memory: wanted at least \d+\.\d\d [MG]B for this merge, got 580\.00 MB$"
        ):
            merge_many(folders, [recipe], memory="0.58GB")
