"""Three adapters into one: python examples/merge_three.py OUT [ADAPTER ...]"""

import sys

import merge_engine
from merge_engine.demo import adapter_paths

bundled = [str(path) for path in adapter_paths().values()][:3]
output, adapters = sys.argv[1], sys.argv[2:] or bundled

merged = merge_engine.merge(adapters, output, method="tsv", scale="auto", overwrite=True)
print(f"{output}: {len(merged.ranks)} modules of rank {merged.rank}, kept energy {merged.total_energy:.4f}")
print(f"load it with PeftModel.from_pretrained(base_model, {output!r})")
