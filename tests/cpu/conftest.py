"""Fixtures of the CPU backend's tests."""

import pytest

from merge_engine.cpu import tile_grid as cpu_tile


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles in both directions, for tensors of test size."""
    monkeypatch.setattr(cpu_tile, "TILE_ROWS", 8)
    monkeypatch.setattr(cpu_tile, "TILE_ELEMENTS", 128)
