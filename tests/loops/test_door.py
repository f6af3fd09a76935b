"""When the loops are loaded: sooner, later or never, a merge has the same bits."""

import os
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from grids import GRID, save_adapter

import merge_engine
from merge_engine.loops import door
from merge_engine.lowrank import products
from merge_engine.rules.conventions import CONVENTIONS
from merge_engine.rules.methods import METHODS, looks_at

kept = pytest.importorskip("merge_engine.loops.kept", exc_type=ImportError)
ROOT = Path(__file__).parents[2]
SHAPES = {"layers.0.q_proj": (48, 40), "layers.1.up_proj": (300, 270)}
assert 48 * 40 < products._SMALL < 300 * 270  # the larger one is cut by loops in any case
CASES = [case for case in product(METHODS, CONVENTIONS) if METHODS[case[0]].kind == "elementwise"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Ranks that are no multiple of 8, and one that is more; two dtypes."""
    folder, kinds = tmp_path_factory.mktemp("adapters"), [("sql", 4, torch.float32), ("chat", 11, torch.bfloat16)]
    kinds.append(("ads", 4, torch.float16))
    return [save_adapter(folder / name, i, SHAPES, rank, dtype) for i, (name, rank, dtype) in enumerate(kinds)]


def both(compute):
    """What it gives with the loops, and before they are loaded."""
    assert door.load()
    loaded = compute()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(door, "loops", lambda work=0: None)
        return loaded, compute()


def same(one, other):
    assert one.keys() == other.keys()
    for name, factors in one.items():
        for a, b in zip(factors[:2], other[name][:2], strict=True):
            assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


@pytest.mark.parametrize(("method", "convention"), CASES, ids=["-".join(case) for case in CASES])
def test_a_merge_has_the_same_bits(method, convention, adapters):
    options = {"weights": [0.9, -0.4, 1.3], "density": 0.3, "gamma": 0.1, "mask": 0.5, "min_tasks": 2, "seed": 3}
    recipe = {name: value for name, value in options.items() if looks_at(method, name)}
    recipe |= {"method": method, "convention": convention}
    same(*both(lambda: merge_engine.merge(adapters, **recipe, rank=6).modules))
    same(*both(lambda: merge_engine.merge(adapters, **recipe, scale="auto").modules))


def test_many_merges_have_the_same_bits(adapters):
    loaded, before = both(lambda: merge_engine.merge_many(adapters, GRID))
    for one, other in zip(loaded, before, strict=True):
        same(one.modules, other.modules)


def test_figures_have_the_same_bits(adapters):
    loaded, before = both(lambda: merge_engine.interference(adapters, density=0.3))
    assert loaded.as_dict() == before.as_dict()


@pytest.fixture
def fresh(monkeypatch):
    """A process that has loaded nothing; what it loads, and a background process that it starts, are noted only."""
    noted = []
    monkeypatch.setattr(door, "_loaded", {})
    monkeypatch.setattr(door, "_seen", 0)
    monkeypatch.setattr(door, "_load", lambda name: door._loaded.setdefault(name, noted.append(name) or name))
    monkeypatch.setattr(kept, "compile_in_background", lambda: noted.append("background") or True)
    return noted


@pytest.mark.quick
@pytest.mark.parametrize("on_disk", [True, False])
def test_loops_are_loaded_where_there_is_enough_to_do(on_disk, fresh, monkeypatch):
    monkeypatch.setattr(kept, "is_kept", lambda name: on_disk)
    assert door.loops() is door.loops(door.LOADING - 1) is None and fresh == []
    if not on_disk:
        assert door.loops(1) is None and fresh == ["background"]
        assert door.loops() is None
        assert door.loops(door.COMPILING) == "tile_loops"
    assert door.loops(1) == door.loops() == "tile_loops"


@pytest.mark.quick
def test_what_a_background_process_has_made_is_used_by_the_next_merge(fresh, monkeypatch):
    made = []
    monkeypatch.setattr(kept, "is_kept", lambda name: bool(made))
    assert door.loops(door.LOADING) is None
    made.append("machine code")
    assert door.loops(1) == "tile_loops"


def test_a_merge_waits_where_no_process_can_be_started(fresh, monkeypatch):
    monkeypatch.setattr(kept, "is_kept", lambda name: False)
    monkeypatch.setattr(kept, "compile_in_background", lambda: False)
    assert door.loops(door.LOADING) == "tile_loops"


@pytest.mark.parametrize("change", ["off", "frozen", "embedded", "no folder"])
def test_no_process_is_started_where_it_is_not_wanted(change, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("started"))
    if change == "off":
        monkeypatch.setenv(kept.SWITCH, "0")
    elif change == "frozen":
        monkeypatch.setattr(sys, "frozen", True, raising=False)
    elif change == "embedded":
        monkeypatch.setattr(sys, "executable", "/usr/bin/uwsgi")
    else:
        monkeypatch.setattr(kept, "FOLDER", None)
    assert kept.compile_in_background.__wrapped__() is False


def test_one_process_compiles_at_a_time(monkeypatch, tmp_path):
    import fcntl

    loads = []
    monkeypatch.setattr(kept, "FOLDER", tmp_path)
    monkeypatch.setattr(door, "load", lambda: loads.append(1))
    monkeypatch.setattr(kept, "limit_itself", lambda: None)
    with open(tmp_path / kept.LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept.compile_now()
        assert loads == []
    kept.compile_now()
    assert loads == [1]


@pytest.mark.slow
def test_a_process_in_the_background_compiles_all(tmp_path):
    """The one that starts it ends at once, and so do its pipes; the other leaves machine code that is taken up."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    environment.pop(kept.SWITCH, None)

    def run(code):
        command = [sys.executable, "-c", f"from merge_engine.loops import door, kept; {code}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.strip()

    assert run("print(kept.compile_in_background(), kept.is_kept('tile_loops'))") == "True False"
    deadline = time.monotonic() + 500
    while len(list(tmp_path.rglob("*.complete"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert run("door.LATE = 0; print(door.loops(door.LOADING) is not None, door.state())") == "True compiled loops"
