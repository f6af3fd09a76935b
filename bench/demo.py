"""The table of `merge-engine demo` as a results file: python -m bench.demo [--set NAME] [--output bench/results]

Writes demo.csv, or demo_unknown.csv of the set unknown: percent of the own adapter's figure at scale 1, the best scale,
and the figure there; means over tasks. The set unknown has groups of adapters, and the accuracy in the known tasks.
"""

import argparse
from pathlib import Path

from bench.harness import machine
from bench.reporting.files import write_csv
from merge_engine.demo.run import run
from merge_engine.demo.sets import DEMO_SETS, HALF_KNOWN


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"), help="folder to write into")
    parser.add_argument("--set", choices=DEMO_SETS, default=HALF_KNOWN)
    options = parser.parse_args()
    known = machine.versions(("torch", "peft", "transformers", "merge-engine"))
    rows = []
    for row in run(print, options.set):
        if row.kind == "relative":
            group = {"group": row.group, "known": row.known} if row.group else {}
            tuned = {"best_scale": row.best_scale, "best_mean": row.best_mean} if row.best else {}
            rows.append(known | {"name": row.name, "mean": row.mean, "best_scale": "", "best_mean": ""} | tuned | group)
    name = "demo.csv" if options.set == HALF_KNOWN else f"demo_{options.set}.csv"
    write_csv(options.output / name, list(rows[0]), rows)


if __name__ == "__main__":
    main()
