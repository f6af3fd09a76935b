"""The two sets: what each shows, and the recipes that its demo merges by."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_engine.demo import BASE, SETS, UNKNOWN_DATA, adapter_paths, unknown_paths
from merge_engine.demo.tasks import ALL_TASKS, KNOWN, TASKS, Task

Recipes = Mapping[str, Mapping[str, Any]]  # by the name that the table shows

MERGES: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear"},
    "linear, auto": {"method": "linear", "scale": "auto"},
    "tsv": {"method": "tsv"},
    "tsv, auto": {"method": "tsv", "scale": "auto"},
    "tsv, auto, rank 8": {"method": "tsv", "scale": "auto", "rank": 8},
    "iso_c": {"method": "iso_c"},
    "actmat": {"method": "actmat"},
    "actmat, ridge .3": {"method": "actmat", "ridge": 0.3},
    "magnitude_prune d=.2": {"method": "magnitude_prune", "density": 0.2},
    "ties d=.2": {"method": "ties", "density": 0.2},
    "ties d=.2, rank 8": {"method": "ties", "density": 0.2, "rank": 8},
    "ties d=.5, knots": {"method": "ties", "density": 0.5, "space": "knots"},
    "dare_linear d=.2": {"method": "dare_linear", "density": 0.2},
    "dare_ties d=.5": {"method": "dare_ties", "density": 0.5},
    "linear, factors": {"method": "linear", "space": "factors"},
    "ties d=.5, factors": {"method": "ties", "density": 0.5, "space": "factors"},
}

UNKNOWN_MERGES = (
    "linear",
    "linear, auto",
    "tsv",
    "tsv, auto",
    "iso_c",
    "actmat",
    "ties d=.2",
    "dare_ties d=.5",
    "linear, factors",
)

ABOUT = """\
Six LoRA adapters of one small Llama, each trained on a task of its own, merged into one adapter by each method.
Each result is written to disk, loaded with transformers and PEFT, and measured on all six tasks.
"""
UNKNOWN_ABOUT = """\
A small Llama does eight tasks, and knows nothing of four others. Each of these has two LoRA adapters:
alone    trained on its own task only
replay   trained on its own task in half of each batch, and on the eight known tasks in the other half
The four adapters of a kind are merged into one by each method. Each result is written to disk, loaded with transformers
and PEFT, and measured on the four tasks; the column known is the accuracy in the eight tasks, in percent.
"""


@dataclass(frozen=True)
class DemoSet:
    """One base, its adapters, and what the demo does with them.

    tasks: all that the base has a token for, in the order of these. known: those that it was trained on, and that a
    merge should leave as they are; empty: they are not measured. groups: {name: {task: folder of its adapter}}, and
    each group is merged on its own, by all recipes. The tasks of a group are the columns of the table.
    """

    base: Path
    tasks: Mapping[str, Task]
    known: tuple[str, ...]
    groups: Mapping[str, Mapping[str, Path]]
    merges: Recipes
    about: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The tasks of the adapters."""
        return tuple(next(iter(self.groups.values())))


HALF_KNOWN, UNKNOWN_SET = SETS
DEMO_SETS = {
    HALF_KNOWN: DemoSet(BASE, TASKS, (), {"": adapter_paths()}, MERGES, ABOUT),
    UNKNOWN_SET: DemoSet(
        UNKNOWN_DATA / "base",
        ALL_TASKS,
        tuple(KNOWN),
        {kind: unknown_paths(kind) for kind in ("replay", "alone")},
        {name: MERGES[name] for name in UNKNOWN_MERGES},
        UNKNOWN_ABOUT,
    ),
}
