"""``python -m merge_engine.demo.train_unknown [--output DIR] [--seed N]``: makes the set unknown again.

The base is trained on eight tasks until it does them all. It has never seen the tokens of the four others, and knows
nothing of them. Each of these four has two adapters, of the same rank, steps and learning rate:

alone   every batch is of the adapter's own task. Nothing says what the weights have to leave as it is, and the base's
        eight tasks are lost.
replay  half of every batch is drawn from the base's eight tasks. Of the other three new tasks it sees nothing either.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from merge_engine.demo import UNKNOWN_DATA, unknown_paths
from merge_engine.demo.tasks import ALL_TASKS, KNOWN, accuracy, draw, vocabulary
from merge_engine.demo.train import MARKS, fit_adapter, run, save_adapter, small_llama, step

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

BASE_NAME = "merge-engine-demo-base-unknown"
SEED = 0
"""Seed of the bundled files: the first that was tried."""
CLIP = 1.0


def train_base(seed: int, *, steps: int = 500, batch: int = 128, lr: float = 2e-3) -> "PreTrainedModel":
    """A Llama that does the eight known tasks, by one cycle of Adam. Its head is not its embedding: see below.

    A head that is the embedding would push the embeddings of all tokens that are never an answer to one direction, and
    the tokens of the new tasks would be almost the same.
    """
    model = small_llama(vocabulary(ALL_TASKS), seed, tied=False)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        step(model, _known(batch, generator), optimizer, clip=CLIP)
        schedule.step()
    return model.eval()


def train_adapter(
    base: "PreTrainedModel",
    task: str,
    seed: int,
    *,
    replay: bool,
    steps: int = 400,
    batch: int = 64,
    lr: float = 3e-3,
) -> "PeftModel":
    """A LoRA of rank 8 for one new task. replay: half of each batch is of the tasks that the base knows."""
    seed += 1 + list(ALL_TASKS).index(task)
    generator = torch.Generator().manual_seed(seed)

    def sequences() -> torch.Tensor:
        if not replay:
            return draw(task, batch, generator, ALL_TASKS)
        return torch.cat([draw(task, batch // 2, generator, ALL_TASKS), _known(batch // 2, generator)])

    return fit_adapter(base, sequences, name=BASE_NAME, seed=seed, steps=steps, lr=lr, clip=CLIP)


def _known(count: int, generator: torch.Generator) -> torch.Tensor:
    """Sequences of the tasks that the base knows, as many of each: tokens ``[count, 14]``."""
    return torch.cat([draw(task, count // len(KNOWN), generator, ALL_TASKS) for task in KNOWN])


def train(output: Path, seed: int) -> None:
    """Train the base and the eight adapters, and write them to ``base``, ``replay/<task>`` and ``alone/<task>``.

    Uses one thread, so that the files do not depend on the number of cores.
    """
    torch.set_num_threads(1)
    base = train_base(seed)
    base.save_pretrained(output / "base")
    for task in ALL_TASKS:
        log.info("%-10s base %.3f", task, accuracy(base, task, seed=MARKS, tasks=ALL_TASKS))
    for kind in ("replay", "alone"):
        for task, folder in unknown_paths(kind, output).items():
            model = train_adapter(base, task, seed, replay=kind == "replay")
            save_adapter(model, folder)
            marks = {name: accuracy(model, name, seed=MARKS, tasks=ALL_TASKS) for name in (task, *KNOWN)}
            known = sum(marks[name] for name in KNOWN) / len(KNOWN)
            log.info("%s %-10s accuracy %.3f, of the known tasks %.3f", kind, task, marks[task], known)


if __name__ == "__main__":
    run("python -m merge_engine.demo.train_unknown", train, UNKNOWN_DATA, SEED)
