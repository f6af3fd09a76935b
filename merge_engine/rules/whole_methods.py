"""The methods that merge whole tensors of full models, as rows of a table: inputs, base, options. Imports no torch.

A row says what the method takes; what it computes is the function of that name in `whole_tensors.table`. Options have
mergekit's names and defaults, so that its recipes, our command line and our API read the same table.

| looks | cost |
| --- | --- |
| "element" | one sweep over the elements |
| "tensor" | sums over the whole tensor first, then one sweep |
| "rows" | every row sorted or normalised on its own |
| "selection" | an exact threshold of the tensor (a few sweeps), then sums, then one sweep |
"""

from typing import Any, Literal, NamedTuple

Of = Literal["merge", "input", "other"]  # one value; one for each input; one for each input but the base
Looks = Literal["element", "tensor", "rows", "selection"]


class Option(NamedTuple):
    """An option of a method: its type, how many values it has, its default (None: it has to be given)."""

    kind: type
    of: Of
    default: Any = None
    least: float | None = None
    most: float | None = None
    optional: bool = False  # None is a value: not given


class WholeMethod(NamedTuple):
    """One row.

    base: "needed" and "optional": the merge is one of differences from it, or takes it as one end; "none": every model
        counts alike. least, most: how many models there may be, the base with them; others: how many besides the base.
    """

    summary: str
    base: Literal["needed", "optional", "none"]
    looks: Looks
    options: dict[str, Option]
    least: int = 1
    most: int | None = None
    others: tuple[int, int | None] = (0, None)
    unused: tuple[str, ...] = ()  # options without effect


_INERT = {"int8_mask": Option(bool, "merge", False)}  # the dtype of mergekit's masks, which changes no result


def _arithmetic(summary: str, looks: Looks, normalize: bool, rescale: bool, **own: Option) -> WholeMethod:
    options = {
        "weight": Option(float, "other"),
        "density": Option(float, "other", 1.0, 0.0, 1.0),
        **own,
        "normalize": Option(bool, "merge", normalize),
        "rescale": Option(bool, "merge", rescale),
        "lambda": Option(float, "merge", 1.0),
    }
    return WholeMethod(summary, "needed", looks, options | _INERT)


_GAMMA, _EPSILON = Option(float, "other", 0.01, 0.0, 1.0), Option(float, "other", 0.15, 0.0, 0.5)
WHOLE_METHODS: dict[str, WholeMethod] = {
    "linear": WholeMethod(
        "the weighted mean of the models, or their weighted sum",
        "none",
        "element",
        {"weight": Option(float, "input"), "normalize": Option(bool, "merge", True)},
    ),
    "task_arithmetic": _arithmetic("base + the weighted sum of differences", "element", False, False)._replace(
        unused=("density", "rescale")
    ),
    "ties": _arithmetic("trim, elect a sign, average what agrees", "selection", True, False),
    "dare_linear": _arithmetic("drop at random, rescale, add up", "element", False, True),
    "dare_ties": _arithmetic("drop at random, elect a sign, add up what agrees", "element", False, True),
    "breadcrumbs": _arithmetic("drop the largest, add up the next ones", "selection", False, False, gamma=_GAMMA),
    "breadcrumbs_ties": _arithmetic(
        "drop the largest, elect a sign, add up what agrees", "selection", False, False, gamma=_GAMMA
    ),
    "della": _arithmetic(
        "drop small elements of a row more often, elect, average", "rows", True, True, epsilon=_EPSILON
    ),
    "della_linear": _arithmetic(
        "drop small elements of a row more often, add up", "rows", False, True, epsilon=_EPSILON
    ),
    "slerp": WholeMethod(
        "from the base (t = 0) to the other model (t = 1) along a great circle",
        "needed",
        "tensor",
        {"t": Option(float, "merge")},
        least=2,
        most=2,
    ),
    "nuslerp": WholeMethod(
        "slerp of two models, or of their differences from a base, by weights",
        "optional",
        "rows",
        {
            "weight": Option(float, "other"),
            "nuslerp_row_wise": Option(bool, "merge", False),
            "nuslerp_flatten": Option(bool, "merge", True),
        },
        others=(2, 2),
    ),
    "multislerp": WholeMethod(
        "the mean direction of models or differences, of their mean norm",
        "optional",
        "tensor",
        {
            "weight": Option(float, "other"),
            "normalize_weights": Option(bool, "merge", True),
            "eps": Option(float, "merge", 1e-8, 0.0),
        },
        others=(1, None),
    ),
    "karcher": WholeMethod(
        "the Karcher mean of the models' directions, of their mean norm",
        "none",
        "tensor",
        {"max_iter": Option(int, "merge", 10, 0), "tol": Option(float, "merge", 1e-5, 0.0)},
    ),
    "model_stock": WholeMethod(
        "between base and mean, the nearer to the mean the more the models agree",
        "needed",
        "rows",
        {"filter_wise": Option(bool, "merge", False)},
        least=3,
    ),
    "sce": WholeMethod(
        "select what varies most between models, weigh by squares, erase the minority",
        "needed",
        "selection",
        {"select_topk": Option(float, "merge", 1.0, 0.0, 1.0)} | _INERT,
    ),
    "nearswap": WholeMethod(
        "take the other model where it is within t of the base, else the base, t nearer to it",
        "needed",
        "element",
        {"t": Option(float, "merge")},
        least=2,
        most=2,
    ),
    "arcee_fusion": WholeMethod(
        "take the elements of the other model that matter most", "needed", "selection", {}, least=2, most=2
    ),
    "ram": WholeMethod(
        "keep what one model changed, average what several changed",
        "needed",
        "element",
        {"epsilon": Option(float, "merge", 1e-5, 0.0)},
    ),
    "ramplus_tl": WholeMethod(
        "ram, with what one model changed made larger",
        "needed",
        "tensor",
        {
            "r": Option(float, "merge", 0.1),
            "alpha": Option(float, "merge", 0.2),
            "epsilon": Option(float, "merge", 1e-5, 0.0),
        },
    ),
    "passthrough": WholeMethod(
        "one model as it is, or times scale",
        "none",
        "element",
        {"scale": Option(float, "input", optional=True)},
        most=1,
    ),
}
# Values of "convention": the methods as published, or with the floors and shortcuts of mergekit's code.
WHOLE_CONVENTIONS = ("published", "mergekit")


def models_wanted(name: str) -> str:
    """How many models a method takes, for messages."""
    row = WHOLE_METHODS[name]
    besides = row.others != (0, None)
    low, high = row.others if besides else (row.least, row.most)
    count = f"{low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
    plural = "model" if (low if high is None else high) == 1 else "models"
    if besides:
        return f"{count} {plural} besides the base"
    return f"{count} {plural}" + (", one of them the base" if row.base == "needed" else "")
