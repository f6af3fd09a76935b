"""The tiles of a tensor."""

import pytest
import torch

from merge_engine.cpu.tile_grid import TILE_ELEMENTS, tiles_of


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(1, 1), (1, 977), (977, 1), (127, 131), (64, 2048), (3, 70001), (70001, 2)])
def test_every_shape_is_covered_once(shape):
    seen = torch.zeros(shape, dtype=torch.int32)
    for tile in tiles_of(*shape):
        seen[tile.top : tile.bottom, tile.left : tile.right] += 1
        height, width = tile.shape
        assert height * width <= TILE_ELEMENTS
    assert (seen == 1).all()
