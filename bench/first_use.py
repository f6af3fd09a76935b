"""What a user waits for at first, as a results file: python -m bench.first_use

Writes first_use.csv: seconds and CPU-seconds of whole processes of the command, with an empty cache of compiled loops
and with a full one, and of merges that a server asks for by name.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.harness import machine
from bench.harness.disk import adapters_on_disk
from bench.harness.inputs import LAYERS
from bench.harness.processes import whole_process
from bench.reporting.files import write_csv
from merge_engine.demo import adapter_paths
from merge_engine.serve.resolver import Resolver

COMMAND = [sys.executable, "-m", "merge_engine", "merge"]
WEIGHTS = [f"0*{weight}+1{more}" for weight in (1, 2, 3) for more in ("", "+2")]
NAMES = [f"merge:{weights}@{method}" for method in ("linear", "tsv") for weights in WEIGHTS]


def merges(what: str, adapters: list[Path], folder: Path) -> list[dict[str, Any]]:
    """The same merge with an empty cache of compiled loops, and again; nothing is compiled in the background."""
    os.environ |= {"NUMBA_CACHE_DIR": str(folder / f"{what}-cache"), "MERGE_ENGINE_BACKGROUND": "0"}
    rows = []
    for cache in ("empty", "full"):
        sample = whole_process([*COMMAND, *map(str, adapters), "-o", str(folder / f"{what}, {cache} cache")])
        rows.append({"what": f"{what}, {cache} cache", "seconds": sample.seconds, "processor": sample.processor})
    return rows


def served(folder: Path) -> list[dict[str, Any]]:
    """New merges by name, and the median of those that are there."""
    (folder / "adapters").mkdir()
    for number, adapter in enumerate(adapters_on_disk(3, LAYERS, "TinyLlama")):
        (folder / "adapters" / str(number)).symlink_to(adapter)
    resolver, seconds = Resolver(folder / "adapters", folder / "served", limit="20GB"), []
    for name in [*NAMES, *NAMES]:
        started = time.perf_counter()
        resolver.resolve(name)
        seconds.append(time.perf_counter() - started)
    new, kept = seconds[: len(NAMES)], statistics.median(seconds[len(NAMES) :])
    return [{"what": "served, new", "seconds": each} for each in new] + [{"what": "served, kept", "seconds": kept}]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.first_use", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"), help="folder to write into")
    options = parser.parse_args()
    known = {"machine": machine.processor()} | machine.versions(("torch", "numba", "merge-engine"))
    with tempfile.TemporaryDirectory() as folder:
        rows = merges("bundled adapters", list(adapter_paths().values())[:3], Path(folder))
        empty, full = merges("ties of a TinyLlama shape", adapters_on_disk(3, LAYERS, "TinyLlama"), Path(folder))
        compiling = {name: empty[name] - full[name] for name in ("seconds", "processor")}
        rows += [empty, full, {"what": "compiling", **compiling}, *served(Path(folder))]
    for row in rows:
        print(f"{row['what']:40}{row['seconds']:8.3f} s")
    write_csv(options.output / "first_use.csv", [*known, "what", "seconds", "processor"], [known | row for row in rows])


if __name__ == "__main__":
    main()
