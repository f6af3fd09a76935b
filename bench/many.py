"""Many merges of the same adapters, against as many single merges: python -m bench.many [--layers 2] [--rounds 3]

Eight rank-16 adapters of the linear layers of a TinyLlama-shaped model (random factors of a trained adapter's size),
cut to rank 16. A grid of 16 recipes is merged one by one, by `merge_many`, and in a `Session`; of the session's merges
those count that change weights only. Each way runs in a process of its own, which reports its seconds and its peak
memory; ways are interleaved, medians are shown, and the factors of every result are compared first: the same bits.

Then each way is taken apart: the stages one after the other instead of overlapping, with the seconds of each.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.inputs import LAYERS, RANK, make_adapter
from bench.measure import status

DENSITIES, SCALES = (0.1, 0.2, 0.3, 0.5), (0.5, 0.7, 1.0, 1.5)
WEIGHTS = [[round(0.4 + 0.2 * ((3 * i + j) % 5), 1) for i in range(8)] for j in range(4)]


def _grid(**axes: Any) -> list[dict[str, Any]]:
    recipes: list[dict[str, Any]] = [{"rank": RANK}]
    for name, values in axes.items():
        recipes = [{**recipe, name: value} for recipe in recipes for value in values]
    return recipes


GRIDS = {
    "ties, density x scale": _grid(method=["ties"], density=DENSITIES, scale=SCALES),
    "ties, density x weights": _grid(method=["ties"], density=DENSITIES, weights=WEIGHTS),
    "linear, weights x scale": _grid(method=["linear"], weights=WEIGHTS, scale=SCALES),
    "ties of factors, density x weights": _grid(method=["ties"], space=["factors"], density=DENSITIES, weights=WEIGHTS),
}


def singly(adapters: list[str], recipes: list[dict[str, Any]], memory: str) -> tuple[list[Any], list[float]]:
    """Results, and seconds of each."""
    from merge_engine.engine import merge

    results, seconds = [], []
    for recipe in recipes:
        start = time.perf_counter()
        results.append(merge(adapters, backend="torch", **recipe))
        seconds.append(time.perf_counter() - start)
    return results, seconds


def at_once(adapters: list[str], recipes: list[dict[str, Any]], memory: str) -> tuple[list[Any], list[float]]:
    from merge_engine.many import merge_many

    start = time.perf_counter()
    results = list(merge_many(adapters, recipes, memory=memory, backend="torch"))
    return results, [time.perf_counter() - start]


def in_session(adapters: list[str], recipes: list[dict[str, Any]], memory: str) -> tuple[list[Any], list[float]]:
    """Seconds of each; opening the session counts with the first."""
    from merge_engine.session import Session

    start, results, seconds = time.perf_counter(), [], []
    with Session(adapters, memory=memory, backend="torch") as session:
        for recipe in recipes:
            results.append(session.merge(**recipe))
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
    return results, seconds


WAYS = {"singly": singly, "merge_many": at_once, "Session": in_session}


def work(way: str, adapters: list[str], recipes: list[dict[str, Any]], memory: str, apart: bool) -> None:
    """Carry out one way in this process, and print what it took."""
    WAYS[way](adapters[:2], [{**recipes[0], "weights": None}], memory)  # loops are compiled, libraries loaded
    stages = _take_apart() if apart else Counter()
    before = time.process_time()
    results, seconds = WAYS[way](adapters, recipes, memory)
    processor = time.process_time() - before
    digest = hashlib.sha256()
    for result in results:
        for name, factors in sorted(result.modules.items()):
            digest.update(name.encode() + factors.A.numpy().tobytes() + factors.B.numpy().tobytes())
    peak = status("VmHWM") * 1024 / 1e9  # since this program began, not since its parent forked
    done = {"seconds": seconds, "processor": processor, "peak_gb": peak, "digest": digest.hexdigest(), "stages": stages}
    print(json.dumps(done))


def _take_apart() -> Counter[str]:
    """From now on stages run one after the other; the seconds of each add up in what is returned."""
    from merge_engine import adapter, engine, pool, shared, shared_tiles, tiled

    for module in (engine, shared):
        vars(module)["ahead"] = lambda function, items, workers=1: map(function, items)
    stages: Counter[str] = Counter()

    def time_it(owner: Any, name: str, stage: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            start, before = time.perf_counter(), stages.total()
            try:
                return real(*arguments, **options)
            finally:  # what stages inside took is theirs
                stages[stage] += time.perf_counter() - start - (stages.total() - before)

        setattr(owner, name, timed)

    for owner, name, stage in [
        *((adapter.Adapter, name, "read") for name in ("factors", "check_finite")),
        *((owner, "trims", "select") for owner in (tiled, pool)),
        *((owner, "merge_deltas", "merge") for owner in (tiled, shared_tiles)),
        (engine, "cut", "recompress"),
        (engine.Output, "add", "take or write"),
    ]:
        time_it(owner, name, stage)
    return stages


def measured(way: str, adapters: list[str], grid: str, memory: str, apart: bool = False) -> dict[str, Any]:
    """What `work` prints in a process of its own."""
    arguments = [way, json.dumps(adapters), json.dumps(GRIDS[grid]), memory, str(apart)]
    command = [sys.executable, "-m", "bench.many", "--work", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def report(grid: str, runs: dict[str, list[dict[str, Any]]], memory: str) -> None:
    """Print one grid's figures: totals, a session's merges where one thing changed, and memory."""
    recipes = GRIDS[grid]
    same = len({run["digest"] for done in runs.values() for run in done}) == 1
    print(f"\n{grid}: {len(recipes)} recipes, {'the same bits' if same else 'DIFFERENT BITS'}")
    wall = {way: statistics.median(sum(run["seconds"]) for run in done) for way, done in runs.items()}
    processor = {way: statistics.median(run["processor"] for run in done) for way, done in runs.items()}
    for way in runs:
        peak = max(run["peak_gb"] for run in runs[way])
        faster, cheaper = (clock["singly"] / clock[way] for clock in (wall, processor))
        print(
            f"  {way:12} {wall[way]:8.2f} s, {faster:5.2f}x as fast; {processor[way]:8.2f} s of processor time, "
            f"{cheaper:5.2f}x; peak {peak:.2f} GB, budget {memory}"
        )
    for changed in ("weights", "scale"):
        fixed = [{key: value for key, value in recipe.items() if key != changed} for recipe in recipes]
        places = [i for i in range(1, len(recipes)) if fixed[i] == fixed[i - 1]]
        if places:
            fresh, again = (
                statistics.median(run["seconds"][i] for run in runs[way] for i in places)
                for way in ("singly", "Session")
            )
            print(f"  other {changed} only: {fresh:.3f} s fresh, {again:.3f} s in a session, {fresh / again:.1f}x")


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--work"]:
        way, adapters, recipes, memory, apart = sys.argv[2:]
        return work(way, json.loads(adapters), json.loads(recipes), memory, apart == "True")
    parser = argparse.ArgumentParser(prog="python -m bench.many", description=__doc__)
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of every way; medians count (default: %(default)s)")
    parser.add_argument("--memory", default="4GB", help="budget of merge_many and Session (default: %(default)s)")
    parser.add_argument("--grid", choices=GRIDS, action="append", help="one of the grids, or several (default: all)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, str(number)) for number in range(8)]
        for seed, folder in enumerate(folders):
            make_adapter(folder, seed, options.layers)
        adapters = [str(folder) for folder in folders]
        for grid in options.grid or GRIDS:
            runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
            for _ in range(options.rounds):
                for way, done in runs.items():
                    done.append(measured(way, adapters, grid, options.memory))
            report(grid, runs, options.memory)
            for way in WAYS:
                apart = measured(way, adapters, grid, options.memory, apart=True)
                stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in apart["stages"].items())
                print(f"  {way:12} apart: {stages}; all {sum(apart['seconds']):.2f} s")


if __name__ == "__main__":
    main()
