"""The tables of `merge-engine demo` as results files: python -m bench.demo SET ... [--output bench/results]

Percent of the own adapter's figure at scale 1, the best scale, and the figure there; means over tasks. Sets:
half-known  demo.csv: what `merge-engine demo` prints
unknown     demo_unknown.csv: by groups of adapters, with the accuracy in the known tasks
shared      demo_shared.csv: the three adapters of half-known that share their initialisation
"""

import argparse
from dataclasses import replace
from pathlib import Path

from bench.harness import machine
from bench.reporting.files import write_csv
from merge_engine.demo import adapter_paths
from merge_engine.demo.run import run
from merge_engine.demo.sets import DEMO_SETS, HALF_KNOWN, MERGES
from merge_engine.demo.train import SHARED_A

FILES = {HALF_KNOWN: "demo.csv", "unknown": "demo_unknown.csv", "shared": "demo_shared.csv"}


_SHARED = {task: path for task, path in adapter_paths().items() if task in SHARED_A}
DEMO_SETS["shared"] = replace(
    DEMO_SETS[HALF_KNOWN], groups={"": _SHARED}, merges={row: MERGES[row] for row in ("linear", "iso_c", "tsv")}
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__.split("\n")[0])
    parser.add_argument("sets", nargs="+", choices=FILES, metavar="SET")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"), help="folder to write into")
    options = parser.parse_args()
    known = machine.versions(("torch", "peft", "transformers", "merge-engine"))
    for name in options.sets:
        rows = []
        for row in run(print, name):
            if row.kind == "relative":
                group = {"group": row.group, "known": row.known} if row.group else {}
                tuned = {"best_scale": row.best_scale, "best_mean": row.best_mean} if row.best else {}
                figures = {"name": row.name, "mean": row.mean, "best_scale": "", "best_mean": ""}
                rows.append(known | figures | tuned | group)
        write_csv(options.output / FILES[name], list(rows[0]), rows)


if __name__ == "__main__":
    main()
