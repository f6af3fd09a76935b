"""The words that options of a merge may be, for the recipe and the command line. Imports no torch."""

from merge_engine.rules.conventions import CONVENTIONS
from merge_engine.rules.methods import METHODS

SPACES = ("delta", "factors", "core", "knots")
BALANCES = ("pico",)
RANKS = ("one", "own")
WRITTEN_DTYPES = ("float32", "float16", "bfloat16")
SAVED = ("average", "first")
BACKENDS = ("auto", "triton", "torch")
KINDS = ("elementwise", "stacked", "core")
CHOICES: dict[str, tuple[str, ...]] = {
    "method": tuple(METHODS),
    "space": SPACES,
    "balance": BALANCES,
    "election": ("total", "frequency"),
    "scope": ("tensor", "model"),
    "trim_ties": ("exact", "keep"),
    "convention": tuple(CONVENTIONS),
    "ranks": RANKS,
    "dtype": WRITTEN_DTYPES,
    "saved": SAVED,
    "backend": BACKENDS,
}
