"""A full model with adapters merged into it: python examples/into_a_model.py OUT"""

import sys

import merge_engine
from merge_engine.demo import BASE, adapter_paths

adapters = list(adapter_paths().values())[:3]
merged = merge_engine.merge_into(BASE, adapters, sys.argv[1], method="ties", density=0.2, overwrite=True)
print(f"{merged.path}: {merged.merged} tensors merged, {merged.copied} copied, {merged.nbytes} bytes")
