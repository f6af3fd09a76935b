"""Two sets of real LoRA adapters, small enough to ship, and what merging them does.

The base of each is a two-layer Llama for sequences of letters; each adapter was trained with PEFT on one task.
``merge_engine.demo.run`` merges the adapters and measures every result.

Set half-known: the base half-knows six tasks, as a real base model half-knows the tasks that it is tuned for.
``python -m merge_engine.demo.train`` makes its files in ``data/`` again.

| adapter    | its task on the letters x1..x6           | lora_A starts from              |
| ---------- | ---------------------------------------- | ------------------------------- |
| shift3     | each letter 3 further in the alphabet    | a draw of its own               |
| reverse    | in reverse order, each letter 1 further  | a draw of its own               |
| swap       | neighbours change places                 | a draw of its own               |
| rotate     | two places to the left, round the end    | the draw that these three share |
| complement | a becomes z, b becomes y, ...            | the draw that these three share |
| shift7     | each letter 7 further in the alphabet    | the draw that these three share |

Set unknown: the base does eight other tasks and knows nothing of four of these (reverse, rotate, complement, shift7).
Each of the four has two adapters: "alone" was trained on its own task only, and "replay" on its own task in half of
each batch, and on the eight in the other half. ``python -m merge_engine.demo.train_unknown`` makes them again.
"""

from pathlib import Path

DATA = Path(__file__).parent / "data"
BASE = DATA / "base"
UNKNOWN_DATA = DATA / "unknown"

SETS = ("half-known", "unknown")
"""What ``merge-engine demo --set`` takes."""


def adapter_paths(data: Path = DATA) -> dict[str, Path]:
    """{task: folder of its adapter in ``data``}, in the order of the table above."""
    return {name: data / "adapters" / name for name in ("shift3", "reverse", "swap", "rotate", "complement", "shift7")}


def unknown_paths(kind: str = "replay", data: Path = UNKNOWN_DATA) -> dict[str, Path]:
    """{task: folder of its adapter} of the set unknown. kind: "replay" or "alone"."""
    return {name: data / kind / name for name in ("reverse", "rotate", "complement", "shift7")}
