"""Kind many: a grid of recipes over the same adapters, cut to rank 16: one by one, by `merge_many`, in a `Session`.

Each way has a process of its own, which reports its seconds, its peak memory, and a digest of the factors of all
results: every way must give the same bits.
"""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import merge_engine
from bench.harness.agreement import Disagreement
from bench.harness.disk import adapters_on_disk
from bench.harness.inputs import RANK
from bench.harness.kind import Entry, Kind, Results
from bench.harness.measure import MIB, Contestant, Sample
from bench.harness.processes import process_status
from bench.harness.workloads import SEARCHED, Workload
from merge_engine.engine.output import Merged

MEMORY = "4GB"  # the budget of merge_many and Session
DENSITIES, SCALES = (0.1, 0.2, 0.3, 0.5), (0.5, 0.7, 1.0, 1.5)
WEIGHTS = [[round(0.4 + 0.2 * ((3 * i + j) % 5), 1) for i in range(8)] for j in range(4)]  # of eight adapters
MORE_WEIGHTS = [[round(0.4 + 0.1 * ((3 * i + j) % 11), 1) for i in range(8)] for j in range(10)]
# Random factors lose much of their energy in a cut: merges would log that every time.
WORKER = """
import logging, sys
from bench.kinds.many import work_in_this_process
logging.getLogger("merge_engine").setLevel(logging.ERROR)
work_in_this_process(*sys.argv[1:])
"""

Recipes = list[dict[str, Any]]
Lap = tuple[float, float]  # wall time, and CPU time of all threads
Look = Callable[[Merged], None]


def _grid(**axes: Any) -> Recipes:
    recipes: Recipes = [{"rank": RANK}]
    for name, values in axes.items():
        recipes = [{**recipe, name: value} for recipe in recipes for value in values]
    return recipes


GRIDS = {
    "ties, density x scale": _grid(method=["ties"], density=DENSITIES, scale=SCALES),
    "ties, density x weights": _grid(method=["ties"], density=DENSITIES, weights=WEIGHTS),
    "ties, other weights": _grid(method=["ties"], weights=WEIGHTS),
    **{f"{method}, other weights": _grid(method=[method], weights=MORE_WEIGHTS) for method in SEARCHED},
    "ties of factors, other weights": _grid(method=["ties"], space=["factors"], weights=WEIGHTS),
    "linear, weights x scale": _grid(method=["linear"], weights=WEIGHTS, scale=SCALES),
    "ties of factors, density x weights": _grid(method=["ties"], space=["factors"], density=DENSITIES, weights=WEIGHTS),
}


def _lap(work: Callable[[], Any]) -> tuple[Any, Lap]:
    """What a call returns, and what it took."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return result, (time.perf_counter() - wall, time.process_time() - processor)


def _laps(merge: Callable[..., Any], recipes: Recipes, look: Look) -> list[Lap]:
    """What each merge took. Each result is looked at and forgotten, as a search does."""
    laps = []
    for recipe in recipes:
        result, lap = _lap(partial(merge, **recipe))
        look(result)
        laps.append(lap)
    return laps


def _singly(adapters: list[str], recipes: Recipes, look: Look) -> list[Lap]:
    return _laps(partial(merge_engine.merge, adapters, backend="torch"), recipes, look)


def _at_once(adapters: list[str], recipes: Recipes, look: Look) -> list[Lap]:
    """What all merges took."""
    results, lap = _lap(lambda: list(merge_engine.merge_many(adapters, recipes, memory=MEMORY, backend="torch")))
    for result in results:
        look(result)
    return [lap]


def _in_session(adapters: list[str], recipes: Recipes, look: Look) -> list[Lap]:
    """What each merge took; opening the session counts as part of the first."""
    session, opening = _lap(lambda: merge_engine.Session(adapters, memory=MEMORY, backend="torch"))
    with session:
        first, *others = _laps(session.merge, recipes, look)
    return [(first[0] + opening[0], first[1] + opening[1]), *others]


WAYS = {"singly": _singly, "merge_many": _at_once, "Session": _in_session}


def work_in_this_process(way: str, adapters_text: str, recipes_text: str) -> None:
    """Merge all recipes, and print JSON: seconds of each call, digest, peak bytes, CPU seconds of each call."""
    adapters, recipes = json.loads(adapters_text), json.loads(recipes_text)
    digest = hashlib.sha256()

    def look(result: Merged) -> None:
        for name, factors in sorted(result.modules.items()):
            digest.update(name.encode() + factors.A.numpy().tobytes() + factors.B.numpy().tobytes())

    WAYS[way](adapters[:2], [{**recipes[0], "weights": None}], lambda _: None)  # compiles loops and loads libraries
    seconds, processor = map(list, zip(*WAYS[way](adapters, recipes, look), strict=True))
    print(json.dumps([seconds, digest.hexdigest(), 1024 * process_status("VmHWM"), processor]))


def run_worker(way: str, adapters: Sequence[Path], grid: str) -> str:
    """What `work_in_this_process` prints, in a new process."""
    arguments = [way, json.dumps([str(adapter) for adapter in adapters]), json.dumps(GRIDS[grid])]
    command = [sys.executable, "-c", WORKER, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def by_way(way: str, count: Callable[[list[float]], float], work: Workload, device: str) -> Contestant:
    """count: the seconds of all calls -> the seconds that are reported."""
    adapters = adapters_on_disk(work.adapters, work.layers, work.model)

    def run() -> Sample:
        seconds, digest, peak, processor = json.loads(run_worker(way, adapters, work.method).splitlines()[-1])
        return Sample(count(seconds), digest, peak / MIB, processor=count(processor))

    return Contestant(run, own_clock=True)


def check(work: Workload, results: Results, device: str) -> None:
    """Every way gives the same bits."""
    if len(set(results.values())) != 1:
        raise Disagreement(f"{work.name}: the results of {', '.join(results)} have different bits")


CHEAP = {"linear, weights x scale": 0.08, "ties of factors, density x weights": 0.08}
KIND = Kind(
    {
        "singly": Entry(partial(by_way, "singly", sum), ns=70, seconds=4, share=CHEAP, devices=("cpu",)),
        "merge_many": Entry(partial(by_way, "merge_many", sum), ns=30, seconds=4, share=CHEAP, devices=("cpu",)),
        "Session": Entry(partial(by_way, "Session", sum), ns=35, seconds=4, share=CHEAP, devices=("cpu",)),
    },
    check,
    checking=0,
    baseline=("singly",),
    forks=False,
    has_rates=False,
    least=1,  # of 16 merges
)
