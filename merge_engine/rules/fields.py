"""The fields of a recipe as keyword arguments, for editors and type checkers. `Recipe` checks them.

Imports no torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from typing_extensions import TypedDict

from merge_engine.rules.patterns import BlockWeights

Gain = float | Mapping[str, float]
Density = float | Sequence[float] | Mapping[str, float | Sequence[float]]


class RecipeFields(TypedDict, total=False):
    """Every field of `Recipe`, and the names that PEFT has for some of them."""

    method: str
    weights: Sequence[float] | Mapping[str, float] | None
    density: Density | None
    space: Literal["delta", "factors", "core", "knots"]
    scale: float | Literal["auto"]
    gain: Gain
    election: str
    scope: str | None
    trim_ties: str | None
    convention: str
    seed: int
    rank: int | Literal["auto"]
    energy: float | None
    ranks: Literal["one", "own"]
    dtype: Any  # a name, or a dtype of torch
    saved: Literal["average", "first"] | None
    normalize: bool | None
    rescale: Literal["density", "l1"] | None
    gamma: float
    mask: float
    min_tasks: int
    ridge: float
    balance: Literal["pico"] | None
    block_weights: BlockWeights | None
    module_weights: Mapping[str, Sequence[float]] | None
    module_densities: Mapping[str, Sequence[float]] | None
    combination_type: str
    majority_sign_method: str
    svd_rank: int | None


class BoundFields(RecipeFields, total=False):
    """The same for adapters of which some are merged: their numbers or names, in order; None: all."""

    adapters: Sequence[int | str] | None
