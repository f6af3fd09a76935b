"""What adapters that are merged often are read and kept for."""

import numpy as np
import pytest
import torch
from grids import GRID, W, alone, counting, identical, save_adapter
from lora_files import STEM

from merge_engine.engine import cut as engine_cut
from merge_engine.engine.merge import merge
from merge_engine.errors import AdapterError
from merge_engine.files.weights import StoredTensor
from merge_engine.loops import door
from merge_engine.many.merge_many import merge_many
from merge_engine.many.session import Session
from merge_engine.runtime.threads import threads

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
    spaces = counting(monkeypatch, engine_cut, "first_space")
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
        monkeypatch.setattr(door, "installed", lambda: False)
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


def test_adapters_are_checked_when_a_session_opens(alike, tmp_path):
    bad = save_adapter(tmp_path / "bad", 0, {"q": (23, 37)})
    file = bad / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-4:] = np.float32("nan").tobytes()
    file.write_bytes(data)
    with pytest.raises(AdapterError, match=r"^bad: tensor .* holds NaN$"):
        Session([*alike, bad])


@pytest.mark.quick
def test_equal_extras_are_compared_once(alike, tmp_path, monkeypatch):
    """Layers that adapters save whole are copied; no merge of a session compares them again."""
    own = []
    for seed in range(2):
        extras = {f"{STEM}head.weight": torch.arange(6.0)}
        more = {"extras": extras, "modules_to_save": ["head"]}
        own.append(save_adapter(tmp_path / f"x{seed}", seed, {"q": (23, 37)}, **more))
    with Session(own) as session:
        compared = counting(monkeypatch, StoredTensor, "same_as")
        assert identical(session.merge(method="linear"), merge(own, method="linear"))
        assert len(compared) == 1  # by the merge alone
