"""A search for gains by kinds of modules, as a results file: python -m bench.search_gains [SEED ...]

Writes search.csv: of the search in ``examples/search_gains.py``, for each seed of the sampler, the scores on the demo's
reported sample and on sample 21, and what was found. Needs ``merge-engine[search,peft]``.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import merge_engine
from bench.harness import machine
from bench.reporting.files import write_csv
from merge_engine.demo import adapter_paths
from merge_engine.demo.evaluate import scorer

SEEDS = (0, 3, 4, 5, 6)
SAMPLES = {"reported": 256, 21: 1024}  # {sample: sequences of each task}: neither has a part in the choice
ONE_SCALE: dict[str, Any] = {"method": "tsv", "scale": "auto", "gain": 1.4}  # the demo's best merge with one scale
COLUMNS = ("seed", "trials", "seconds", "merge", "sample", "score", "parameter", "value")


def rows_of(seed: int, folder: Path) -> list[dict[str, Any]]:
    """One search: its scores on each sample, and the parameters of the merge that it found."""
    adapters = list(adapter_paths().values())
    started = time.perf_counter()
    tuning = scorer("tuning", count=512)
    found = merge_engine.search(adapters, tuning, folder, groups="kinds", in_memory=True, seed=seed, progress=False)
    about = {"seed": seed, "trials": len(found.trials), "seconds": time.perf_counter() - started}
    merges = {"one scale": merge_engine.merge(adapters, **ONE_SCALE), "found": found.best_folder}
    rows: list[dict[str, Any]] = []
    for sample, count in SAMPLES.items():
        score = scorer(sample, count)
        rows += [
            about | {"merge": name, "sample": sample, "score": score(merge)["score"]} for name, merge in merges.items()
        ]
    best = {} if found.best is None else found.best.values
    return rows + [about | {"merge": "found", "parameter": name, "value": value} for name, value in best.items()]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.search_gains", description=__doc__.split("\n")[0])
    parser.add_argument("seeds", nargs="*", type=int, default=SEEDS, metavar="SEED", help=f"default: {SEEDS}")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"), help="folder to write into")
    options = parser.parse_args()
    known = {"machine": machine.processor()} | machine.versions(("torch", "optuna", "merge-engine"))
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            rows += rows_of(seed, Path(folder) / "found")
        print(f"seed {seed}: {rows[-1]['seconds']:.0f} s")
    write_csv(options.output / "search.csv", [*known, *COLUMNS], [known | row for row in rows])


if __name__ == "__main__":
    main()
