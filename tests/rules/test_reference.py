"""The textbook against tensors worked out by hand, and against PEFT's own functions."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_engine.errors import RecipeError
from merge_engine.rules import reference
from merge_engine.rules.methods import METHODS
from merge_engine.rules.rule import CONVENTIONS, make_rule


def merge_one(tensors, weights, density, rule, masks=None, scale=1.0):
    """One module, one density for all adapters."""
    tasks = {"m": dict(enumerate(tensors))}
    masks = {"m": dict(enumerate(masks))} if masks else None
    return reference.merge_model(tasks, weights, {"m": [density] * len(weights)}, rule, masks=masks, scale=scale)["m"]


@pytest.mark.quick
def test_ties_by_hand_peft():
    # k = int(0.5 * 6) = 3 of each. a keeps 5, -4, 3; b keeps -6, 2, 3 (of the equal 2s, positions 1 and 4, the first).
    a = torch.tensor([[5.0, -4.0, 3.0], [1.0, 0.0, -2.0]])
    b = torch.tensor([[-6.0, 2.0, 1.0], [3.0, 2.0, 0.5]])
    # votes: 5-6=-1, -4+2=-2, 3, 3, 0, 0 -> signs -, -, +, +, +, +; means over the agreeing, weighted 2 and 1:
    want = torch.tensor([[1 * -6.0, 2 * -4.0, 2 * 3.0], [1 * 3.0, 0.0, 0.0]])
    assert torch.equal(merge_one([a, b], [2.0, 1.0], 0.5, make_rule("ties")), want)
    # by frequency the first two columns tie (one vote each): + is elected.
    want = torch.tensor([[2 * 5.0, 1 * 2.0, 2 * 3.0], [1 * 3.0, 0.0, 0.0]])
    assert torch.equal(merge_one([a, b], [2.0, 1.0], 0.5, make_rule("ties", election="frequency")), want)


def test_the_mean_divides_by_the_number_that_agree_peft_or_by_their_weights_mergekit():
    tensors = [torch.tensor([4.0, 4.0]), torch.tensor([2.0, -1.0]), torch.tensor([6.0, -1.0])]
    weights = [3.0, 1.0, 1.0]
    assert torch.equal(merge_one(tensors, weights, 1.0, make_rule("ties")), torch.tensor([20 / 3, 12.0]))
    # mergekit: (12 + 2 + 6) / (3 + 1 + 1), and 12 / 3
    assert torch.equal(
        merge_one(tensors, weights, 1.0, make_rule("ties", convention="mergekit")), torch.tensor([4.0, 4.0])
    )


def test_a_consensus_keeps_what_so_many_adapters_account_for():
    # weighted: (4, 6, 1), (4, -1, 1), (1, 0, 1); above half of the rest are the first two, the first, and none
    tensors, weights = [torch.tensor(t) for t in ([2.0, 3.0, 0.5], [4.0, -1.0, 1.0], [1.0, 0.0, 1.0])], [2.0, 1.0, 1.0]
    for least, kept in ((0, [1, 1, 1]), (1, [1, 1, 0]), (2, [1, 0, 0]), (3, [0, 0, 0])):
        rule = make_rule("consensus", mask=0.5, min_tasks=least)
        assert torch.equal(merge_one(tensors, weights, 1.0, rule), torch.tensor([9.0, 5.0, 3.0]) * torch.tensor(kept))


@pytest.mark.quick
def test_mergekit_votes_with_weights():
    tensors, weights = [torch.tensor([1.0]), torch.tensor([-2.0])], [5.0, 1.0]
    assert merge_one(tensors, weights, 1.0, make_rule("ties")).item() == -2.0  # 1 - 2 < 0: the second alone
    assert merge_one(tensors, weights, 1.0, make_rule("ties", convention="mergekit")).item() == 1.0  # 5 - 2 > 0: 5 / 5
    # a negative weight turns its tensor round before the vote: -4 and -1 agree, their weights sum to -2 + 1 = -1
    tensors, weights = [torch.tensor([2.0]), torch.tensor([-1.0])], [-2.0, 1.0]
    assert merge_one(tensors, weights, 1.0, make_rule("ties", convention="mergekit")).item() == 5.0


def test_mergekit_divides_by_one_where_the_agreeing_weights_cancel():
    tensors, weights = [torch.tensor([3.0]), torch.tensor([-2.0])], [1.0, -1.0]
    assert merge_one(tensors, weights, 1.0, make_rule("ties", convention="mergekit")).item() == 5.0


def test_mergekit_rescales_a_drop_to_the_l1_norm_before_it():
    tensor, mask = torch.tensor([1.0, -2.0, 3.0, 4.0]), torch.tensor([True, False, True, False])
    rule = make_rule("dare_linear", convention="mergekit")
    # |t|_1 = 10, |kept|_1 = 4
    assert torch.equal(merge_one([tensor], [1.0], 0.5, rule, [mask]), torch.tensor([2.5, 0.0, 7.5, 0.0]))
    assert torch.equal(
        merge_one([tensor], [1.0], 0.5, make_rule("dare_linear"), [mask]), torch.tensor([2.0, 0.0, 6.0, 0.0])
    )
    # dare_ties is a masked sum there: no division
    both = merge_one([tensor, tensor], [1.0, 2.0], 0.5, make_rule("dare_ties", convention="mergekit"), [mask, mask])
    assert torch.equal(both, torch.tensor([7.5, 0.0, 22.5, 0.0]))


def test_mergekit_keeps_at_least_one_element():
    tensor = torch.tensor([1.0, -3.0, 2.0])
    assert torch.equal(
        merge_one([tensor], [1.0], 0.1, make_rule("magnitude_prune", convention="mergekit")),
        torch.tensor([0.0, -3.0, 0.0]),
    )
    assert torch.equal(merge_one([tensor], [1.0], 0.1, make_rule("magnitude_prune")), torch.zeros(3))


@pytest.mark.quick
def test_paper_has_one_threshold_for_the_model_and_keeps_ties():
    # 8 elements, density 0.25: k = 2 + 1; the third largest magnitude is 5, and both 5s stay.
    tasks = {"p": {0: torch.tensor([9.0, -5.0, 1.0, 0.5])}, "q": {0: torch.tensor([5.0, -7.0, 2.0, 2.0])}}
    rule = make_rule("ties", convention="paper")
    merged = reference.merge_model(tasks, [1.0], {"p": [0.25], "q": [0.25]}, rule)
    assert torch.equal(merged["p"], torch.tensor([9.0, -5.0, 0.0, 0.0]))
    assert torch.equal(merged["q"], torch.tensor([5.0, -7.0, 0.0, 0.0]))
    exact = reference.merge_model(
        tasks, [1.0], {"p": [0.25], "q": [0.25]}, make_rule("ties", convention="paper", trim_ties="exact")
    )
    assert torch.equal(exact["q"], torch.tensor([0.0, -7.0, 0.0, 0.0]))  # the 5 of p comes first


@pytest.mark.parametrize(("majority", "want"), [(-1.0, -3.0), (1.0, 3.0)])
def test_paper_gives_a_tied_vote_the_sign_of_the_models_majority(majority, want):
    tasks = {
        "p": {0: torch.tensor([3.0]), 1: torch.tensor([-3.0])},
        "q": {0: torch.tensor([majority, majority]), 1: torch.tensor([majority, 0.0])},
    }
    rule = make_rule("ties", convention="paper")
    assert reference.merge_model(tasks, [1.0, 1.0], {"p": [1.0] * 2, "q": [1.0] * 2}, rule)["p"].item() == want


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_columns_of_zeros_stay_zero(convention):
    zeros = [torch.zeros(2, 3), torch.zeros(2, 3)]
    for method in METHODS:
        masks = [torch.ones(2, 3, dtype=torch.bool)] * 2 if "dare" in method else None
        merged = merge_one(zeros, [1.0, -1.0], 0.5, make_rule(method, convention=convention), masks)
        assert torch.equal(merged.abs(), torch.zeros(2, 3)), method


def test_a_module_takes_the_adapters_that_have_it():
    tasks = {"p": {0: torch.tensor([2.0]), 1: torch.tensor([4.0])}, "q": {1: torch.tensor([4.0])}}
    merged = reference.merge_model(tasks, [1.0, 1.0], {"p": [1.0] * 2, "q": [1.0] * 2}, make_rule("ties"))
    assert (merged["p"].item(), merged["q"].item()) == (3.0, 4.0)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 5),
    density=st.sampled_from([0.0, 0.05, 0.29, 0.5, 0.99, 1.0]),
    election=st.sampled_from(["total", "frequency"]),
    method=st.sampled_from(["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"]),
)
def test_equals_pefts_own_functions(seed, count, density, election, method):
    from peft.utils import merge_utils

    if density == 1.0 or (density == 0.0 and "dare" in method):
        density = 0.7  # PEFT warns at 1, and divides by 0
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(7, 13, generator=generator) for _ in range(count)]
    weights = torch.randn(count, generator=generator)
    masks = [torch.rand(7, 13, generator=generator) < density for _ in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        waiting = [mask.float() for mask in masks]
        patch.setattr(torch, "bernoulli", lambda *_, **__: waiting.pop(0))
        theirs = {
            "linear": lambda: merge_utils.task_arithmetic(tensors, weights),
            "magnitude_prune": lambda: merge_utils.magnitude_prune(tensors, weights, density),
            "ties": lambda: merge_utils.ties(tensors, weights, density, election),
            "dare_linear": lambda: merge_utils.dare_linear(tensors, weights, density),
            "dare_ties": lambda: merge_utils.dare_ties(tensors, weights, density, election),
        }[method]()
    ours = merge_one(tensors, weights.tolist(), density, make_rule(method, election=election), masks)
    # Two roundings a term on each side, and one a sum; sums of at most 5 terms of at most |w| |t| / density.
    bound = 2**-24 * (count + 4) * sum(abs(w) * t.abs() for w, t in zip(weights.tolist(), tensors, strict=True))
    bound = bound / (density if "dare" in method else 1.0)
    votes_apart = torch.zeros(7, 13, dtype=torch.bool)  # where float32 cannot tell the sign of the vote
    if election == "total" and "ties" in method:
        votes_apart = theirs.sign() != ours.sign()
    assert ((ours - theirs).abs() <= bound)[~votes_apart].all()
    assert votes_apart.sum() <= 1


@pytest.mark.quick
@pytest.mark.parametrize(
    ("field", "value"),
    [("method", "tiez"), ("convention", "paft"), ("election", "mean"), ("scope", "layer"), ("trim_ties", "drop")],
)
def test_unknown_names_list_the_known_ones(field, value):
    with pytest.raises(RecipeError, match=rf"^{field}: wanted one of .*, got '{value}'(; did you mean '.*'\?)?$"):
        make_rule(**{"method": "ties", field: value})


@pytest.mark.parametrize("method", METHODS)
def test_the_papers_rule_is_pefts_but_for_thresholds_and_tied_votes(method):
    peft, paper = (make_rule(method, convention=convention) for convention in ("peft", "paper"))
    differs = {name: getattr(peft, name) for name in ("scope", "trim_ties", "extra_k", "majority")}
    assert replace(paper, **differs) == peft
