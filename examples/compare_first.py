"""Which adapters disagree, before a merge: python examples/compare_first.py OUT [ADAPTER ...]"""

import sys
from pathlib import Path

import merge_engine
from merge_engine.demo import adapter_paths

bundled = [str(path) for path in adapter_paths().values()]
output, adapters = Path(sys.argv[1]), sys.argv[2:] or bundled

found = merge_engine.interference(adapters)
print(found.table())
