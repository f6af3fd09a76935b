"""Adapters that are merged by many recipes."""

import pytest
import torch
from grids import GRID, alone, save_adapter


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Three adapters: different ranks and dtypes, a module that one lacks, and one large enough to be sampled."""
    root = tmp_path_factory.mktemp("adapters")
    shapes = {"0.q": (24, 40), "0.up": (72, 24), "1.q": (257, 263)}
    return [
        save_adapter(root / "sql", 1, shapes),
        save_adapter(root / "chat", 2, {name: shapes[name] for name in ("0.q", "1.q")}, rank=7, dtype=torch.bfloat16),
        save_adapter(root / "ads", 3, shapes, rank=4, dtype=torch.float16),
    ]


@pytest.fixture(scope="session")
def alike(tmp_path_factory):
    """Three adapters of one rank, whose factors can be merged, too."""
    root = tmp_path_factory.mktemp("alike")
    return [save_adapter(root / name, seed, {"q": (23, 37), "up": (41, 19)}) for seed, name in enumerate("abc")]


@pytest.fixture(scope="session")
def singly(folders):
    """What each recipe of GRID makes by a merge of its own."""
    return [alone(folders, recipe, backend="torch") for recipe in GRID]
