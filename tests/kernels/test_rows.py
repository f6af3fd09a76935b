"""Kernels of rows beyond PEFT's: bands, the largest and consensus, in the interpreter or compiled where there is a GPU.

What is kept is checked to the bit on the task tensors that the kernels themselves see, and what is made of it against
float64, within what rounding may change.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from kernel_groups import FLOATS, SMALLEST, U32, U_OUT, WEIGHTS, group, only, seen, source_of
from merge_engine.kernels.launch import launch_for
from merge_engine.kernels.merge import merge_deltas
from merge_engine.kernels.source import Band, Dense, Lora, Source
from merge_engine.kernels.trims import bands
from torch import Tensor

from merge_engine.rules import reference

NUMEL = 141 * 70
BANDS = [
    (0, 4000),
    (1, 200),
    (200, 1),
    (2000, 0),
    (2000, 4321),  # both cuts in tied rows, mostly of other tiles
    (2000, 30),  # and of one row
    (NUMEL - 5, 5),  # only zeros are left to keep
    (0, NUMEL),
]


def counts(number: int, adapters: int) -> Tensor:
    return torch.full((1, 1, adapters), number)


def assert_kept(source: Source, top: int, k: int, ties: str) -> None:
    for adapter in range(source.shape[1]):
        one = only(source, adapter)
        got = merge_deltas(one, [[1.0]], bands(one, counts(k, 1), counts(top, 1), ties=ties))[0, 0]
        want = reference.band(seen(one)[0, 0].cpu(), top, k, ties)
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("ties", ["exact", "keep"])
@pytest.mark.parametrize(("top", "k"), BANDS)
def test_a_band_of_equal_magnitudes_is_that_of_the_textbook(top: int, k: int, ties: str, device: torch.device) -> None:
    """Small integers: nearly every magnitude is tied, over several tiles."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-2, 3, (1, 2, 141, 70), generator=generator).float().to(device)
    assert_kept(Dense(x), top, k, ties)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["lora", "dense", "factors"])
def test_a_band_is_that_of_the_textbook(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    source = source_of(kind, dtype, device)
    numel = source.shape[2] * source.shape[3]
    assert_kept(source, numel // 50, numel // 3, "exact")


def weighted(source: Source, weights: list[float]) -> Tensor:
    """w_i t_i in float64, of the task tensors as a kernel sees them: [modules, adapters, M, N]."""
    return torch.tensor(weights, dtype=torch.float64)[:, None, None] * seen(source).cpu().double()


def assert_near(out: Tensor, want: Tensor, sizes: Tensor, sure: Tensor) -> None:
    """sizes: of the terms, which are rounded in the weighting, in at most all sums, and in the scale and the base."""
    bound = (sizes + want.abs()) * 8 * U32 + U_OUT[out.dtype] * want.abs() + SMALLEST[out.dtype]
    assert float(sure.float().mean()) > 0.98
    wrong = ~((out.cpu().double() - want).abs() <= bound) & sure  # NaN is wrong
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()}, worst {(out.cpu().double() - want)[wrong]}"


@pytest.mark.parametrize("weights", [WEIGHTS, [0.3] * 3, [-2.0] * 3, [0.0, 1.0, 2.0]], ids=str)
@pytest.mark.parametrize("election", ["total", "frequency"])
@pytest.mark.parametrize("kind", ["lora", "dense"])
def test_the_largest_is_that_of_the_textbook(
    kind: str, election: str, weights: list[float], device: torch.device
) -> None:
    source = source_of(kind, torch.bfloat16, device)
    base = torch.randn(source.shape[0], *source.shape[2:], generator=torch.Generator().manual_seed(1)).to(device)
    ballots = weighted(source, weights)
    votes = (ballots.sign() if election == "frequency" else ballots).sum(1)
    doubt = 0.0 if election == "frequency" else 5 * U32 * ballots.abs().sum(1)  # of the weights and the sums
    for tied, scale in ((1, 0.7), (-1, -1.5)):
        positive = votes > 0 if tied < 0 else votes >= 0
        side = torch.where(positive, ballots.clamp_min(0).amax(1), ballots.clamp_max(0).amin(1))
        out = merge_deltas(
            source,
            [weights],
            elect=election,
            combine="max",
            vote_weighted=True,
            scale=scale,
            tied=tied,
            base=base,
        )[0]
        sure = (votes.abs() > doubt) | (ballots.abs().sum(1) == 0) | (election == "frequency")
        assert_near(out, scale * side + base.cpu().double(), side.abs() + base.cpu().abs(), sure)


@pytest.mark.parametrize("weights", [WEIGHTS, [0.3] * 3, [-2.0] * 3, [0.0, 1.0, 2.0]], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["lora", "dense", "factors"])
def test_a_consensus_is_that_of_the_textbook(
    kind: str, dtype: torch.dtype, weights: list[float], device: torch.device
) -> None:
    source = source_of(kind, dtype, device)
    terms = weighted(source, weights)
    total, sizes = terms.sum(1), terms.abs().sum(1)
    for mask, least in ((0.4, 2), (0.4, 1), (1.5, 1), (0.1, 3), (0.4, 0), (0.4, 4)):
        rest = mask * (total[:, None] - terms).abs()
        error = 8 * U32 * (1 + mask) * sizes[:, None]  # of a term, of three sums, a difference and a product
        fewest, most = ((terms.abs() > rest + shift).sum(1) >= least for shift in (error, -error))
        passes = (terms.abs() > rest).sum(1) >= least
        # Zeros pass nowhere, and their error is 0.
        sure = (fewest == most) | (sizes == 0)
        out = merge_deltas(source, [weights], combine="consensus", mask=mask, min_tasks=least, scale=0.7)[0]
        assert_near(out, 0.7 * torch.where(passes, total, 0.0), sizes, sure)


def whole(device: torch.device) -> Lora:
    """Products of small whole numbers, which no tile shape changes."""
    lora = group(device=device)
    return Lora((2 * lora.A).round(), (2 * lora.B).round(), torch.ones_like(lora.scaling))


def test_several_recipes_are_what_each_is_alone(device: torch.device) -> None:
    """Two at once in a program, and a consensus makes each product a second time for both."""
    source, weights = whole(device), [WEIGHTS, [0.25, -2.0, 1.0]]
    for how in (
        {"combine": "consensus", "mask": [0.5, 0.25], "min_tasks": [2, 1], "scale": [1.0, 0.5]},
        {"combine": "max", "elect": "total", "vote_weighted": True, "tied": [1, -1]},
    ):
        together = merge_deltas(source, weights, **how)
        for i in range(2):
            own = {name: value[i] if isinstance(value, list) else value for name, value in how.items()}
            alone = merge_deltas(source, [weights[i]], **own)[0]
            assert bool(alone.any()) and torch.equal(together[i], alone), how
    kept, topped = torch.tensor([[[300] * 3], [[900] * 3]]), torch.tensor([[[40] * 3], [[5] * 3]])
    both = bands(source, kept, topped)
    together = merge_deltas(source, weights, both)
    for i in range(2):
        alone = merge_deltas(source, [weights[i]], bands(source, kept[i : i + 1], topped[i : i + 1]))[0]
        assert bool(alone.any()) and torch.equal(together[i], alone)


@pytest.mark.parametrize("arch", ["cpu", "sm_80", "sm_100", "gfx942"])
def test_a_band_is_merged_by_the_tiles_that_found_it(arch: str) -> None:
    for dtype in FLOATS:
        for rank, recipes in product((0, 16, 64, 128), (1, 2)):
            found, merged = (
                launch_for(99, 99, rank, dtype, arch, recipes=recipes, band=band) for band in (False, True)
            )
            assert replace(merged, max_registers=found.max_registers) == found


def test_errors_say_what_was_wanted(device: torch.device) -> None:
    lora = group(device=device)
    with pytest.raises(ValueError, match="combine is 'most', wanted one of sum, max, consensus"):
        merge_deltas(lora, [WEIGHTS], combine="most")
    for elect, is_weighted in (("none", True), ("total", False)):
        with pytest.raises(ValueError, match="wanted a weighted vote for the largest"):
            merge_deltas(lora, [WEIGHTS], combine="max", elect=elect, vote_weighted=is_weighted)
    with pytest.raises(ValueError, match="elect is 'total', wanted 'none' for a consensus"):
        merge_deltas(lora, [WEIGHTS], combine="consensus", elect="total")
    with pytest.raises(ValueError, match="divisor is 'count', wanted 'one' with 'max'"):
        merge_deltas(lora, [WEIGHTS], combine="max", elect="total", vote_weighted=True, divisor="count")
    with pytest.raises(ValueError, match="mask has 3 numbers"):
        merge_deltas(lora, [WEIGHTS], combine="consensus", mask=[0.1, 0.2, 0.3])
    found = bands(lora, counts(10, 3), counts(2, 3))
    with pytest.raises(ValueError, match=r"trim value is \[1, 1, 3\], wanted \[2, 1, 3\]"):
        merge_deltas(lora, [WEIGHTS] * 2, Band(found.wide, found.top))
