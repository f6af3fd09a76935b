"""The tables of `merge-engine demo` as results files: python -m bench.demo SET ... [--output bench/results]

Percent of the own adapter's figure at scale 1, the best scale, and the figure there; means over tasks. Sets:
half-known  demo.csv: what `merge-engine demo` prints
unknown     demo_unknown.csv: by groups of adapters, with the accuracy in the known tasks
shared      demo_shared.csv: the three adapters of half-known that share their initialisation
seeds       demo_seeds.csv: half-known trained again, from each of four seeds (minutes for each)
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.harness import machine
from bench.reporting.files import write_csv
from merge_engine.demo import adapter_paths
from merge_engine.demo.run import run
from merge_engine.demo.sets import DEMO_SETS, HALF_KNOWN, MERGES
from merge_engine.demo.train import SHARED_A, train

Rows = list[dict[str, Any]]

SEEDS = (0, 1, 2, 3)
SEEDED = ("linear", "linear, auto", "tsv", "actmat, ridge .3", "ties d=.2")  # the rows of "seeds"

_SHARED = {task: path for task, path in adapter_paths().items() if task in SHARED_A}
DEMO_SETS["shared"] = replace(
    DEMO_SETS[HALF_KNOWN], groups={"": _SHARED}, merges={row: MERGES[row] for row in ("linear", "iso_c", "tsv")}
)


def table(name: str) -> Rows:
    """The rows of a set in percent of the own adapter's figure."""
    rows = []
    for row in run(print, name):
        if row.kind == "relative":
            group = {"group": row.group, "known": row.known} if row.group else {}
            tuned = {"best_scale": row.best_scale, "best_mean": row.best_mean} if row.best else {}
            figures = {"name": row.name, "mean": row.mean, "best_scale": "", "best_mean": ""}
            rows.append(figures | tuned | group)
    return rows


def seeds() -> Rows:
    """The tables of half-known, with base and adapters trained from other seeds."""
    rows, threads = [], torch.get_num_threads()
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            train(Path(folder), seed)
            torch.set_num_threads(threads)
            name = f"seed {seed}"
            DEMO_SETS[name] = replace(
                DEMO_SETS[HALF_KNOWN],
                base=Path(folder) / "base",
                groups={"": adapter_paths(Path(folder))},
                merges={row: MERGES[row] for row in SEEDED},
            )
            rows += [{"seed": seed} | row for row in table(name)]
    return rows


TABLES: dict[str, tuple[str, Callable[[], Rows]]] = {
    HALF_KNOWN: ("demo.csv", lambda: table(HALF_KNOWN)),
    "unknown": ("demo_unknown.csv", lambda: table("unknown")),
    "shared": ("demo_shared.csv", lambda: table("shared")),
    "seeds": ("demo_seeds.csv", seeds),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__.split("\n")[0])
    parser.add_argument("sets", nargs="+", choices=TABLES, metavar="SET")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"), help="folder to write into")
    options = parser.parse_args()
    known = machine.versions(("torch", "peft", "transformers", "merge-engine"))
    for name in options.sets:
        file, made = TABLES[name]
        rows = [known | row for row in made()]
        write_csv(options.output / file, list(rows[0]), rows)


if __name__ == "__main__":
    main()
