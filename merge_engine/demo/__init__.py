"""Six real LoRA adapters, small enough to ship, and what merging them does.

The base is a two-layer Llama that half-knows six sequence tasks, as a real base model half-knows the tasks that it is
tuned for. Each adapter was trained with PEFT on one of them. ``python -m merge_engine.demo.train`` makes the files in
``data/`` again; ``merge_engine.demo.run`` merges the adapters and measures every result.

| adapter    | its task on the letters x1..x6           | lora_A starts from              |
| ---------- | ---------------------------------------- | ------------------------------- |
| shift3     | each letter 3 further in the alphabet    | a draw of its own               |
| reverse    | in reverse order, each letter 1 further  | a draw of its own               |
| swap       | neighbours change places                 | a draw of its own               |
| rotate     | two places to the left, round the end    | the draw that these three share |
| complement | a becomes z, b becomes y, ...            | the draw that these three share |
| shift7     | each letter 7 further in the alphabet    | the draw that these three share |
"""

from pathlib import Path

DATA = Path(__file__).parent / "data"
BASE = DATA / "base"


def adapter_paths(data: Path = DATA) -> dict[str, Path]:
    """{task: folder of its adapter in ``data``}, in the order of the table above."""
    return {name: data / "adapters" / name for name in ("shift3", "reverse", "swap", "rotate", "complement", "shift7")}
