"""The tasks: their sequences, how these are drawn, and how a model's accuracy is measured.

A sequence is ``[TASK] x1..x6 [SEP] y1..y6``: letters x, and the letters y that the task makes of them.
Tokens 0..25 are the letters, 26 is SEP, and 27.. are the tasks of a set in their order: ``TASKS`` of the set
half-known, and ``ALL_TASKS`` of the set unknown.
"""

import zlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

LETTERS = 26
LENGTH = 6
SEP = LETTERS
SWAPPED = [1, 0, 3, 2, 5, 4]

Task = Callable[[Tensor], Tensor]
"""Letters x ``[..., 6]`` to letters y."""

TASKS: dict[str, Task] = {
    "shift3": lambda x: (x + 3) % LETTERS,
    "reverse": lambda x: (x.flip(-1) + 1) % LETTERS,
    "swap": lambda x: x[..., SWAPPED],
    "rotate": lambda x: x.roll(-2, -1),
    "complement": lambda x: LETTERS - 1 - x,
    "shift7": lambda x: (x + 7) % LETTERS,
}
KNOWN: dict[str, Task] = {
    "copy": lambda x: x,
    "backwards": lambda x: x.flip(-1),
    "neighbours": lambda x: x[..., SWAPPED],
    "left": lambda x: x.roll(-1, -1),
    "halves": lambda x: x.roll(3, -1),
    "shift1": lambda x: (x + 1) % LETTERS,
    "shift5": lambda x: (x + 5) % LETTERS,
    "back1": lambda x: (x - 1) % LETTERS,
}
"""What the base of the set unknown is trained on."""

UNKNOWN = ("reverse", "rotate", "complement", "shift7")
"""What its adapters are trained on; the base has never seen these tokens."""

ALL_TASKS = KNOWN | {name: TASKS[name] for name in UNKNOWN}


def vocabulary(tasks: Mapping[str, Task]) -> int:
    """Number of tokens."""
    return SEP + 1 + len(tasks)


def draw(task: str, count: int, generator: torch.Generator, tasks: Mapping[str, Task] = TASKS) -> Tensor:
    """``count`` sequences of one of the ``tasks`` with uniform letters: tokens ``[count, 14]``, int64."""
    x = torch.randint(LETTERS, (count, LENGTH), generator=generator)
    name = torch.full((count, 1), SEP + 1 + list(tasks).index(task))
    return torch.cat([name, x, torch.full((count, 1), SEP), tasks[task](x)], dim=1)


def predict(model: nn.Module, tokens: Tensor) -> Tensor:
    """A causal language model's logits ``[count, 6, vocabulary]`` of y1..y6, each from the true ``tokens`` before it.

    tokens: ``[count, 14]``, as from `draw`.
    """
    return model(input_ids=tokens[:, :-1], use_cache=False).logits[:, -LENGTH:]


@torch.inference_mode()
def accuracy(model: nn.Module, task: str, *, seed: int, count: int = 256, tasks: Mapping[str, Task] = TASKS) -> float:
    """The share of letters y that the model predicts first, over ``count`` sequences drawn from ``seed``.

    The sample depends on the task and the seed only: all models are measured on the same sequences.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{task} {seed}".encode()))
    tokens = draw(task, count, generator, tasks)
    return (predict(model, tokens).argmax(-1) == tokens[:, -LENGTH:]).float().mean().item()
