"""The functions of `rules.whole_methods.WHOLE_METHODS`, by name, and the one place that calls them."""

from collections.abc import Callable

import torch

from merge_engine.rules.whole_methods import WHOLE_METHODS
from merge_engine.whole_tensors import arithmetic, spheres, stock
from merge_engine.whole_tensors.group import Group

FUNCTIONS: dict[str, Callable[[Group], None]] = {
    name: getattr(module, name)
    for module in (arithmetic, spheres, stock)
    for name in WHOLE_METHODS
    if hasattr(module, name)
}


def merge_group(method: str, group: Group) -> None:
    """Merge one group of tensors by a method of the table into its `out`; RecipeError where they cannot be merged."""
    if group.out.numel():
        with torch.no_grad():
            FUNCTIONS[method](group)
