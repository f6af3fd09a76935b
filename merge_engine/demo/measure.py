"""Loads what the demo measures, by transformers and PEFT, and measures it."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_engine.demo.sets import DemoSet
from merge_engine.demo.tasks import accuracy
from merge_engine.errors import MergeError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

Figures = dict[str, float]  # by task, in percent

TUNING, REPORTED = 2, 3
"""Seeds of two samples: the best scale is chosen on the first, and every printed figure is measured on the second."""
COUNT = {TUNING: 128, REPORTED: 256}
"""Sequences of each task, by seed."""
KNOWN_COUNT = 32
"""Sequences of each of the known tasks."""


def require() -> None:
    """Raise MergeError, with what to install, if transformers or peft is missing."""
    missing = [name for name in ("transformers", "peft") if find_spec(name) is None]
    if missing:
        raise MergeError(f"demo: needs {' and '.join(missing)}: pip install 'merge-engine[peft]'")


def load(shown: DemoSet, adapter: Path | None = None) -> "PreTrainedModel | PeftModel":
    """The base, with an adapter loaded by PEFT if one is given."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(shown.base)
    return base.eval() if adapter is None else PeftModel.from_pretrained(base, str(adapter)).eval()


def marks(shown: DemoSet, model: "PreTrainedModel | PeftModel", seed: int, count: int | None = None) -> Figures:
    """Accuracy in the task of each column, in percent, of `count` sequences; None: as many as the demo takes."""
    return {
        task: 100 * accuracy(model, task, seed=seed, count=count or COUNT[seed], tasks=shown.tasks)
        for task in shown.columns
    }


def own_marks(shown: DemoSet, group: Mapping[str, Path], seed: int, count: int | None = None) -> Figures:
    """Accuracy of each adapter in its own task, in percent."""
    return {
        task: 100 * accuracy(load(shown, path), task, seed=seed, count=count or COUNT[seed], tasks=shown.tasks)
        for task, path in group.items()
    }


def known_mark(shown: DemoSet, model: "PreTrainedModel | PeftModel") -> float | None:
    """Mean accuracy in the known tasks, in percent, on the reported sample; None if the set has none."""
    found = [accuracy(model, task, seed=REPORTED, count=KNOWN_COUNT, tasks=shown.tasks) for task in shown.known]
    return 100 * sum(found) / len(found) if found else None


def relative(figures: Figures, own: Figures) -> Figures:
    """Percent of the own adapters' figures."""
    return {task: 100 * mark / own[task] for task, mark in figures.items()}


def mean(figures: Figures) -> float:
    """Mean over the tasks."""
    return sum(figures.values()) / len(figures)


@contextmanager
def scaled(model: Any, scale: float) -> Iterator[None]:
    """The model's adapter, multiplied by the scale, in the weights of the base: so it answers in half the time."""
    from peft.helpers import rescale_adapter_scale

    with rescale_adapter_scale(model, scale):
        model.merge_adapter()
        try:
            yield
        finally:
            model.unmerge_adapter()


@contextmanager
def quiet() -> Iterator[None]:
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
