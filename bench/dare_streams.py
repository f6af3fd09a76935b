"""DARE in the drop-in: torch's random stream, which gives PEFT's masks, beside Philox and stock PEFT.

    python -m bench.dare_streams [--output bench/results]

Processor seconds of one thread, the least of several rounds; written to dare_streams.csv.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.harness import machine
from bench.reporting.files import write_csv

NAMES, WEIGHTS = ["sql", "chat", "ads"], [2.0, 1.0, 1.0]
WORK = (("dare_linear", 88, 3), ("dare_linear_svd", 2, 2))  # (type, layers of 2048 x 2048, rounds)


def model_of(layers: int) -> Any:
    from peft import LoraConfig, get_peft_model

    base = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(layers)))
    config = {"r": 16, "target_modules": r"\d+", "init_lora_weights": False}
    model: Any = get_peft_model(base, LoraConfig(**config), NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, LoraConfig(**config))
    return model


def seconds(model: Any, add: Callable[..., None], combination: str, rounds: int, **how: Any) -> float:
    found = []
    for _ in range(rounds):
        start = time.process_time()
        add(model, NAMES, WEIGHTS, "merged", combination_type=combination, density=0.5, **how)
        found.append(time.process_time() - start)
        model.delete_adapter("merged")
    return min(found)


def stock(model: Any, *arguments: Any, **options: Any) -> None:
    model.base_model.add_weighted_adapter(*arguments, **options)


def main() -> None:
    from merge_engine.peft_backend import add_weighted_adapter

    parser = argparse.ArgumentParser(prog="python -m bench.dare_streams", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"), help="folder to write into")
    options = parser.parse_args()
    known = {"machine": machine.processor()} | machine.versions(("torch", "peft", "merge-engine"))
    rows: list[dict[str, Any]] = []
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for combination, layers, rounds in WORK:
        model = model_of(layers)
        ways = {rng: seconds(model, add_weighted_adapter, combination, rounds, rng=rng) for rng in ("torch", "philox")}
        ways["PEFT"] = seconds(model, stock, combination, rounds)
        rows += [known | {"type": combination, "layers": layers, "rng": way, "processor": s} for way, s in ways.items()]
        print(f"{combination}, {layers} layers:", ", ".join(f"{way} {took:.2f} s" for way, took in ways.items()))
    write_csv(options.output / "dare_streams.csv", list(rows[0]), rows)


if __name__ == "__main__":
    main()
