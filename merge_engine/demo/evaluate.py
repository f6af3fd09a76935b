"""``python -m merge_engine.demo.evaluate [ADAPTER]``: how an adapter of the demo's base does, its last line a number.

The number is the mean over the six tasks of what the adapter reaches of each task's own adapter, in percent: on the
sample that the demo tunes on (``--sample tuning``, the default: choose by it), or the one that it reports (``--sample
reported``: quote that). Without an adapter, the base's own.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from merge_engine.demo import run

SAMPLES = {"tuning": run.TUNING, "reported": run.REPORTED}


def score(adapter: Path | None, sample: str = "tuning") -> dict[str, float]:
    """Percent of each task's own adapter, by task, and their mean. Raises MergeError without transformers and peft."""
    run._require()
    seed = SAMPLES[sample]
    with run._quiet():
        figures = run._relative(run._marks(run._load(adapter), seed), run._own_marks(seed))
    return figures | {"mean": run._mean(figures)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line a task, and the mean last."""
    parser = argparse.ArgumentParser(prog="python -m merge_engine.demo.evaluate", description=__doc__)
    parser.add_argument("adapter", nargs="?", type=Path)
    parser.add_argument("--sample", choices=SAMPLES, default="tuning")
    options = parser.parse_args(arguments)
    for name, figure in score(options.adapter, options.sample).items():
        print(f"{name:12}{figure:.4f}")


if __name__ == "__main__":
    main()
