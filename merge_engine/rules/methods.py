"""The methods of merging, as rows of a table: what each computes, and which fields of a recipe it looks at.

A new elementwise method is a new row. New arithmetic goes into `rules.reference` and into one function of each backend:
a keep into `engine.cpu_thresholds` and `engine.triton_backend`, a combine into `cpu.merge_tile_by_torch` and
`kernels.merge`. Everything else (the command line, YAML, sweeps, refusals, the parametrised tests) reads this table.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

Kind = Literal["elementwise", "stacked", "core"]
Keep = Literal["all", "magnitude", "band", "bernoulli"]
Combine = Literal["sum", "mean", "max", "consensus"]
Election = Literal["total", "frequency"]
Scope = Literal["tensor", "model"]
TrimTies = Literal["exact", "keep"]
Divisor = Literal["count", "weight", "one"]
GAMMA, MASK, MIN_TASKS = 0.01, 0.4, 2  # what a recipe has by default


class Method(NamedTuple):
    """One row of the table.

    kind: "elementwise" is keep x elect x combine on every element of the task tensors; "stacked" puts the factors side
        by side; "core" is a function of the modules' small cores, the row of that name in `lowrank.core_methods`.
    keep: all elements, the k largest magnitudes, the k largest but for a share gamma of all at the top ("band"), or a
        random share. elects: whether a sign is elected. weighs_vote: the election sees ``w t`` in every convention.
    combine: of what is kept, and agrees with the elected sign: the weighted sum, the weighted mean, the largest
        ``|w t|`` with the elected sign, or the sum where enough adapters account for it ("consensus").
    """

    summary: str
    kind: Kind = "elementwise"
    keep: Keep = "all"
    elects: bool = False
    weighs_vote: bool = False
    combine: Combine = "sum"
    options: tuple[str, ...] = ()  # fields of the recipe that only methods which name them know
    flat: bool = False  # all singular values of the result are equal: a smaller rank loses its share of them


METHODS: dict[str, Method] = {
    "linear": Method("the weighted sum of the deltas (task arithmetic)"),
    "cat": Method("the same, factors stacked: exact, of the sum of the ranks", kind="stacked"),
    "magnitude_prune": Method("the weighted sum of the largest elements", keep="magnitude"),
    "ties": Method("trim, elect a sign, average what agrees", keep="magnitude", elects=True, combine="mean"),
    "dare_linear": Method("drop at random, rescale, add up", keep="bernoulli"),
    "dare_ties": Method("drop at random, elect, average what agrees", keep="bernoulli", elects=True, combine="mean"),
    "breadcrumbs": Method("drop the largest elements, add up the next ones", keep="band"),
    "breadcrumbs_ties": Method(
        "drop the largest elements, elect a sign, add up what agrees", keep="band", elects=True, weighs_vote=True
    ),
    "elect_max": Method(
        "elect a sign, take the largest element that agrees", elects=True, weighs_vote=True, combine="max"
    ),
    "consensus": Method("the weighted sum where several adapters matter", combine="consensus"),
    "tsv": Method("add the deltas after making their directions orthogonal", kind="core"),
    "iso_c": Method("the sum of the deltas with all its directions equally strong", kind="core", flat=True),
    "tsv_iso": Method("tsv with all its directions equally strong", kind="core", flat=True),
    "actmat": Method("least squares over directions that tasks use (experimental)", kind="core", options=("ridge",)),
    "multislerp": Method("the mean direction of the deltas, of their mean norm", kind="core"),
    "karcher": Method("the Karcher mean of the deltas' directions, of their mean norm", kind="core"),
}

# Which methods look at a field of the recipe. Fields that are not here are looked at by all methods.
_LOOKS: dict[str, Callable[[Method], bool]] = {
    "density": lambda row: row.keep != "all",
    "module_densities": lambda row: row.keep != "all",
    "convention": lambda row: row.keep != "all" or row.elects,
    "scope": lambda row: row.keep == "magnitude",
    "trim_ties": lambda row: row.keep in ("magnitude", "band"),
    "gamma": lambda row: row.keep == "band",
    "seed": lambda row: row.keep == "bernoulli",
    "rescale": lambda row: row.keep == "bernoulli",
    "election": lambda row: row.elects,
    "normalize": lambda row: row.combine == "mean",
    "mask": lambda row: row.combine == "consensus",
    "min_tasks": lambda row: row.combine == "consensus",
    "space": lambda row: row.kind != "stacked",
    "balance": lambda row: row.kind != "stacked",
    "ridge": lambda row: "ridge" in row.options,
}
# Fields that are refused where a method does not look at them; other fields have no effect there.
STRICT = frozenset({"balance", "gamma", "mask", "min_tasks", "ridge"})


def looks_at(method: str, field: str) -> bool:
    """Whether a field of the recipe has an effect on a method of the table."""
    return field not in _LOOKS or _LOOKS[field](METHODS[method])


def refuses(method: str, field: str) -> bool:
    """Whether a recipe of the method must not give the field; where it does not look at others, they have no effect."""
    return not looks_at(method, field) and (field in STRICT or METHODS[method].kind == "core")


def methods_with(field: str) -> list[str]:
    """The methods that look at a field, for messages."""
    return [method for method in METHODS if looks_at(method, field)]
