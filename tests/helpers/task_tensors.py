"""Task tensors as whole matrices."""

import torch

from merge_engine.cpu.tile_grid import tiles_of


def whole(source):
    """The task tensor itself, put together from its tiles."""
    full = torch.full((source.rows, source.columns), float("nan"))
    for tile in tiles_of(source.rows, source.columns):
        part = torch.empty(tile.shape)
        source.fill(tile, part)
        full[tile.top : tile.bottom, tile.left : tile.right] = part
    return full
