"""The pictures of docs/choose.md: python docs/make/pictures.py [FOLDER]

Two adapters of rank 2 in a module of 12 x 12, merged by the functions of `rules.reference` and `lowrank`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from torch import Tensor

from merge_engine.cpu.mask import keep_mask
from merge_engine.lowrank.core_methods import CORE_METHODS
from merge_engine.lowrank.cores import Cores
from merge_engine.lowrank.stack import Stack
from merge_engine.rules import reference
from merge_engine.rules.rule import make_rule

SIDE, RANK, DENSITY = 12, 2, 0.3
Panel = tuple[str, Tensor]


def deltas() -> list[Tensor]:
    """Two deltas [12, 12] of rank 2."""
    generator = torch.Generator().manual_seed(3)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    return [reference.delta(drawn(RANK, SIDE), drawn(SIDE, RANK), 1.0) for _ in range(2)]


def panels() -> dict[str, list[Panel]]:
    """{name of the picture: its panels}, each a title and a matrix."""
    first, second = deltas()
    weights, kept = [1.0, 1.0], int(DENSITY * first.numel())
    ties = make_rule("ties")
    trimmed = [reference.trim(each, kept, "exact") for each in (first, second)]
    mask = keep_mask(DENSITY, rows=range(SIDE), columns=range(SIDE), seed=0, stream=0, adapter=0)
    return {
        "linear": [
            ("delta 1", first),
            ("delta 2", second),
            ("their sum", reference.combine([first, second], weights, make_rule("linear"))),
        ],
        "trim": [("delta 1", first), (f"its largest {DENSITY:.0%}", trimmed[0])],
        "elect": [
            ("delta 1, trimmed", trimmed[0]),
            ("delta 2, trimmed", trimmed[1]),
            ("elected sign", reference.vote(trimmed, weights, ties).sign() * first.abs().max()),
            ("mean of what agrees", reference.combine(trimmed, weights, ties)),
        ],
        "drop": [
            ("delta 1", first),
            (f"a random {DENSITY:.0%}, divided by {DENSITY}", reference.drop_and_rescale(first, mask, DENSITY, False)),
        ],
        "core": directions(first, second),
    }


def directions(first: Tensor, second: Tensor) -> list[Panel]:
    """Cosines between the left directions of two deltas of rank 2, as they are and as tsv adds them up, and its sum."""
    As, Bs = zip(*(_factors(each) for each in (first, second)), strict=True)
    stack = Stack(As, Bs)
    cores = Cores(stack, [1.0, 1.0])
    left, _ = cores.polars([True, True])
    merged = stack.unfold(CORE_METHODS["tsv"](cores, [1.0, 1.0]).core, 2 * RANK)
    vectors = cores.vectors.u
    return [
        ("cosines of directions", (vectors.T @ vectors).float()),
        ("the same after tsv", (left.factor.T @ left.factor).float()),
        ("delta 1 + delta 2", first + second),
        ("merged by tsv", merged.B @ merged.A),
    ]


def _factors(delta: Tensor) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(delta)
    return vh[:RANK], u[:, :RANK] * s[:RANK]


def draw(folder: Path) -> list[Path]:
    """Write one PNG a picture, and return their paths."""
    import matplotlib

    matplotlib.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    return [_drawn(folder / f"{name}.png", found) for name, found in panels().items()]


def _drawn(path: Path, found: Sequence[Panel]) -> Path:
    from matplotlib import pyplot

    figure, row = pyplot.subplots(1, len(found), figsize=(2.3 * len(found), 2.6), layout="constrained")
    for axes, (title, matrix) in zip(numpy.atleast_1d(row), found, strict=True):
        largest = float(matrix.abs().max())
        axes.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest)
        axes.set_title(title, fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    for each in draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "pictures"):
        print(each)
