"""``python -m merge_engine.demo.search OUT``: searches for a merge of the demo's adapters, and reports it.

Every kind of module has a gain of its own. The merge is chosen by the score on one sample. It is reported on the sample
that ``merge-engine demo`` reports, and on three larger ones, beside the best row of the demo.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from merge_engine.demo import adapter_paths
from merge_engine.demo.evaluate import scorer
from merge_engine.searches.run import search

BEST_ROW = {"method": "tsv", "scale": "auto", "gain": 1.4}
"""The best merge of ``merge-engine demo`` with one scale, chosen on the sample "tuning"."""
COUNT = 512
"""Sequences of each task by which a merge is chosen: fewer choose what is best by chance."""
OTHERS, OTHERS_COUNT = (21, 22, 23), 1024
"""Seeds of further samples, and sequences of each task."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the best trials, and a line for each sample that had no part in the choice."""
    parser = argparse.ArgumentParser(prog="python -m merge_engine.demo.search", description=__doc__)
    parser.add_argument("output", type=Path, help="folder of the search")
    parser.add_argument("--trials", type=int, default=60, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampler; default: %(default)s")
    options = parser.parse_args(arguments)
    started, adapters = time.perf_counter(), list(adapter_paths().values())
    score = scorer("tuning", COUNT)
    found = search(
        *(adapters, score, options.output),
        groups="kinds",
        trials=options.trials,
        seed=options.seed,
        in_memory=True,
        metric="score",
    )
    print(found.table())
    print(f"{options.trials} trials in {time.perf_counter() - started:.0f} s\n")
    print("percent of each task's own adapter        best row of the demo   found")
    report(adapters, found.best_folder)


def report(adapters: Sequence[Path], best: Path) -> None:
    """A line for each sample."""
    from merge_engine.engine.merge import merge

    row = merge(adapters, progress=False, **BEST_ROW)
    samples: list[tuple[str | int, int | None]] = [("reported", None), *((seed, OTHERS_COUNT) for seed in OTHERS)]
    for sample, count in samples:
        score = scorer(sample, count)
        name = f"sample {sample}, {count or 256} sequences of each task"
        print(f"{name:42}{score(row)['score']:20.2f}{score(best)['score']:8.2f}")


if __name__ == "__main__":
    main()
