"""A whole TinyLlama-shaped merge, and PEFT's own code on one layer of each shape: python -m bench.whole_merge

Three rank-16 adapters of every linear layer of a 22-layer, 2048-wide Llama (random factors of a trained adapter's
size; what they hold does not change the work), merged from disk to disk without a base model, in a process of its own
so that its peak memory is its own. PEFT's `add_weighted_adapter` needs the base model and takes minutes, so it is run
on a model of one layer of each shape, and its time for the whole is extrapolated in the open: by layers of that shape.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.inputs import LAYERS, RANK, SCALING, TINY_LLAMA, adapted, hollow, make_adapter

WORKER = """
import json, re, sys, time
from pathlib import Path
import merge_engine
start = time.perf_counter()
result = merge_engine.merge(json.loads(sys.argv[1]), sys.argv[2], **json.loads(sys.argv[3]))
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "peak_gb": int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9,
    "kept_energy": result.total_energy,
}))
"""


def ours(folders: list[Path], output: Path, recipe: dict[str, Any]) -> dict[str, float]:
    """Seconds, peak memory and kept energy of one merge in a new process."""
    arguments = [json.dumps([str(folder) for folder in folders]), str(output), json.dumps(recipe)]
    done = subprocess.run([sys.executable, "-c", WORKER, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def excess(folders: list[Path], output: Path, method: str, density: float, rank: int) -> float:
    """By how much |D - B A| of one module of the output exceeds the best cut of its merged delta D by `reference`."""
    import torch
    from safetensors import safe_open

    from merge_engine import reference
    from merge_engine.rule import make_rule

    stem = "base_model.model.model.layers.0.self_attn.k_proj"

    def pair(folder: Path) -> list[torch.Tensor]:
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            return [file.get_tensor(f"{stem}.lora_{side}.weight") for side in "AB"]

    deltas = {number: reference.delta(*pair(folder), SCALING) for number, folder in enumerate(folders)}
    count = len(folders)
    exact = reference.merge_model({"": deltas}, [1.0] * count, {"": [density] * count}, make_rule(method))[""].double()
    scaling = json.loads((output / "adapter_config.json").read_text())
    A, B = pair(output)
    error = (exact - scaling["lora_alpha"] / scaling["r"] * (B.double() @ A.double())).norm()
    best = torch.linalg.svdvals(exact)[rank:].norm()
    return float(error / best) - 1


def pefts(rows: int, columns: int, combination: str, density: float) -> float:
    """Seconds of PEFT's add_weighted_adapter on a model of one layer [rows, columns], three adapters."""
    import torch

    names = ["sql", "chat", "ads"]
    model = adapted(torch.nn.ModuleDict({"layer": hollow(rows, columns)}), ["layer"], names)
    start = time.perf_counter()
    model.add_weighted_adapter(names, [1.0] * 3, "merged", combination_type=combination, svd_rank=RANK, density=density)
    return time.perf_counter() - start


def extrapolated(combination: str, density: float, layers: int) -> dict[tuple[int, int], tuple[int, float]]:
    """{shape: (how many layers the model has of it, PEFT's seconds for one)}."""
    shapes = list(TINY_LLAMA.values())
    return {shape: (layers * shapes.count(shape), pefts(*shape, combination, density)) for shape in sorted(set(shapes))}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.whole_merge", description=__doc__)
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the model that is merged (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="of the whole merge; the median counts")
    parser.add_argument("--skip-peft", action="store_true", help="do not run PEFT for comparison (about two minutes)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, name) for name in ("a", "b", "c")]
        for seed, folder in enumerate(folders):
            make_adapter(folder, seed, options.layers)
        recipe: dict[str, Any] = {"method": "ties", "density": 0.2, "rank": RANK}
        runs = sorted(
            (ours(folders, Path(scratch, f"out{run}"), recipe) for run in range(options.runs)),
            key=lambda run: run["seconds"],
        )
        middle = runs[len(runs) // 2]
        print(
            f"merge-engine, {options.layers} layers, {recipe}: median {middle['seconds']:.1f} s "
            f"({runs[0]['seconds']:.1f} to {runs[-1]['seconds']:.1f}), "
            f"peak {max(run['peak_gb'] for run in runs):.2f} GB, kept energy {middle['kept_energy']:.3f}"
        )
    if not options.skip_peft:
        by_shape = extrapolated("ties_svd", 0.2, options.layers)
        for (rows, columns), (count, seconds) in by_shape.items():
            print(f"PEFT ties_svd, one {rows} x {columns} layer: {seconds:.2f} s; the model has {count}")
        total = sum(count * seconds for count, seconds in by_shape.values())
        print(f"PEFT ties_svd, {options.layers} layers, extrapolated from these: {total:.0f} s")


if __name__ == "__main__":
    main()
