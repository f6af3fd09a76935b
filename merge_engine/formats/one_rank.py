"""One rank for all modules of a file: ``[B 0] @ [A; 0] = B @ A``.

Servers read one rank for a whole adapter, and many of them refuse one whose modules differ. So smaller modules get rows
of zeros below A and columns of zeros right of B. The ranks are known only when the last module is merged; a file in
which they differ is written a second time then, tensor by tensor.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from merge_engine.files.safetensors_writer import SafetensorsWriter
from merge_engine.files.text import replaced
from merge_engine.files.weights import open_safetensors


class RankAxis(NamedTuple):
    """Where a factor has its rank: the dimension ``axis`` is ``[before, rank, after]``, flattened.

    before = after = 1 but where one tensor holds the factors of several deltas: ``A [E r, N]`` with E blocks of rows is
    RankAxis(0, before=E), and ``B [M, r E]``, whose columns of one delta are E apart, RankAxis(1, after=E).
    """

    axis: int
    before: int = 1
    after: int = 1

    def rank_of(self, shape: tuple[int, ...]) -> int:
        """The rank of a factor of this shape."""
        return shape[self.axis] // (self.before * self.after)


ROWS, COLUMNS = RankAxis(0), RankAxis(1)  # of A [r, N] and of B [M, r]


def padded(factor: Tensor, where: RankAxis, rank: int) -> Tensor:
    """The factor with zeros up to ``rank``, in its own dtype; itself where it has that rank.

    Raises ValueError where its rank is larger.
    """
    own = where.rank_of(tuple(factor.shape))
    if own == rank:
        return factor
    if own > rank:
        raise ValueError(f"a factor {list(factor.shape)} has rank {own}, wanted at most {rank}")
    left, right = factor.shape[: where.axis], factor.shape[where.axis + 1 :]
    wide = factor.new_zeros(math.prod(left), where.before, rank, where.after, math.prod(right))
    wide[:, :, :own] = factor.reshape(math.prod(left), where.before, own, where.after, math.prod(right))
    return wide.reshape(*left, where.before * rank * where.after, *right)


def to_one_rank(file: Path, axes: Mapping[str, RankAxis], metadata: Mapping[str, str] | None = None) -> int:
    """Give every factor in a .safetensors file the largest of their ranks; returns that rank.

    axes: where the tensors that are factors have their rank, by key. The other tensors stay as they are, and the order
    of all. metadata: of the header, as in `SafetensorsWriter`. The file is left alone where the ranks are one already;
    else the new one takes its place when it is complete, and until then both are on the disk.

    Raises OutputError where the disk is full, or the file cannot be written.
    """
    stored = open_safetensors(file, file.name)
    ranks = {key: where.rank_of(stored[key].shape) for key, where in axes.items()}
    rank = max(ranks.values())
    if all(own == rank for own in ranks.values()):
        return rank
    with replaced(file) as partial, SafetensorsWriter(partial, stored, metadata) as writer:
        for key, tensor in sorted(stored.items(), key=lambda item: item[1].offset):
            values = tensor.read()
            writer.add(key, padded(values, axes[key], rank) if key in axes else values)
    return rank
