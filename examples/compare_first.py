"""Which adapters disagree, before a merge: python examples/compare_first.py [ADAPTER ...]"""

import sys

import merge_engine
from merge_engine.demo import adapter_paths

bundled = [str(path) for path in adapter_paths().values()]
adapters = sys.argv[1:] or bundled

found = merge_engine.interference(adapters)
print(found.table())
