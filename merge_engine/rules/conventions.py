"""Where PEFT, mergekit and the TIES paper's code differ, as rows of a table."""

from typing import Literal, NamedTuple

from merge_engine.rules.methods import Divisor, Keep, Scope, TrimTies


class Convention(NamedTuple):
    """Where PEFT, mergekit and the TIES paper's code differ on the same method.

    vote_weighted: the election sees ``w t`` instead of ``t``.
    divisor: what a mean divides by, for trimmed and for randomly dropped tensors: the number of agreeing adapters,
        the sum of their weights (1 where that is 0), or 1.
    scope: of a trim, one threshold a tensor, or one for the whole model; a band has those of the tensor.
    trim_ties: "exact" keeps exactly k elements, equal magnitudes by lowest flat index; "keep" keeps every element
        that equals the k-th.
    min_k, extra_k: ``k = max(int(density n), min_k) + extra_k``, at most n.
    tied_vote: a column whose vote is 0 elects +, or the majority sign of the whole model.
    l1_rescale: dropped tensors are rescaled to their L1 norm before the drop, instead of by 1/density.
    """

    vote_weighted: bool
    divisor: dict[Keep, Divisor]
    scope: Scope
    trim_ties: TrimTies
    min_k: int
    extra_k: int
    tied_vote: Literal["plus", "majority"]
    l1_rescale: bool


_COUNT: dict[Keep, Divisor] = {"all": "count", "magnitude": "count", "band": "count", "bernoulli": "count"}
_WEIGHT: dict[Keep, Divisor] = {"all": "weight", "magnitude": "weight", "band": "weight", "bernoulli": "one"}
CONVENTIONS: dict[str, Convention] = {
    "peft": Convention(False, _COUNT, "tensor", "exact", 0, 0, "plus", False),
    "mergekit": Convention(True, _WEIGHT, "tensor", "exact", 1, 0, "plus", True),
    "paper": Convention(False, _COUNT, "model", "keep", 0, 1, "majority", False),
}
