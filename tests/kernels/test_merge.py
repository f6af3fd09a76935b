"""Merges by the kernels against the textbook, in the interpreter or compiled where there is a GPU."""

import pytest
import torch
from kernel_groups import (
    DENSITY,
    FLOATS,
    SEED,
    U32,
    WEIGHTS,
    check,
    group,
    keep_of,
    kept_tensors,
    mask_of,
    merge_by,
    seen,
    source_of,
)
from merge_engine.kernels.merge import merge_deltas, vote_balance
from merge_engine.kernels.source import Dense, Drop, Keep, Lora, Source, Trim, pack
from merge_engine.kernels.terms import terms_of
from merge_engine.kernels.trims import trims
from torch import Tensor

from merge_engine.rules import reference
from merge_engine.rules.rule import Rule, make_rule

CASES = [
    ("linear", "total"),
    ("magnitude_prune", "total"),
    ("ties", "total"),
    ("ties", "frequency"),
    ("dare_linear", "total"),
    ("dare_ties", "total"),
    ("dare_ties", "frequency"),
]


_prepared: dict[tuple, tuple[Source, Keep, Tensor]] = {}


def prepared(rule: Rule, kind: str, dtype: torch.dtype, device: torch.device) -> tuple[Source, Keep, Tensor]:
    """The source, the rule's keep, and keep(t) by the textbook; made once for all rules that keep the same."""
    trims = rule.keep == "magnitude" and (rule.trim_ties, rule.kept(DENSITY, 37 * 70))
    key = (kind, dtype, rule.keep, trims, rule.keep == "bernoulli" and rule.l1_rescale)
    if key not in _prepared:
        source = source_of(kind, dtype, device)
        keep = keep_of(rule, source, device)
        _prepared[key] = source, keep, kept_tensors(rule, source, keep)
    return _prepared[key]


@pytest.mark.parametrize("kind", ["lora", "dense", "factors"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("method", "election", "convention"),
    [
        (method, election, convention)
        for method, election in CASES
        for convention in ("peft", "mergekit", "paper")
        if convention != "paper" or make_rule(method).keep == "magnitude"  # else the paper's rule is PEFT's
    ],
)
def test_merge_equals_the_textbook(
    method: str, election: str, convention: str, dtype: torch.dtype, kind: str, device: torch.device
) -> None:
    rule = make_rule(method, election=election, convention=convention, scope="tensor")
    source, keep, kept = prepared(rule, kind, dtype, device)
    out = merge_by(rule, source, WEIGHTS, keep, dtype, scale=0.7)
    check(out, kept, WEIGHTS, rule, scale=0.7)


SHAPES = [(1, 1), (1, 67), (67, 1), (61, 53), (64, 64), (65, 130), (0, 5), (5, 0)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_shapes(shape: tuple[int, int], method: str, device: torch.device) -> None:
    rule = make_rule(method)
    source = group(shape, device=device)
    keep = keep_of(rule, source, device)
    out = merge_by(rule, source, WEIGHTS, keep, torch.float32)
    assert out.shape == (1, *shape)
    if out.numel():
        check(out, kept_tensors(rule, source, keep), WEIGHTS, rule)


def test_adapters_of_many_numbers(device: torch.device) -> None:
    rule = make_rule("ties", election="frequency")
    weights = [(-1) ** i * (0.1 + i) for i in range(33)]
    source = group((17, 19), ranks=[4] * 33, device=device)
    keep = keep_of(rule, source, device)
    out = merge_by(rule, source, weights, keep, torch.float32)
    check(out, kept_tensors(rule, source, keep), weights, rule)


@pytest.mark.parametrize("weights", [[1.0] * 3, [0.3] * 3, [-2.0] * 3, [0.0, 1.0, 2.0]], ids=str)
@pytest.mark.parametrize("convention", ["peft", "mergekit"])
@pytest.mark.parametrize("election", ["total", "frequency"])
def test_equal_negative_and_zero_weights(
    election: str, convention: str, weights: list[float], device: torch.device
) -> None:
    rule = make_rule("ties", election=election, convention=convention)
    source = group(device=device)
    keep = keep_of(rule, source, device)
    check(merge_by(rule, source, weights, keep, torch.float32), kept_tensors(rule, source, keep), weights, rule)


@pytest.mark.parametrize("weight", [0.3, 0.7001])
def test_equal_weights_cancel_in_a_mean_by_weight(weight: float, device: torch.device) -> None:
    """To the last bit: nothing is multiplied by them, and no sum of them is divided by."""
    source = group(device=device)
    how = {"elect": "total", "divisor": "weight", "vote_weighted": True}
    assert torch.equal(merge_deltas(source, [[weight] * 3], **how), merge_deltas(source, [[1.0] * 3], **how))


@pytest.mark.quick
@pytest.mark.parametrize("tied", [1, -1])
def test_a_tied_vote_elects_the_side_it_is_told_to(tied: int, device: torch.device) -> None:
    x = torch.tensor([0.3, -0.3]).view(1, 2, 1, 1).expand(1, 2, 3, 5).contiguous().to(device)
    for election in ("total", "frequency"):
        rule = make_rule("ties", election=election)
        out = merge_by(rule, Dense(x), [1.0, 1.0], None, torch.float32, tied=tied)
        assert bool((out == tied * x[0, 0, 0, 0]).all())


@pytest.mark.quick
@pytest.mark.parametrize("scaling", [1.0, 0.3])
def test_opposite_deltas_tie(scaling: float, device: torch.device) -> None:
    """A fused multiply-add would leave the rounding of a product, whose sign is noise, where the vote is 0."""
    lora = group(ranks=(8, 8), device=device)
    lora = Lora(
        lora.A[:, :1].repeat(1, 2, 1, 1),
        lora.B[:, :1] * torch.tensor([1.0, -1.0]).to(device)[:, None, None],
        torch.full((1, 2), scaling, device=device),
    )
    out = merge_by(make_rule("ties"), lora, [1.0, 1.0], None, torch.float32)
    assert torch.equal(out, seen(lora)[:, 0].abs())


@pytest.mark.parametrize("density", [1e-12, 0.1, 0.5, 1.0])
def test_masks_are_those_of_the_host(density: float, device: torch.device) -> None:
    source = Dense(torch.ones(2, 3, 7, 133, device=device))
    drop = Drop(
        torch.full((2, 2, 3), density, dtype=torch.float64),
        [SEED, 2**64 - 1],
        torch.tensor([0, 2**32 - 1]),
        torch.tensor([2**31, 5, 0]),
        factor=torch.ones(2, 2, 3),
    )
    out = merge_deltas(source, [[1.0, 2.0, 4.0]] * 2, drop).cpu()  # a bit for each adapter
    for recipe in range(2):
        for module in range(2):
            masks = [mask_of(drop, module, adapter, 7, 133, recipe) for adapter in range(3)]
            assert torch.equal(out[recipe, module], masks[0] + 2.0 * masks[1] + 4.0 * masks[2])


def test_a_density_that_keeps_no_word_keeps_nothing(device: torch.device) -> None:
    """Random words are 32 bits wide: a density of up to 2**-33 keeps none of their values."""
    densities = [2.0**-34, 2.0**-33, 2.0**-32, 0.5]
    source = Dense(torch.ones(1, 4, 3, 5, device=device))
    density = torch.tensor(densities, dtype=torch.float64).view(1, 1, 4)
    drop = Drop(density, [SEED], torch.tensor([0]), torch.arange(4))
    terms = terms_of(source, drop, torch.ones(1, 4, device=device))
    gains = terms[0, 0, :, 0].cpu().view(torch.float32).tolist()
    assert gains == [0.0 if round(each * 2.0**32) == 0 else 1 / each for each in densities]


def test_several_recipes_are_what_each_is_alone(device: torch.device) -> None:
    source = group((17, 23), modules=2, device=device)
    kept = torch.tensor([45, 150, 300])[:, None, None].expand(3, 2, 3)
    trim = trims(source, kept)
    weights = [[1.0, 1.0, 1.0], [0.2, -0.4, 1.0], [2.0, 2.0, 2.0]]
    scale, tied = [1.0, 0.5, 2.0], [1, -1, 1]
    together = merge_deltas(source, weights, trim, elect="total", divisor="count", scale=scale, tied=tied)
    for i in range(3):
        alone = Trim(trim.value[i : i + 1], trim.row[i : i + 1], trim.column[i : i + 1])
        # Not bit for bit: weights that are equal in every recipe take another road. Unequal ones are made so.
        out = merge_deltas(source, [weights[i]], alone, elect="total", divisor="count", scale=scale[i], tied=tied[i])
        torch.testing.assert_close(together[i], out[0], rtol=16 * U32, atol=16 * U32)
        assert torch.equal(trims(source, kept[i : i + 1]).value, alone.value)


def test_an_untrained_adapter_changes_nothing(device: torch.device) -> None:
    """B starts at 0: whatever its A and its weight, it neither votes nor counts, in its place between the others."""
    lora = group(device=device)
    pairs = [(lora.A[0, i, :8].cpu(), lora.B[0, i, :, :8].cpu()) for i in range(3)]
    scaling = lora.scaling[0].tolist()
    untrained = (torch.randn(8, 70, generator=torch.Generator().manual_seed(1)), torch.zeros(37, 8))
    without = pack([pairs], [scaling], device=device)
    among = pack([[pairs[0], untrained, *pairs[1:]]], [[scaling[0], 1.0, *scaling[1:]]], device=device)
    for election, convention in (("total", "peft"), ("frequency", "peft"), ("total", "mergekit")):
        rule = make_rule("ties", election=election, convention=convention)
        want = merge_by(rule, without, WEIGHTS, keep_of(rule, without, device), torch.float32)
        weights = [WEIGHTS[0], 9.0, *WEIGHTS[1:]]
        assert torch.equal(merge_by(rule, among, weights, keep_of(rule, among, device), torch.float32), want)


def test_all_zero_factors_give_zeros(device: torch.device) -> None:
    lora = group(device=device)
    lora.B.zero_()
    for method in ("ties", "dare_ties"):
        rule = make_rule(method)
        out = merge_by(rule, lora, WEIGHTS, keep_of(rule, lora, device), torch.float32)
        assert bool((out == 0).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_base_is_added_in_the_same_pass(method: str, dtype: torch.dtype, device: torch.device) -> None:
    rule = make_rule(method)
    source = group(modules=2, device=device)
    keep = keep_of(rule, source, device)
    base = torch.randn(2, 37, 70, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    out = merge_by(rule, source, WEIGHTS, keep, dtype, base=base, scale=0.3)
    check(out, kept_tensors(rule, source, keep), WEIGHTS, rule, scale=0.3, base=base)


@pytest.mark.parametrize("election", ["total", "frequency"])
@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_vote_balance(method: str, election: str, device: torch.device) -> None:
    rule = make_rule(method, election=election, convention="paper", scope="tensor")
    source = group(modules=2, device=device)
    keep = keep_of(rule, source, device)
    kept = kept_tensors(rule, source, keep)
    want = sum(int(reference.vote(list(t.float()), WEIGHTS, rule).sign().sum()) for t in kept)
    total = torch.full((1,), 1000, device=device)
    vote_balance(source, [WEIGHTS], keep, elect=election, out=total)
    assert int(total) == want + 1000
