"""``python -m merge_engine.demo.evaluate [ADAPTER]``: measures an adapter of the demo's base; prints its score last.

The score is the mean over the six tasks of the adapter's accuracy relative to that of the task's own adapter, in
percent. ``--sample tuning`` (the default) measures on the sample on which the demo chooses scales, and ``--sample
reported`` on the one that it reports: choose by the first, quote the second. Without an adapter, measures the base.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from merge_engine.demo import run

SAMPLES = {"tuning": run.TUNING, "reported": run.REPORTED}


def score(adapter: Path | None, sample: str = "tuning") -> dict[str, float]:
    """Percent of the accuracy of each task's own adapter, by task, and the mean. Needs transformers and peft."""
    run._require()
    seed = SAMPLES[sample]
    with run._quiet():
        figures = run._relative(run._marks(run._load(adapter), seed), run._own_marks(seed))
    return figures | {"mean": run._mean(figures)}


def scorer(sample: str = "tuning", count: int | None = None) -> Callable[[Path], dict[str, float]]:
    """`score` as a function of the folder, for a search: the own adapters are measured once.

    count: sequences of each task; default: that of the demo.
    """
    run._require()
    seed, counts = SAMPLES[sample], run.COUNT if count is None else dict.fromkeys(run.COUNT, count)
    with run._quiet():
        own = run._own_marks(seed, counts[seed])

    def measure(adapter: Path) -> dict[str, float]:
        with run._quiet():
            model: Any = run._load(adapter)
            model.merge_adapter()  # into the base: so it answers in half the time
            figures = run._relative(run._marks(model, seed, counts[seed]), own)
        return figures | {"score": run._mean(figures)}

    return measure


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each task, and their mean as the score."""
    parser = argparse.ArgumentParser(prog="python -m merge_engine.demo.evaluate", description=__doc__)
    parser.add_argument("adapter", nargs="?", type=Path)
    parser.add_argument("--sample", choices=SAMPLES, default="tuning")
    options = parser.parse_args(arguments)
    for name, figure in score(options.adapter, options.sample).items():
        print(f"{'score' if name == 'mean' else name}: {figure:.4f}")


if __name__ == "__main__":
    main()
