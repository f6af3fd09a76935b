"""A search for a gain of each kind of module: python examples/search_gains.py OUT [SEED]

The merge is chosen by its score on one sample. It is reported on the sample that ``merge-engine demo`` reports, and on
larger ones, beside the best merge of the demo with one scale. Needs ``merge-engine[search,peft]``.
"""

import sys
import time

import merge_engine
from merge_engine.demo import adapter_paths
from merge_engine.demo.evaluate import scorer

adapters = list(adapter_paths().values())
output, seed = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0

started = time.perf_counter()
found = merge_engine.search(adapters, scorer("tuning", count=512), output, groups="kinds", in_memory=True, seed=seed)
print(found.table())
print(f"{len(found.trials)} trials in {time.perf_counter() - started:.0f} s")

one_scale = merge_engine.merge(adapters, method="tsv", scale="auto", gain=1.4)
for sample, count in (("reported", 256), (21, 1024), (22, 1024), (23, 1024)):
    score = scorer(sample, count)
    before, after = score(one_scale)["score"], score(found.best_folder)["score"]
    print(f"sample {sample}: one scale {before:.2f}, found {after:.2f}")
