"""PEFT's add_weighted_adapter against the drop-in, in one process: ``python -m bench.peft_backend [--rounds 5]``.

svd types: two linear layers, 2048 x 2048 and 2048 x 5632; factor types and cat: all linear layers of a model of
TinyLlama's shape, 22 layers deep, the time to add the new adapter included. Three adapters of rank 16, float32.
Results are compared before anything is timed. Times are medians of interleaved rounds; memory is the peak of the
resident set above where the call began, each call in a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from merge_engine import peft_backend

NAMES, WEIGHTS, RANK, DENSITY = ["sql", "chat", "ads"], [2.0, 1.0, 1.0], 16, 0.2
SHAPES = [(2048, 2048), (2048, 5632)]
SVD_TYPES = ["svd", "ties_svd", "magnitude_prune_svd", "dare_linear_svd", "dare_ties_svd"]
FACTOR_TYPES = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune", "cat"]


def adapted(base: nn.Module, targets: list[str]) -> Any:
    """The base with three adapters of random factors."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = {"r": RANK, "lora_alpha": 32, "target_modules": targets, "init_lora_weights": False}
    model = get_peft_model(base, LoraConfig(**config), NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, LoraConfig(**config))
    return model


def hollow(rows: int, columns: int) -> nn.Linear:
    """A linear layer whose weight takes no memory: a merge looks at its shape only."""
    layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.zeros(1).expand(rows, columns), requires_grad=False)
    return layer


def two_layers() -> Any:
    return adapted(nn.ModuleDict({f"layer{i}": hollow(*shape) for i, shape in enumerate(SHAPES)}), ["layer0", "layer1"])


def tiny_llama() -> Any:
    """22 blocks of 2048 and 5632 wide linear layers, with keys and values of 256, inside modules as Llama has them."""
    shapes = {"q_proj": (2048, 2048), "k_proj": (256, 2048), "v_proj": (256, 2048), "o_proj": (2048, 2048)}
    mlp = {"gate_proj": (5632, 2048), "up_proj": (5632, 2048), "down_proj": (2048, 5632)}

    def block() -> nn.Module:
        parts = {"self_attn": shapes, "mlp": mlp}
        block = {part: nn.ModuleDict({n: hollow(*s) for n, s in layers.items()}) for part, layers in parts.items()}
        norms = {"input_layernorm": nn.RMSNorm(2048), "post_attention_layernorm": nn.RMSNorm(2048)}
        return nn.ModuleDict({**block, **norms})

    model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(block() for _ in range(22))})})
    return adapted(model, [*shapes, *mlp])


def stock(model: Any, **call: Any) -> None:
    torch.manual_seed(1)
    model.base_model.add_weighted_adapter(NAMES, WEIGHTS, "theirs", density=DENSITY, **call)


def drop_in(model: Any, **call: Any) -> None:
    peft_backend.add_weighted_adapter(model, NAMES, WEIGHTS, "ours", density=DENSITY, **call)


RIVALS: dict[str, Callable[..., None]] = {"theirs": stock, "ours": drop_in}


def compare(model: Any, combination: str) -> None:
    """Both once, and their results: factors of equal bits but for ties, svd types of equal error."""
    drawn = {"rng": "torch", "seed": 1} if "dare" in combination else {}
    stock(model, combination_type=combination)
    drop_in(model, combination_type=combination, **drawn)
    for name, layer in model.named_modules():
        if not hasattr(layer, "get_delta_weight"):
            continue
        if combination in FACTOR_TYPES:
            for slots in (layer.lora_A, layer.lora_B):
                theirs, ours = slots["theirs"].weight, slots["ours"].weight
                assert int((theirs != ours).sum()) <= 8, f"{combination}: {name} differs in more than a few ties"
        else:
            theirs, ours = (layer.get_delta_weight(adapter).double() for adapter in RIVALS)
            # Cuts of one rank of one matrix, both near the best: they differ by little, and keep as much of it.
            assert (theirs - ours).norm() <= 0.02 * theirs.norm(), f"{combination}: {name} differs"
            assert ours.norm() >= theirs.norm() * (1 - 1e-4), f"{combination}: {name} keeps less"
    for adapter in RIVALS:
        model.delete_adapter(adapter)


def seconds(model: Any, combination: str, rounds: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {rival: [] for rival in RIVALS}
    for _ in range(rounds):
        for rival, add in RIVALS.items():
            start = time.perf_counter()
            add(model, combination_type=combination)
            taken[rival].append(time.perf_counter() - start)
            model.delete_adapter(rival)
    return {rival: statistics.median(times) for rival, times in taken.items()}


def extra_memory(build: str, combination: str, rival: str) -> float:
    """MiB of resident memory that one call needs at its peak, beyond where it began, in a process of its own."""
    command = [sys.executable, "-m", "bench.peft_backend", "--peak", build, combination, rival]
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0"}  # what was freed before does not count as there
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(json.loads(done.stdout.splitlines()[-1]))


def peak(build: str, combination: str, rival: str) -> None:
    model = BUILDS[build]()
    warm = adapted(nn.ModuleDict({"layer": nn.Linear(64, 64)}), ["layer"])
    RIVALS[rival](warm, combination_type=combination)  # imports, threads, and libraries' own buffers
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    RIVALS[rival](model, combination_type=combination)
    print(json.dumps((_status("VmHWM") - before) / 1024))


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


BUILDS: dict[str, Callable[[], Any]] = {"two layers": two_layers, "TinyLlama": tiny_llama}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of the factor types; the svd types take three")
    parser.add_argument("--types", nargs="*", default=SVD_TYPES + FACTOR_TYPES)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    if asked.peak:
        peak(*asked.peak)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    print("| type | model | PEFT s | drop-in s | faster | PEFT MiB | drop-in MiB | less memory |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    models = {name: build() for name, build in BUILDS.items()}
    for combination in asked.types:
        name = "two layers" if combination in SVD_TYPES else "TinyLlama"
        compare(models[name], combination)
        took = seconds(models[name], combination, 3 if combination in SVD_TYPES else asked.rounds)
        used = {rival: extra_memory(name, combination, rival) for rival in RIVALS}
        speed, memory = took["theirs"] / took["ours"], used["theirs"] / max(used["ours"], 1)
        print(
            f"| {combination} | {name} | {took['theirs']:.3f} | {took['ours']:.4f} | {speed:.1f}x "
            f"| {used['theirs']:.0f} | {used['ours']:.0f} | {memory:.1f}x |",
            flush=True,
        )


if __name__ == "__main__":
    main()
