"""``python -m merge_engine.demo.evaluate [ADAPTER]``: measures an adapter of the demo's base; prints its score last.

The score is the mean over the tasks of the adapter's accuracy relative to that of the task's own adapter, in percent.
``--set`` is the set that the adapter was merged from. ``--sample tuning`` (the default) measures on the sample on which
the demo chooses scales, and ``--sample reported`` on the one that it reports: choose by the first, quote the second.
Without an adapter, measures the base.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from merge_engine.demo import measure
from merge_engine.demo.measure import Figures
from merge_engine.demo.sets import DEMO_SETS, HALF_KNOWN, DemoSet
from merge_engine.errors import MergeError

if TYPE_CHECKING:
    from torch import Tensor

    from merge_engine.engine.output import Merged

SAMPLES = {"tuning": measure.TUNING, "reported": measure.REPORTED}


def score(adapter: Path | None, sample: str = "tuning", name: str = HALF_KNOWN) -> Figures:
    """Percent of the accuracy of each task's own adapter, by task, and the mean. Needs transformers and peft.

    name: of a set of `DEMO_SETS`. Where it has two adapters of each task, the own one is that of the group replay.
    """
    measure.require()
    shown, seed = DEMO_SETS[name], SAMPLES[sample]
    with measure.quiet():
        found = measure.marks(shown, measure.load(shown, adapter), seed)
        figures = measure.relative(found, _own(shown, seed))
    return figures | {"mean": measure.mean(figures)}


def scorer(
    sample: str | int = "tuning", count: int | None = None, name: str = HALF_KNOWN
) -> "Callable[[Path | Merged], Figures]":
    """`score` as a function of a folder, or of a merge in memory, for a search: all but the merge is loaded once.

    sample: the name of one, or the seed of another. count: sequences of each task; default: that of the demo.
    """
    import torch

    measure.require()
    shown, seed = DEMO_SETS[name], SAMPLES[sample] if isinstance(sample, str) else sample
    count = measure.COUNT.get(seed, measure.COUNT[measure.REPORTED]) if count is None else count
    with measure.quiet():
        own, model = _own(shown, seed, count), measure.load(shown)
    layers = {name: each for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    base = {name: layer.weight.detach().clone() for name, layer in layers.items()}

    @torch.inference_mode()
    def figures(adapter: "Path | Merged") -> Figures:
        with measure.quiet():
            deltas = _deltas(adapter)
            for name, layer in layers.items():
                layer.weight.copy_(base[name] + deltas.pop(name, 0.0))
            if deltas:
                raise MergeError(f"demo: wanted modules of its base, got {next(iter(deltas))}")
            found = measure.relative(measure.marks(shown, model, seed, count), own)
        return found | {"score": measure.mean(found)}

    return figures


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


def _own(shown: DemoSet, seed: int, count: int | None = None) -> Figures:
    """Accuracy of each adapter of the first group in its own task, in percent."""
    return measure.own_marks(shown, next(iter(shown.groups.values())), seed, count)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each task, and their mean as the score."""
    parser = argparse.ArgumentParser(prog="python -m merge_engine.demo.evaluate", description=__doc__)
    parser.add_argument("adapter", nargs="?", type=Path)
    parser.add_argument("--sample", choices=SAMPLES, default="tuning")
    parser.add_argument("--set", choices=DEMO_SETS, default=HALF_KNOWN, dest="name")
    options = parser.parse_args(arguments)
    for name, figure in score(options.adapter, options.sample, options.name).items():
        print(f"{'score' if name == 'mean' else name}: {figure:.4f}")


if __name__ == "__main__":
    main()
