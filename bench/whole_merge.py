"""A whole merge of adapters cut to a rank, from disk to disk without a base model, and what PEFT would take for it.

The merge has a process of its own, so that its peak memory is its own. PEFT's `add_weighted_adapter` needs the base
model and takes minutes: it is measured on one layer of each shape (kind layer), and its time for the whole is
extrapolated from those rows in the open, by how many layers of that shape the model has.
"""

import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.inputs import SCALING, TINY_LLAMA
from bench.measure import MIB, Sample
from bench.results import EXTRAPOLATED, Row
from merge_engine.rules import reference

WORKER = """
import json, sys, time
import merge_engine
start, before = time.perf_counter(), time.process_time()
result = merge_engine.merge(json.loads(sys.argv[1]), sys.argv[2], **json.loads(sys.argv[3]))
seconds, processor = time.perf_counter() - start, time.process_time() - before
from bench.measure import status  # now: what it imports would not count above
print(json.dumps([seconds, 1024 * status("VmHWM"), processor, result.total_energy]))
"""


def merged(folders: list[Path], output: Path, recipe: Mapping[str, Any]) -> Sample:
    """One merge in a new process, by its own clock; the result is the output's folder."""
    arguments = [json.dumps([str(folder) for folder in folders]), str(output), json.dumps(recipe)]
    done = subprocess.run([sys.executable, "-c", WORKER, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    seconds, peak, processor, kept = json.loads(done.stdout)
    return Sample(seconds, output, peak / MIB, processor=processor, kept_energy=kept)


def excess(folders: list[Path], output: Path, method: str, density: float, rank: int) -> float:
    """By how much |D - B A| of one module of the output exceeds the best cut of its merged delta D by `reference`."""
    import torch
    from safetensors import safe_open

    pass  # REMOVED
    from merge_engine.rules.rule import make_rule

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


def with_extrapolation(rows: Iterable[Row]) -> list[Row]:
    """The rows, and after each whole merge one of PEFT's: the sum over shapes of layers * PEFT's row of kind layer.

    Seconds, quartiles and CPU seconds are summed; there is no figure of memory. `source` names the rows that the sum is
    of. A whole merge is left as it is unless it is of a TinyLlama, of which every shape was measured alike.
    """
    ours = [row for row in rows if row.contestant != EXTRAPOLATED]
    layers = {_key(row, row.contestant, row.method, row.rows, row.columns): row for row in ours if row.kind == "layer"}
    found = []
    for row in ours:
        theirs = _extrapolated(row, layers) if row.kind == "whole" else None
        if theirs is None:
            found.append(row)
        else:
            found += [replace(row, baseline=EXTRAPOLATED, ratio=theirs.seconds / row.seconds), theirs]
    return found


def _key(row: Row, contestant: str, method: str, rows: int, columns: int) -> tuple[Any, ...]:
    """What makes a row of kind layer the one that is looked for; adapters and machine as of `row`."""
    return contestant, method, rows, columns, row.adapters, row.rank, row.density, row.dtype, row.device, row.threads


def _extrapolated(whole: Row, layers: Mapping[tuple[Any, ...], Row]) -> Row | None:
    counts = Counter(TINY_LLAMA.values())
    keys = {shape: _key(whole, "PEFT", f"{whole.method}_svd", *shape) for shape in sorted(counts)}
    is_tiny_llama = whole.elements == whole.layers * sum(map(math.prod, TINY_LLAMA.values()))
    if not is_tiny_llama or not set(keys.values()) <= layers.keys():
        return None
    parts = [(whole.layers * counts[shape], layers[key]) for shape, key in keys.items()]

    def total(name: str) -> float:
        return sum(count * getattr(part, name) for count, part in parts)

    return replace(
        whole,
        contestant=EXTRAPOLATED,
        baseline=EXTRAPOLATED,
        ratio=1.0,
        runs=min(part.runs for _, part in parts),
        seconds=total("seconds"),
        low=total("low"),
        high=total("high"),
        processor=None if any(part.processor is None for _, part in parts) else total("processor"),
        peak_mib=None,
        extra_mib=None,
        excess=None,
        kept_energy=None,
        source=" + ".join(f"{count} x {part.kind}: {part.workload}, {part.contestant}" for count, part in parts),
    )
