"""Merges of whole full models beside mergekit-yaml: whole processes in turn, from the command to its end.

python -m bench.whole_models --mergekit mergekit-yaml [--methods slerp della model_stock sce] [--rounds 1]

Three bfloat16 models of one base, Llamas of 134M parameters. Prints seconds, peak memory and bytes of the output of
both, and the largest difference of the results relative to a tensor's norm, for methods that do not draw. Both write to
a disk. It needs 1.6 GB there, and is not part of a report.
"""

import argparse
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bench.harness.disk import make_base
from bench.harness.inputs import LLAMA_134M, MODELS
from bench.harness.measure import Sample
from bench.harness.processes import whole_process

PARAMETERS: dict[str, dict[str, Any]] = {
    "slerp": {"t": 0.5},
    "della": {"weight": 0.5, "density": 0.5, "epsilon": 0.1},
    "model_stock": {},
    "sce": {"select_topk": 0.5},
    "ties": {"weight": 0.5, "density": 0.5, "rescale": True},
    "nuslerp": {"weight": 0.5},
    "breadcrumbs": {"weight": 0.5, "density": 0.5},
    "karcher": {},
}
RANDOM = ("della",)


def make_models(folder: Path, layers: int, model: str) -> None:
    """base, and two models tuned from it: a fiftieth of its size away."""
    make_base(folder / "base", layers, MODELS[model])
    base = load_file(folder / "base" / "model.safetensors")
    for seed, name in enumerate(("one", "two"), 1):
        generator = torch.Generator().manual_seed(seed)
        tuned = {
            key: (tensor.float() + 4e-4 * torch.randn(tensor.shape, generator=generator)).bfloat16()
            for key, tensor in base.items()
        }
        (folder / name).mkdir()
        save_file(tuned, folder / name / "model.safetensors", metadata={"format": "pt"})
        shutil.copy(folder / "base" / "config.json", folder / name / "config.json")


def write_recipe(folder: Path, method: str) -> Path:
    names = ["one"] if method == "slerp" else ["one", "two"]
    recipe: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16", "parameters": PARAMETERS[method]}
    recipe["models"] = [{"model": str(folder / name)} for name in names]
    if method not in ("karcher", "nuslerp"):
        recipe["base_model"] = str(folder / "base")
    file = folder / f"{method}.yml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def far_apart(one: Path, two: Path) -> float:
    """The largest distance of two tensors, relative to the norm."""
    far = 0.0
    with safe_open(one / "model.safetensors", "pt") as ours, safe_open(two / "model.safetensors", "pt") as theirs:
        for key in theirs.keys():
            a, b = ours.get_tensor(key).float(), theirs.get_tensor(key).float()
            far = max(far, float((a - b).norm() / b.norm()))
    return far


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", default="mergekit-yaml")
    parser.add_argument("--methods", nargs="+", default=["slerp", "della", "model_stock", "sce"], choices=PARAMETERS)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--model", default=LLAMA_134M, choices=MODELS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        make_models(folder, options.layers, options.model)
        for method in options.methods:
            recipe = write_recipe(folder, method)
            commands = {
                "ours": [sys.executable, "-m", "merge_engine", "merge", str(recipe), "-o", str(folder / "ours")],
                "mergekit": [
                    *shlex.split(options.mergekit),
                    *(str(recipe), str(folder / "mergekit"), "--no-copy-tokenizer", "--no-write-model-card"),
                ],
            }
            best: dict[str, Sample] = {}
            for _ in range(options.rounds):
                for name, command in commands.items():
                    shutil.rmtree(folder / name, ignore_errors=True)
                    sample = whole_process(command)
                    if name not in best or sample.seconds < best[name].seconds:
                        best[name] = sample
            told = [
                f"{name} {best[name].seconds:.1f} s (CPU {best[name].processor or 0:.1f} s), "
                f"{(best[name].peak_mib or 0) / 1024:.2f} GiB, "
                f"{sum(f.stat().st_size for f in (folder / name).glob('*.safetensors')) / 1e9:.3f} GB written"
                for name in commands
            ]
            times = best["mergekit"].seconds / best["ours"].seconds
            far = "" if method in RANDOM else f"; apart {far_apart(folder / 'ours', folder / 'mergekit'):.1e}"
            print(f"{method}: {'; '.join(told)}: {times:.1f} times as fast{far}", flush=True)


if __name__ == "__main__":
    main()
