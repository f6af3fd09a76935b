"""Memory: how a budget is divided, and what processes really take."""

import json
import os
import subprocess
import sys
from pathlib import Path

from grids import save_adapter

from merge_engine.engine.cpu_backend import TorchBackend
from merge_engine.engine.plan import make_plan
from merge_engine.formats.open import open_adapter
from merge_engine.many.budget import room
from merge_engine.rules.recipe import Recipe

ROOT = Path(__file__).parents[2]
MEASURE = """
import json, sys
import merge_engine
from merge_engine.many.merge_many import merge_many
small, adapters, recipes, memory = json.loads(sys.argv[1])
# Not ru_maxrss, which a process takes over from the one that started it.
peak = lambda: 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
for recipe in recipes[:1]:
    merge_engine.merge(small, **recipe)
before = peak()
if memory is None:
    merge_engine.merge(adapters, **recipes[0])
else:
    assert all(result.modules for result in merge_many(adapters, recipes, memory=memory))
print(json.dumps([before, peak()]))
"""


def peaks(*arguments):
    """Peak resident bytes of a process that has merged something small, and then what it is asked to."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", MEASURE, json.dumps(arguments, default=str)]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def test_results_that_stay_in_memory_are_counted(tmp_path):
    adapters = [open_adapter(save_adapter(tmp_path / name, 0, {"q": (512, 1024)}, rank=8)) for name in "ab"]
    plans = [make_plan(adapters, Recipe.from_mapping({"method": "linear", "scale": scale})) for scale in (1, 2, 3)]
    on_disk, in_memory = (room(plans, TorchBackend(), 10**9, in_memory=each) for each in (False, True))
    assert on_disk.cache - in_memory.cache == 3 * 4 * 16 * (512 + 1024)  # float32 factors of rank 8 + 8


def test_memory_does_not_grow_with_the_number_of_adapters(tmp_path):
    """50 adapters of a 1024 x 2048 module, whose deltas would be 420 MB: less than the factors, and 95 MB."""
    small = [save_adapter(tmp_path / "small", 0, {"q": (512, 512)})] * 2
    large = [save_adapter(tmp_path / str(seed), seed, {"q": (1024, 2048)}, rank=16) for seed in range(50)]
    before, after = peaks(small, large, [{"method": "ties", "density": 0.2, "rank": 16}], None)
    factors = 50 * 16 * (1024 + 2048) * 4
    assert after - before < factors + 95e6


def test_the_memory_budget_holds(tmp_path):
    """12 matrices of 21 MB at once would be over it."""
    small = [save_adapter(tmp_path / "small", 0, {"q": (512, 512)})] * 2
    large = [save_adapter(tmp_path / str(seed), seed, {"q": (2048, 2560)}, rank=4) for seed in range(2)]
    grid = [{"method": "magnitude_prune", "density": 0.2, "rank": 4, "weights": [1.0, w]} for w in range(12)]
    _, after = peaks(small, large, grid, "0.7GB")
    assert after < 0.7e9
