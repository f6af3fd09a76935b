"""``merge-engine demo``: merges the bundled adapters by several methods, loads each result by PEFT and measures it."""

import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_engine.demo import BASE, adapter_paths
from merge_engine.errors import MergeError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

Figures = dict[str, float]  # by task, in percent

MERGES: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear"},
    "linear, auto": {"method": "linear", "scale": "auto"},
    "tsv": {"method": "tsv"},
    "tsv, auto": {"method": "tsv", "scale": "auto"},
    "tsv, auto, rank 8": {"method": "tsv", "scale": "auto", "rank": 8},
    "iso_c": {"method": "iso_c"},
    "actmat": {"method": "actmat"},
    "actmat, ridge .3": {"method": "actmat", "ridge": 0.3},
    "magnitude_prune d=.2": {"method": "magnitude_prune", "density": 0.2},
    "ties d=.2": {"method": "ties", "density": 0.2},
    "ties d=.2, rank 8": {"method": "ties", "density": 0.2, "rank": 8},
    "ties d=.5, knots": {"method": "ties", "density": 0.5, "space": "knots"},
    "dare_linear d=.2": {"method": "dare_linear", "density": 0.2},
    "dare_ties d=.5": {"method": "dare_ties", "density": 0.5},
    "linear, factors": {"method": "linear", "space": "factors"},
    "ties d=.5, factors": {"method": "ties", "density": 0.5, "space": "factors"},
}
SCALES = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
TUNING, REPORTED = 2, 3
"""Seeds of two samples: the best scale is chosen on the first, and every printed figure is measured on the second."""
COUNT = {TUNING: 128, REPORTED: 256}
"""Sequences of each task, by seed."""

NAME_WIDTH = 30
ABOUT = """\
Six LoRA adapters of one small Llama, each trained on a task of its own, merged into one adapter by each method.
Each result is written to disk, loaded with transformers and PEFT, and measured on all six tasks.
"""
LEGEND = """
d        density: share of the elements that a method keeps (dare: at random)
auto     scale="auto": each merged layer is as large as the adapters' are on average; the last columns multiply it
knots    the products' coordinates in the column space that all adapters share are merged
factors  A and B are merged separately, as by PEFT's linear and ties; the other rows merge the products B @ A
rank 8   the result is cut to rank 8; it has up to 48, the sum of the adapters' ranks, in the other rows
scale    multiplies the merged adapter; all is at scale 1 but the last column, at the best scale of
         {scales}, chosen on a sample of its own
"""


@dataclass(frozen=True)
class Row:
    """One line of the table; figures in percent by task.

    kind: "accuracy" (share of letters that are right) or "relative" (this, divided by that of the task's own adapter).
    figures: at scale 1. best_scale: the scale of `SCALES` with the highest mean. best: the figures at that scale.
    """

    name: str
    kind: str
    figures: Figures
    best_scale: float | None = None
    best: Figures = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean over tasks at scale 1, in percent."""
        return _mean(self.figures)

    @property
    def best_mean(self) -> float:
        """Mean over tasks at the best scale, in percent."""
        return _mean(self.best)


def run(print_line: Callable[[str], object]) -> list[Row]:
    """Merge and measure; call ``print_line`` with each line of the table as soon as it is known. Returns the rows.

    Raises MergeError if transformers or peft is not installed.
    """
    started = time.perf_counter()
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        print_line(_line(row))

    _require()
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        adapters = adapter_paths()
        base = _marks(_load(), REPORTED)
        own = {seed: _own_marks(seed) for seed in (TUNING, REPORTED)}
        print_line(ABOUT)
        print_line(_head("accuracy, % of letters right", tuned=False))
        add(Row("base, no adapter", "accuracy", base))
        add(Row("the task's own adapter", "accuracy", own[REPORTED]))
        print_line("")
        print_line(_head("% of the own adapter's figure", tuned=True))
        add(Row("base, no adapter", "relative", _relative(base, own[REPORTED])))
        for name, recipe in MERGES.items():
            add(_measure(name, _merge(list(adapters.values()), Path(folder) / name, recipe), own))
    print_line(LEGEND.format(scales=", ".join(f"{scale:g}" for scale in SCALES)))
    print_line(f"Done in {time.perf_counter() - started:.0f} s.")
    return rows


def _require() -> None:
    """Raise MergeError, with what to install, if transformers or peft is missing."""
    missing = [name for name in ("transformers", "peft") if find_spec(name) is None]
    if missing:
        raise MergeError(f"demo: needs {' and '.join(missing)}: pip install 'merge-engine[peft]'")


def _merge(adapters: list[Path], output: Path, recipe: dict[str, Any]) -> Path:
    """Merge the adapters; the folder of the result."""
    from merge_engine import merge

    merge(adapters, output, progress=False, **recipe)
    return output


def _load(adapter: Path | None = None) -> "PreTrainedModel | PeftModel":
    """The base, with an adapter loaded by PEFT if one is given."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(BASE)
    return base.eval() if adapter is None else PeftModel.from_pretrained(base, str(adapter)).eval()


def _marks(model: "PreTrainedModel | PeftModel", seed: int, count: int | None = None) -> Figures:
    """Accuracy in each task, in percent, over `count` sequences; None: as many as the demo has of this sample."""
    from merge_engine.demo.tasks import TASKS, accuracy

    return {task: 100 * accuracy(model, task, seed=seed, count=count or COUNT[seed]) for task in TASKS}


def _own_marks(seed: int, count: int | None = None) -> Figures:
    """Accuracy of each adapter in its own task, in percent."""
    from merge_engine.demo.tasks import accuracy

    return {
        task: 100 * accuracy(_load(path), task, seed=seed, count=count or COUNT[seed])
        for task, path in adapter_paths().items()
    }


def _measure(name: str, adapter: Path, own: dict[int, Figures]) -> Row:
    """The row of one merged adapter; own: {seed: accuracy of each task's own adapter}.

    A scale multiplies the merged delta: PEFT applies it to the loaded adapter, and nothing is merged again.
    """
    model = _load(adapter)

    @cache
    def relative(scale: float, seed: int) -> Figures:
        with _scaled(model, scale):
            return _relative(_marks(model, seed), own[seed])

    best_scale = max(SCALES, key=lambda scale: _mean(relative(scale, TUNING)))
    return Row(name, "relative", relative(1.0, REPORTED), best_scale, relative(best_scale, REPORTED))


@contextmanager
def _scaled(model: Any, scale: float) -> Iterator[None]:
    """The model's adapter, multiplied by the scale, in the weights of the base: so it answers in half the time."""
    from peft.helpers import rescale_adapter_scale

    with rescale_adapter_scale(model, scale):
        model.merge_adapter()
        try:
            yield
        finally:
            model.unmerge_adapter()


def _relative(marks: Figures, own: Figures) -> Figures:
    return {task: 100 * mark / own[task] for task, mark in marks.items()}


def _mean(figures: Figures) -> float:
    return sum(figures.values()) / len(figures)


def _head(title: str, *, tuned: bool) -> str:
    columns = "".join(f"{name:>{_width(name)}}" for name in [*adapter_paths(), "mean"])
    return f"{title:{NAME_WIDTH}}{columns}" + ("   best scale  mean there" if tuned else "")


def _line(row: Row) -> str:
    columns = "".join(f"{value:{_width(name)}.1f}" for name, value in [*row.figures.items(), ("mean", row.mean)])
    tuned = "" if row.best_scale is None else f"   {row.best_scale:10g}{row.best_mean:12.1f}"
    return f"{row.name:{NAME_WIDTH}}{columns}{tuned}"


def _width(name: str) -> int:
    return max(len(name), 5) + 2


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without progress bars and warnings, and torch with one thread, inside the block.

    Layers of this size gain little from a second thread, and lose much where threads wait for each other on busy cores.
    """
    import torch
    from transformers.utils import logging as chatter

    # peft imports bitsandbytes, which warns on some CPUs that a kernel of the hub is missing: none is used here.
    bitsandbytes = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = bitsandbytes.level
    bitsandbytes.setLevel(logging.ERROR)
    verbosity, bars, threads = chatter.get_verbosity(), chatter.is_progress_bar_enabled(), torch.get_num_threads()
    torch.set_num_threads(1)
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # what peft still calls and transformers will drop
            yield
    finally:
        bitsandbytes.setLevel(level)
        torch.set_num_threads(threads)
        chatter.set_verbosity(verbosity)
        if bars:
            chatter.enable_progress_bar()
