"""Several methods and densities, each scored; the best one: python examples/search_scale.py OUT

The score here is the cosine to the plain sum of the deltas. Put your own evaluation in its place: a function of the
folder that returns a number.
"""

import sys
from pathlib import Path

import torch

import merge_engine
from merge_engine.demo import adapter_paths

adapters = list(adapter_paths().values())[:3]
opened = [merge_engine.open_adapter(adapter) for adapter in adapters]


def delta(adapter, name):
    """s B A [M, N] of one module."""
    A, B = adapter.factors(name)
    return adapter.modules[name].scaling * (B.float() @ A.float())


def score(folder: Path) -> float:
    """The cosine between the merged deltas and the sum of the inputs', over all modules."""
    merged = merge_engine.open_adapter(folder)
    ours = torch.cat([delta(merged, name).flatten() for name in merged.modules])
    total = torch.cat([sum(delta(each, name) for each in opened).flatten() for name in merged.modules])
    return float(torch.nn.functional.cosine_similarity(ours, total, dim=0))


found = merge_engine.sweep(
    adapters, {"method": ["linear", "ties", "tsv"], "density": [0.2, 0.5]}, sys.argv[1], evaluate=score, overwrite=True
)
print(found.table())
print("best:", found.best().folder)
