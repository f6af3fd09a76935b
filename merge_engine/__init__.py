"""Merge many LoRA adapters into one, fast, exactly and in little memory.

import merge_engine
merge_engine.merge(["sql", "chat", "ads"], "merged", method="ties", density=0.2, weights=[2, 1, 1])
"""

import pathlib as _pathlib
import typing as _typing

from merge_engine.version import __version__

if _typing.TYPE_CHECKING:
    from merge_engine.compare.figures import Interference
    from merge_engine.compare.interference import interference
    from merge_engine.compare.recommend import Recommendation, recommend
    from merge_engine.engine.merge import merge
    from merge_engine.engine.output import Merged
    from merge_engine.errors import AdapterError, MergeError, ModelError, OutputError, RecipeError
    from merge_engine.formats.checkpoint import open_checkpoint
    from merge_engine.formats.normalize import Normalized, normalize
    from merge_engine.formats.open import open_adapter
    from merge_engine.into.merge import MergedModel, merge_into, merge_models
    from merge_engine.many.merge_many import Failed, merge_many
    from merge_engine.many.session import Session
    from merge_engine.mergekit.recipe import merge_recipe
    from merge_engine.rules.recipe import Recipe
    from merge_engine.searches.result import SearchResult
    from merge_engine.searches.run import search
    from merge_engine.sweeps.run import sweep
    from merge_engine.sweeps.table import SweepResult

__all__ = [
    "AdapterError",
    "Failed",
    "Interference",
    "MergeError",
    "Merged",
    "MergedModel",
    "ModelError",
    "Normalized",
    "OutputError",
    "Recipe",
    "RecipeError",
    "Recommendation",
    "SearchResult",
    "Session",
    "SweepResult",
    "__version__",
    "interference",
    "merge",
    "merge_into",
    "merge_many",
    "merge_models",
    "merge_recipe",
    "normalize",
    "open_adapter",
    "open_checkpoint",
    "recommend",
    "search",
    "sweep",
]

# In a checkout the kernels live beside this package, not inside it: look there too.
if not (_pathlib.Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_pathlib.Path(__file__).parent.parent))

_HOMES = {
    "AdapterError": "errors",
    "Failed": "many.merge_many",
    "Interference": "compare.figures",
    "MergeError": "errors",
    "Merged": "engine.output",
    "MergedModel": "into.merge",
    "ModelError": "errors",
    "Normalized": "formats.normalize",
    "OutputError": "errors",
    "Recipe": "rules.recipe",
    "RecipeError": "errors",
    "Recommendation": "compare.recommend",
    "SearchResult": "searches.result",
    "Session": "many.session",
    "SweepResult": "sweeps.table",
    "interference": "compare.interference",
    "merge": "engine.merge",
    "merge_into": "into.merge",
    "merge_many": "many.merge_many",
    "merge_models": "into.merge",
    "merge_recipe": "mergekit.recipe",
    "normalize": "formats.normalize",
    "open_adapter": "formats.open",
    "open_checkpoint": "formats.checkpoint",
    "recommend": "compare.recommend",
    "search": "searches.run",
    "sweep": "sweeps.run",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> _typing.Any:
    """Load a public name when it is first used: `merge-engine --help` and an import need no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
