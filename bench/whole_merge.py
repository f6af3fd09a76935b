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

LAYERS, HIDDEN, KEYS, MLP, RANK = 22, 2048, 256, 5632, 16
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}
WORKER = """
import json, resource, sys, time
import merge_engine
start = time.perf_counter()
result = merge_engine.merge(json.loads(sys.argv[1]), sys.argv[2], **json.loads(sys.argv[3]))
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    "kept_energy": result.total_energy,
}))
"""


def make_adapter(folder: Path, seed: int, layers: int) -> None:
    """An adapter folder as PEFT writes it: A ~ N(0, 1/in), B ~ N(0, 0.01^2), float32, alpha = 2 r."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in SHAPES.items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) / columns**0.5
            tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.01
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
    config |= {"target_modules": sorted({name.split(".")[1] for name in SHAPES}), "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def ours(folders: list[Path], output: Path, recipe: dict[str, object]) -> dict[str, float]:
    """Seconds, peak memory and kept energy of one merge in a new process."""
    arguments = [json.dumps([str(folder) for folder in folders]), str(output), json.dumps(recipe)]
    done = subprocess.run([sys.executable, "-c", WORKER, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def pefts(rows: int, columns: int, combination: str, density: float) -> float:
    """Seconds of PEFT's add_weighted_adapter on a model of one layer [rows, columns], three adapters."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(columns, rows, bias=False)),
        LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"], init_lora_weights=False),
        adapter_name="a",
    )
    for name in ("b", "c"):
        model.add_adapter(name, model.peft_config["a"])
    start = time.perf_counter()
    model.add_weighted_adapter(
        ["a", "b", "c"], [1.0] * 3, "merged", combination_type=combination, svd_rank=RANK, density=density
    )
    return time.perf_counter() - start


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
        recipe: dict[str, object] = {"method": "ties", "density": 0.2, "rank": RANK}
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
        total = 0.0
        for rows, columns in sorted(set(SHAPES.values())):
            count = options.layers * sum(shape == (rows, columns) for shape in SHAPES.values())
            seconds = pefts(rows, columns, "ties_svd", 0.2)
            total += count * seconds
            print(f"PEFT ties_svd, one {rows} x {columns} layer: {seconds:.2f} s; the model has {count}")
        print(f"PEFT ties_svd, {options.layers} layers, extrapolated from these: {total:.0f} s")


if __name__ == "__main__":
    main()
