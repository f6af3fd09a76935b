"""Many merges of the same adapters, cut to rank 16: a grid of recipes one by one, by `merge_many`, and in a `Session`.

Each way runs in a process of its own, which reports its seconds and its peak memory, and a digest of the factors of
every result: ways have to give the same bits.
"""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.inputs import RANK
from bench.measure import MIB, Sample, status

MEMORY = "4GB"  # the budget of merge_many and Session
DENSITIES, SCALES = (0.1, 0.2, 0.3, 0.5), (0.5, 0.7, 1.0, 1.5)
WEIGHTS = [[round(0.4 + 0.2 * ((3 * i + j) % 5), 1) for i in range(8)] for j in range(4)]  # of eight adapters
WORKER = "import sys; from bench.many import work; work(*sys.argv[1:])"

Recipes = list[dict[str, Any]]
Lap = tuple[float, float]  # by the wall, and of all threads on CPUs


def _grid(**axes: Any) -> Recipes:
    recipes: Recipes = [{"rank": RANK}]
    for name, values in axes.items():
        recipes = [{**recipe, name: value} for recipe in recipes for value in values]
    return recipes


GRIDS = {
    "ties, density x scale": _grid(method=["ties"], density=DENSITIES, scale=SCALES),
    "ties, density x weights": _grid(method=["ties"], density=DENSITIES, weights=WEIGHTS),
    "ties, other weights": _grid(method=["ties"], weights=WEIGHTS),
    "linear, other weights": _grid(method=["linear"], weights=WEIGHTS),
    "ties of factors, other weights": _grid(method=["ties"], space=["factors"], weights=WEIGHTS),
    "linear, weights x scale": _grid(method=["linear"], weights=WEIGHTS, scale=SCALES),
    "ties of factors, density x weights": _grid(method=["ties"], space=["factors"], density=DENSITIES, weights=WEIGHTS),
}


def clocks() -> Lap:
    return time.perf_counter(), time.process_time()


def singly(adapters: list[str], recipes: Recipes) -> tuple[list[Any], list[Lap]]:
    """Results, and what the clocks show before the first merge and after each."""
    from merge_engine.engine.merge import merge

    results, laps = [], [clocks()]
    for recipe in recipes:
        results.append(merge(adapters, backend="torch", **recipe))
        laps.append(clocks())
    return results, laps


def at_once(adapters: list[str], recipes: Recipes) -> tuple[list[Any], list[Lap]]:
    """The same, of all merges as one."""
    from merge_engine.many.merge_many import merge_many

    start = clocks()
    results = list(merge_many(adapters, recipes, memory=MEMORY, backend="torch"))
    return results, [start, clocks()]


def in_session(adapters: list[str], recipes: Recipes) -> tuple[list[Any], list[Lap]]:
    """The same; opening the session counts with the first."""
    from merge_engine.many.session import Session

    results, laps = [], [clocks()]
    with Session(adapters, memory=MEMORY, backend="torch") as session:
        for recipe in recipes:
            results.append(session.merge(**recipe))
            laps.append(clocks())
    return results, laps


WAYS = {"singly": singly, "merge_many": at_once, "Session": in_session}


def work(way: str, adapters_text: str, recipes_text: str) -> None:
    """Carry out one way in this process, and print what it took."""
    adapters, recipes = json.loads(adapters_text), json.loads(recipes_text)
    WAYS[way](adapters[:2], [{**recipes[0], "weights": None}])  # loops are compiled, libraries loaded
    results, laps = WAYS[way](adapters, recipes)
    seconds, processor = ([after - before for before, after in pairwise(times)] for times in zip(*laps, strict=True))
    digest = hashlib.sha256()
    for result in results:
        for name, factors in sorted(result.modules.items()):
            digest.update(name.encode() + factors.A.numpy().tobytes() + factors.B.numpy().tobytes())
    print(json.dumps([seconds, digest.hexdigest(), 1024 * status("VmHWM"), processor]))


def measured(way: str, adapters: Sequence[Path], grid: str, count: Callable[[list[float]], float]) -> Sample:
    """What `work` prints in a process of its own; count: the seconds of each call -> those of the sample."""
    arguments = [way, json.dumps([str(adapter) for adapter in adapters]), json.dumps(GRIDS[grid])]
    command = [sys.executable, "-c", WORKER, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds, digest, peak, processor = json.loads(done.stdout.splitlines()[-1])
    return Sample(count(seconds), digest, peak / MIB, processor=count(processor))
