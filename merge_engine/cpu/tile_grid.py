"""Tiles: the fixed rectangles in which everyone looks at a task tensor, so that everyone sees the same bits."""

from collections.abc import Iterator
from typing import NamedTuple

TILE_ROWS = 64
TILE_ELEMENTS = 1 << 19  # 2 MiB of float32 at most: threads hand over seldom, and caches of 2 MiB hold a tile
LEAST_TILES, LEAST_ELEMENTS = 8, 1 << 16  # of a tensor, so that threads end together, and of a tile


class Tile(NamedTuple):
    """Rows [top, bottom) by columns [left, right) of a task tensor."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left


def tiles_of(rows: int, columns: int) -> Iterator[Tile]:
    """The fixed tiles of a [rows, columns] tensor, row-major: a function of its shape alone."""
    if rows == 0 or columns == 0:
        return
    elements = min(TILE_ELEMENTS, max(rows * columns // LEAST_TILES, LEAST_ELEMENTS))
    width = max(1, min(columns, elements // min(rows, TILE_ROWS)))
    height = max(1, min(rows, elements // width))
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield Tile(top, min(top + height, rows), left, min(left + width, columns))


def parts_of(tile: Tile, elements: int) -> Iterator[Tile]:
    """The tile, in parts of at most so many elements, or of one."""
    width = max(1, min(tile.right - tile.left, elements))
    height = max(1, elements // width)
    for top in range(tile.top, tile.bottom, height):
        for left in range(tile.left, tile.right, width):
            yield Tile(top, min(top + height, tile.bottom), left, min(left + width, tile.right))
