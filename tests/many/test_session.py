"""A session: the bits of single merges, whatever it keeps, and what each merge costs."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from grids import GRID, OWNED, W, alone, bits, counting, identical

from merge_engine.engine import cpu_backend as engine_cpu_backend
from merge_engine.engine import cpu_thresholds as engine_cpu_keeps
from merge_engine.engine import cut as engine_cut
from merge_engine.engine import plan as engine_plan
from merge_engine.engine.merge import merge
from merge_engine.errors import OutputError, RecipeError
from merge_engine.many import merge_many as many_merge_many
from merge_engine.many import pool as many_pool
from merge_engine.many.budget import Room
from merge_engine.many.merge_many import merge_many
from merge_engine.many.session import Session


@pytest.mark.quick
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
            with pytest.raises(RecipeError, match=r"^scale: .* overflows float32$"):
                session.merge(**recipe, scale=scale)
        assert identical(session.merge(**recipe), plain)


def test_a_session_pays_for_what_changed(folders, monkeypatch):
    sweeps = counting(monkeypatch, engine_cpu_keeps, "trims_of_each")
    merges = counting(monkeypatch, engine_cpu_backend, "merge_several")
    stacks = counting(monkeypatch, engine_cut, "Stack")
    reads = counting(monkeypatch, many_pool, "_bytes_of")
    spaces = counting(monkeypatch, engine_cut, "first_space")
    with Session(folders, backend="torch") as session:

        def merged(**recipe):
            for calls in (sweeps, stacks, merges, reads, spaces):
                calls.clear()
            got = session.merge(**recipe)
            searched = sum(len(ks) for _, wanted, _ in sweeps for ks in wanted)
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
        with pytest.raises(OutputError, match=r"^output: wanted the path to write to, got a dict; "):
            session.merge({"method": "linear"})
        with pytest.raises(OutputError, match="already exists"):
            session.merge(tmp_path / "ours", **recipe)
        session.merge(tmp_path / "ours", overwrite=True, **recipe)
        with pytest.raises(RecipeError, match=r"^scale: 1e\+38 times "):
            session.merge(tmp_path / "huge", scale=1e38, **recipe)
        assert {path.name for path in tmp_path.iterdir()} == {"ours", "alone"}
    with pytest.raises(RecipeError, match=r"^session: wanted an open one, got one that is closed$"):
        session.merge(**recipe)


def test_a_result_is_kept_when_it_is_made(alike):
    """So that another scale of the same weights does not make a sum of factors again."""
    with Session(alike, backend="torch") as session:
        kept = session._pool.cache._entries.keys()
        for _ in range(3):
            assert identical(session.merge(method="linear"), merge(alike, method="linear", backend="torch"))
            sums = [key for key in kept if key[0] == "result"]
            assert len(sums) == len(set(sums)) > 0
        session.merge(method="ties", density=0.3)
        assert len([key for key in kept if key[0] == "result"]) == 2 * len(sums)
        for weights in ([1, 2, 3], [3, 2, 1], [2, 2, 1]):
            session.merge(method="linear", weights=weights)
        results = [key for key in kept if key[0] == "result"]
        assert len(results) == 3 * len(sums)  # those of ties, and of the last two sums
        assert not set(results) & set(sums)


def test_norms_of_adapters_are_computed_once(alike, monkeypatch):
    """Of every adapter and module, for scale="auto" with any method and weights."""
    asked, original = [], engine_plan.product_norm
    monkeypatch.setattr(engine_plan, "product_norm", lambda A, B: asked.append(1) or original(A, B))
    with Session(alike, backend="torch") as session:
        for method in ("linear", "tsv", "actmat"):
            for weights in ([1, 2, 3], [3, 1, 1]):
                session.merge(method=method, weights=weights, scale="auto")
        assert len(asked) == sum(len(module.adapters) for module in session._pool.bind({}).modules)


def test_a_short_text_of_a_session(alike):
    with Session(alike) as session:
        assert repr(session).startswith(f"Session({len(alike)} adapters: a, b, ") and "; cache 0 bytes of " in repr(
            session
        )
    assert repr(session) == "Session(closed)"
