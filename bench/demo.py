"""The table of `merge-engine demo` as a results file: python -m bench.demo [--output bench/results]

Writes demo.csv: percent of the own adapter's figure at scale 1, the best scale, and the figure there; means over tasks.
"""

import argparse
from pathlib import Path

from bench.harness import machine
from bench.reporting.files import write_csv
from merge_engine.demo.run import run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"), help="folder to write into")
    options = parser.parse_args()
    known = machine.versions(("torch", "peft", "transformers", "merge-engine"))
    rows = []
    for row in run(print):
        if row.kind == "relative":
            tuned = {"best_scale": row.best_scale, "best_mean": row.best_mean} if row.best else {}
            rows.append(known | {"name": row.name, "mean": row.mean, "best_scale": "", "best_mean": ""} | tuned)
    write_csv(options.output / "demo.csv", list(rows[0]), rows)


if __name__ == "__main__":
    main()
