"""Merge many LoRA adapters into one, fast, exactly and in little memory.

import merge_engine
merge_engine.merge(["sql", "chat", "ads"], "merged", method="ties", density=0.2, weights=[2, 1, 1])
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merge_engine.adapter import open_adapter
    from merge_engine.checkpoint import open_checkpoint
    from merge_engine.compare import interference
    from merge_engine.compare_figures import Interference
    from merge_engine.engine import Merged, merge
    from merge_engine.errors import AdapterError, MergeError, ModelError, OutputError, RecipeError
    from merge_engine.into import MergedModel, merge_into, merge_models
    from merge_engine.many import Failed, merge_many
    from merge_engine.mergekit_recipe import merge_recipe
    from merge_engine.recipe import Recipe
    from merge_engine.session import Session

__version__ = "0.1.0"
__all__ = [
    "AdapterError",
    "Failed",
    "Interference",
    "MergeError",
    "Merged",
    "MergedModel",
    "ModelError",
    "OutputError",
    "Recipe",
    "RecipeError",
    "Session",
    "interference",
    "merge",
    "merge_into",
    "merge_many",
    "merge_models",
    "merge_recipe",
    "open_adapter",
    "open_checkpoint",
]

# In a checkout the kernels live beside this package, not inside it: look there too.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

_HOMES = {
    "merge": "engine",
    "Merged": "engine",
    "Recipe": "recipe",
    "MergedModel": "into",
    "merge_into": "into",
    "merge_models": "into",
    "merge_many": "many",
    "Failed": "many",
    "merge_recipe": "mergekit_recipe",
    "Session": "session",
    "open_adapter": "adapter",
    "open_checkpoint": "checkpoint",
    "Interference": "compare_figures",
    "interference": "compare",
    "AdapterError": "errors",
    "MergeError": "errors",
    "ModelError": "errors",
    "OutputError": "errors",
    "RecipeError": "errors",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: `merge-engine --help` and an import need no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
