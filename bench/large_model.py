"""A model that does not fit in memory: adapters of a Llama-70B shape, made a layer at a time, merged disk to disk.

python -m bench.large_model [--model Llama-70B] [--adapters 3] [--method tsv] [--scale auto] [--folder DIR]

Prints seconds of the whole process, seconds of CPUs, peak memory and bytes read and written; and, measured apart, the
seconds that importing torch takes, and reading every factor and writing as many bytes as the result has, with nothing
in between. It needs 2.7 GB of disk for three adapters in bfloat16 and their result, and is not part of a report.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.harness import machine
from bench.harness.inputs import LAYERS, RANK, SCALING, TINY_LLAMA, Shapes, factors, llama
from bench.reporting.files import write_csv
from merge_engine.files.safetensors_writer import SafetensorsWriter

MODELS = {"Llama-70B": (llama(8192, 1024, 28672), 80), "TinyLlama": (TINY_LLAMA, LAYERS)}  # shapes and layers
MERGE = (
    "import json, resource, sys, time; start = time.perf_counter(); import merge_engine; "
    "merged = merge_engine.merge(json.loads(sys.argv[1]), sys.argv[2], progress=False, **json.loads(sys.argv[3])); "
    "used = resource.getrusage(resource.RUSAGE_SELF); "
    "status = dict(line.split(':') for line in open('/proc/self/status') if 'Vm' in line); "
    "print(json.dumps({'seconds': time.perf_counter() - start, 'processor': used.ru_utime + used.ru_stime, "
    "'peak_gb': int(status['VmHWM'].split()[0]) * 1024 / 1e9, 'energy': merged.total_energy}))"
)
COPY = (
    "import json, sys, time; from merge_engine import open_adapter; import torch; start = time.perf_counter(); "
    "[adapter.factors(name) for adapter in map(open_adapter, json.loads(sys.argv[1])) for name in adapter.modules]; "
    "block = bytearray(1 << 26); left = int(sys.argv[3]); file = open(sys.argv[2], 'wb', buffering=0)\n"
    "while left > 0: left -= file.write(memoryview(block)[:left])\n"
    "import os; os.fsync(file.fileno()); print(time.perf_counter() - start)"
)


def make_adapter(folder: Path, seed: int, shapes: Shapes, layers: int, dtype: torch.dtype) -> Path:
    """An adapter of all linear modules, written module by module."""
    folder.mkdir(parents=True)
    names = [f"model.layers.{layer}.{name}" for layer in range(layers) for name in shapes]
    keys = [f"base_model.model.{name}.lora_{side}.weight" for name in names for side in "AB"]
    generator = torch.Generator().manual_seed(seed)
    with SafetensorsWriter(folder / "adapter_model.safetensors", keys) as writer:
        for name in names:
            pair = factors(*shapes[name.split(".", 3)[3]], RANK, generator)
            for side, tensor in zip("AB", pair, strict=True):
                writer.add(f"base_model.model.{name}.lora_{side}.weight", tensor.to(dtype))
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": SCALING * RANK, "base_model_name_or_path": "llama"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def child(code: str, *arguments: str) -> str:
    """What a process of its own prints."""
    return subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True).stdout


def _add(row: dict[str, Any], folder: Path) -> None:
    """Put a row into large_model.csv, in place of one of the same work."""
    path, work = folder / "large_model.csv", ("model", "layers", "adapters", "method")
    others: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            others = [each for each in csv.DictReader(file) if any(each[key] != str(row[key]) for key in work)]
    write_csv(path, list(row), [*others, row])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.large_model", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="Llama-70B")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--adapters", type=int, default=3)
    parser.add_argument("--method", default="tsv")
    parser.add_argument("--scale", default="auto")
    parser.add_argument("--folder", type=Path, help="where files are made, and removed (default: a temporary folder)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="put a row into DIR/large_model.csv, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        shapes, layers = MODELS[options.model]
        layers = options.layers or layers
        made = [
            make_adapter(Path(folder, f"adapter{i}"), i, shapes, layers, torch.bfloat16)
            for i in range(options.adapters)
        ]
        sources, output = json.dumps([str(path) for path in made]), Path(folder, "merged")
        scale = options.scale if options.scale == "auto" else float(options.scale)
        started = time.perf_counter()
        found = json.loads(child(MERGE, sources, str(output), json.dumps({"method": options.method, "scale": scale})))
        whole = time.perf_counter() - started
        written = (output / "adapter_model.safetensors").stat().st_size
        read = sum((path / "adapter_model.safetensors").stat().st_size for path in made)
        started = time.perf_counter()
        child("import torch")
        importing = time.perf_counter() - started
        copying = float(child(COPY, sources, str(Path(folder, "copy")), str(written)))
        if options.output is not None:
            row = {"model": options.model, "layers": layers, "adapters": options.adapters, "method": options.method}
            row |= {"seconds": whole, "processor": found["processor"], "peak_gb": found["peak_gb"]}
            row |= {"importing": importing, "copying": copying}
            _add({"machine": machine.processor()} | machine.versions(("torch", "merge-engine")) | row, options.output)
        print(f"{options.model}, {layers} layers, {options.adapters} adapters of rank {RANK}, {options.method}:")
        print(f"  whole process  {whole:.1f} s, {found['processor']:.1f} s of CPUs, peak {found['peak_gb']:.2f} GB")
        print(f"  kept energy    {found['energy']:.6f}")
        print(f"  files          {read / 1e9:.2f} GB read, {written / 1e9:.2f} GB written")
        print(f"  apart          import torch {importing:.1f} s; read and write alone {copying:.1f} s")


if __name__ == "__main__":
    main()
