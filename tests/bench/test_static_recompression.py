"""What is assumed of the cut to a rank on a GPU, against what torch counts when the same code runs here."""

from collections.abc import Callable

import pytest
import torch
from operators import Operators
from torch.utils.flop_counter import FlopCounterMode

from bench.static import recompression
from bench.static.gpus import GPUS, Gpu
from bench.static.recompression import of_matrix, of_sum, seconds
from merge_engine.lowrank.batched import cut_matrices
from merge_engine.lowrank.batched_stack import Stacks


def counted(run: Callable[[], object]) -> tuple[int, int]:
    """(flops of products, operators). Triangular solves have none in torch's table."""
    with FlopCounterMode(display=False) as flops, Operators() as operators:
        run()
    return flops.get_total_flops(), operators.total


def solved(p: int, n: int, times: int) -> int:
    """Flops of so many `orthonormal_rows` of [p, n] that are triangular solves."""
    return times * 3 * p * p * n


def test_the_iteration_takes_what_is_counted() -> None:
    """Noise takes all steps. The first ones are for left and right vectors of which one solve each is left out."""
    m, n, rank = 300, 360, 20
    width = 2 * rank + 24
    matrices, start = torch.randn(2, m, n), torch.randn(2, 20, n)
    flops, operators = counted(lambda: cut_matrices(matrices, start, rank))
    solves = solved(width, m, 4) + solved(width, n, 6) + width * width * (m + n)
    assert flops == 2 * (of_matrix(m, n, rank).flops - solves)
    assert operators <= recompression.OPERATORS


@pytest.mark.parametrize("shape", [(100, 360), (360, 100)])
def test_the_gram_matrix_takes_what_is_counted(shape: tuple[int, int]) -> None:
    matrices, start = torch.randn(2, *shape), torch.randn(2, 20, shape[1])
    flops, operators = counted(lambda: cut_matrices(matrices, start, 40))
    work = of_matrix(*shape, 40)
    assert flops == 2 * (work.flops - solved(40, 360, 1)) and work.eigen == 100
    assert operators <= recompression.OPERATORS


def test_sums_take_what_is_counted() -> None:
    m, n, ranks, modules = 200, 300, 48, 3
    rows, columns = torch.randn(modules, ranks, n), torch.randn(modules, ranks, m)

    def run() -> None:
        Stacks(rows, columns, [16] * 3).cut([[1.0, 0.5, 2.0]] * modules, 32)

    run()  # identities are made once
    flops, operators = counted(run)
    solves = solved(ranks, m, 1) + solved(ranks, n, 1)
    cores = 2 * ranks**3  # on the host
    leading = flops - modules * (of_sum(m, n, ranks, 32).flops - solves)
    assert 0 <= leading <= modules * 4 * cores
    assert operators <= recompression.SUM_OPERATORS + modules * recompression.SUM_OPERATORS_A_MODULE


def test_seconds_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu("", GPUS["sm_90"].target, 1, 1.0, 1, tensor=1.0, bandwidth=1e12, float64=1e12)
    work = of_matrix(4096, 4096, 48)
    assert work.flops / 1e12 > work.nbytes / 1e12 and work.eigen == 0
    monkeypatch.setattr(recompression, "PART_BYTES", 2 * 8 * work.numbers)
    found = seconds(gpu, 4096, 4096, 5, 48, 48, summed=False)
    copied = 4 * 48 * 8192 / recompression.LINK
    assert found.device == pytest.approx(5 * (work.flops / 1e12 + copied) + 3 * 350 * 5e-6)
    assert found.host == pytest.approx(5 * (2 * 1.7e-9 * 120**3 + 2 * 48**2 * 8192 / 1e10))
    narrow = seconds(gpu, 64, 4096, 1, 48, 48, summed=False)
    assert narrow.device > 64 * 8 * 5e-6
