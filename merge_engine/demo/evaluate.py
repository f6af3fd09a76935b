"""``python -m merge_engine.demo.evaluate [ADAPTER]``: measures an adapter of the demo's base; prints its score last.

The score is the mean over the six tasks of the adapter's accuracy relative to that of the task's own adapter, in
percent. ``--sample tuning`` (the default) measures on the sample on which the demo chooses scales, and ``--sample
reported`` on the one that it reports: choose by the first, quote the second. Without an adapter, measures the base.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from merge_engine.demo import run
from merge_engine.errors import MergeError

if TYPE_CHECKING:
    from torch import Tensor

    from merge_engine.engine.output import Merged

SAMPLES = {"tuning": run.TUNING, "reported": run.REPORTED}


def score(adapter: Path | None, sample: str = "tuning") -> dict[str, float]:
    """Percent of the accuracy of each task's own adapter, by task, and the mean. Needs transformers and peft."""
    run._require()
    seed = SAMPLES[sample]
    with run._quiet():
        figures = run._relative(run._marks(run._load(adapter), seed), run._own_marks(seed))
    return figures | {"mean": run._mean(figures)}


def scorer(sample: str | int = "tuning", count: int | None = None) -> "Callable[[Path | Merged], dict[str, float]]":
    """`score` as a function of a folder, or of a merge in memory, for a search: all but the merge is loaded once.

    sample: the name of one, or the seed of another. count: sequences of each task; default: that of the demo.
    """
    import torch

    run._require()
    seed = SAMPLES[sample] if isinstance(sample, str) else sample
    count = run.COUNT.get(seed, run.COUNT[run.REPORTED]) if count is None else count
    with run._quiet():
        own, model = run._own_marks(seed, count), run._load()
    layers = {name: each for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    base = {name: layer.weight.detach().clone() for name, layer in layers.items()}

    @torch.inference_mode()
    def measure(adapter: "Path | Merged") -> dict[str, float]:
        with run._quiet():
            deltas = _deltas(adapter)
            for name, layer in layers.items():
                layer.weight.copy_(base[name] + deltas.pop(name, 0.0))
            if deltas:
                raise MergeError(f"demo: wanted modules of its base, got {next(iter(deltas))}")
            figures = run._relative(run._marks(model, seed, count), own)
        return figures | {"score": run._mean(figures)}

    return measure


def _deltas(adapter: "Path | Merged") -> "dict[str, Tensor]":
    """{module: B @ A}."""
    from merge_engine.engine.output import Merged
    from merge_engine.formats.open import open_adapters

    if isinstance(adapter, Merged):
        if adapter.path is None:
            return {name: B @ A for name, (A, B, _) in adapter.modules.items()}
        adapter = adapter.path
    (opened,) = open_adapters([adapter])
    factors = {name: opened.factors(name) for name in opened.modules}
    return {name: opened.modules[name].scaling * (B.float() @ A.float()) for name, (A, B) in factors.items()}


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
