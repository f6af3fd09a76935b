"""Kills at random moments: whatever is killed, the next runs make the bytes of a run that nobody disturbed.

    python tests/helpers/random_kills.py [--kills 200] [--seed 0] [JOB ...]

Run it by hand. A job is a command, or a call, in one process or several. It is killed by SIGKILL at a random moment,
once or twice, and run again until it is done. After each kill the output is missing, whole, or, where it was to be
replaced, the old one; at the end there are the bytes of a run that was let alone, and nothing beside them. It prints a
line a job, and ends with 1 where anything was wrong.
"""

import argparse
import csv
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from forks import Forks
from toy_models import bytes_of, save_adapter, save_base

SHAPES = {f"model.layers.{i}.up_proj": (257, 192) for i in range(6)}
ENVIRONMENT = {"SOURCE_DATE_EPOCH": "0"}
WHOLE = ("ties", "slerp", "della", "model_stock")
_TIMES = ("seconds", "merge_seconds", "evaluation_seconds")  # columns of tables that differ from run to run


@dataclass(frozen=True)
class Job:
    """What is killed.

    command: the words of one, or none; code: Python in its place. ranks: as torchrun starts them. together: processes
    that are started on one output at once. kept: files of the output that count, by the ends of their names; none: all.
    old: whether an output of something else is there before, which is to be replaced.
    """

    name: str
    command: tuple[object, ...] = ()
    code: str = ""
    ranks: int = 1
    together: int = 1
    kept: Callable[[str], bool] = field(default=lambda name: True)
    old: bool = False


def jobs_in(root: Path) -> list[Job]:
    """All jobs, with their inputs below a folder; the output is always ``out``."""
    base = save_base(root / "base", shapes=SHAPES)
    adapters = [save_adapter(root / "in" / name, seed, SHAPES, SHAPES, whole=False) for seed, name in enumerate("ab")]
    models = [save_base(root / name, seed, shapes=SHAPES) for seed, name in enumerate(("one", "two"), 1)]
    out = root / "out"
    merge = ("merge", *adapters, "-o", out)
    into = ("merge", "--into", base, *adapters, "-o", out, "--shard-size", "300KB", "--density", 0.3)
    score = """sh -c 'cksum < {path}/adapter_model.safetensors | cut -d" " -f1'"""
    many = [{"method": "ties", "density": 0.3}, {"method": "linear", "scale": "auto"}, {"method": "tsv"}]
    names = [str(adapter) for adapter in adapters]

    def of(call: str) -> str:
        return f"import merge_engine, merge_engine.serve.resolver; {call}"

    return [
        Job("merge", merge),
        Job("merge, two at once", merge, together=2),
        Job("merge --overwrite", (*merge, "--overwrite", "--method", "linear"), old=True),
        Job("merge --into", into),
        Job("merge --into, two at once", into, together=2),
        Job("merge --into, two ranks", into, ranks=2),
        *(Job(f"merge-models {method}", _whole(method, base, models, out)) for method in WHOLE),
        Job("merge-models della, two ranks", _whole("della", base, models, out), ranks=2),
        Job("normalize", ("normalize", adapters[0], "-o", out)),
        Job("merge_many", code=of(f"merge_engine.merge_many({names!r}, {many!r}, {str(out)!r}, overwrite=True)")),
        Job("sweep", (*merge, "--sweep", "density=0.2,0.5", "method=ties,linear", "--evaluate", score), kept=_no_plot),
        Job(
            "search",
            code=of(
                f"merge_engine.search({names!r}, {score!r}, {str(out)!r}, progress=False, "
                "space={'method': ['linear', 'tsv', 'actmat']}, trials=3)"
            ),
            kept=lambda name: name.startswith("best/") or name == "recipe.yaml",
        ),
        Job(
            "serve",
            code=of(
                f"merge_engine.serve.resolver.Resolver({str(root / 'in')!r}, {str(out)!r})"
                ".resolve('merge:a*2+b@ties,density=0.3')"
            ),
            kept=lambda name: not name.startswith("."),
        ),
    ]


def _whole(method: str, base: Path, models: list[Path], out: Path) -> tuple[object, ...]:
    given = models[:1] if method == "slerp" else models
    own = {"slerp": ("--t", 0.3), "ties": ("--density", 0.5), "della": ("--density", 0.5, "--epsilon", 0.1)}
    words = ("merge-models", "--base", base, *given, "-o", out, "--method", method, "--shard-size", "300KB")
    return (*words, *own.get(method, ()))


def _no_plot(name: str) -> bool:
    return not name.endswith(".png")


def found_in(job: Job, out: Path) -> dict[str, bytes]:
    """The files of an output that count; of tables, without the columns of times."""
    found = {name: data for name, data in bytes_of(out).items() if job.kept(name)} if out.exists() else {}
    for name in [name for name in found if name.endswith(".csv")]:
        rows = csv.DictReader(found[name].decode().splitlines())
        found[name] = repr([{head: row[head] for head in row if head not in _TIMES} for row in rows]).encode()
    return found


class Trial:
    """A job with its undisturbed result, and how long that took."""

    def __init__(self, job: Job, root: Path, forks: Forks) -> None:
        self.job, self.out, self.forks = job, root / "out", forks
        self.beside = set(os.listdir(root))
        self.before: dict[str, bytes] = {}
        self._renew()
        started = time.perf_counter()
        self._start()
        done = forks.wait()
        if set(done.codes) - ({0, 2} if job.together > 1 else {0}):
            raise SystemExit(f"{job.name}: {done}")
        self.seconds = time.perf_counter() - started
        self.wanted = found_in(job, self.out)

    def kill(self, chance: random.Random) -> str:
        """Kill it once or twice, and run it to its end; what is wrong, or nothing."""
        self._renew()
        for _ in range(chance.choice((1, 1, 2))):
            children = self._start()
            time.sleep(chance.uniform(0, self.seconds))
            os.kill(chance.choice(children), signal.SIGKILL)
            if self.job.ranks > 1:  # as torchrun does with whoever waits for a rank that is gone
                time.sleep(0.5)
                for child in children:
                    os.kill(child, signal.SIGKILL)  # those that have ended are there until `wait`
            codes = self.forks.wait().codes
            found = found_in(self.job, self.out)
            if not self.job.code and "--sweep" not in self.job.command and found not in ({}, self.wanted, self.before):
                return f"after a kill ({codes}) the output is half there: {sorted(found)}"
            if self.job.old and not found:
                return f"after a kill ({codes}) neither the old output nor the new one is there"
        for _ in range(3):
            self._start()
            done = self.forks.wait()
            if set(done.codes) == {0} or "already exists" in done.err:
                break
        else:
            return f"it does not come to its end: {done.codes} {done.err.strip().splitlines()[-1:]}"
        if found_in(self.job, self.out) != self.wanted:
            return f"the bytes are others: {sorted(found_in(self.job, self.out))}"
        left = set(os.listdir(self.out.parent)) - self.beside - {"out"}
        return f"left behind: {sorted(left)}" if left else ""

    def _renew(self) -> None:
        """Nothing where the output goes; or an old one."""
        shutil.rmtree(self.out, ignore_errors=True)
        if self.job.old:
            save_adapter(self.out, 7, SHAPES, SHAPES, whole=False)
            self.before = found_in(self.job, self.out)

    def _start(self) -> list[int]:
        job = self.job
        commands = [list(job.command)] if job.command else []
        if job.ranks > 1:
            environments = tuple({**each, **ENVIRONMENT} for each in self.forks.environments(job.ranks))
            return self.forks.start(*commands, environments=environments, first=job.code)
        return self.forks.start(*commands, environments=(ENVIRONMENT,) * job.together, first=job.code)


def main(arguments: list[str]) -> int:
    """Kill every job equally often."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("jobs", nargs="*")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder, Forks("merge_engine.serve.resolver", "optuna") as forks:
        jobs = [job for job in jobs_in(Path(folder)) if not options.jobs or job.name in options.jobs]
        chance = random.Random(options.seed)
        for number, job in enumerate(jobs):
            count = options.kills // len(jobs) + (number < options.kills % len(jobs))
            trial = Trial(job, Path(folder), forks)
            said = [message for message in (trial.kill(chance) for _ in range(count)) if message]
            wrong += len(said)
            print(f"{job.name}: {count} times killed, {len(said)} wrong; a run takes {trial.seconds:.2f} s", flush=True)
            for message in said:
                print(f"  {message}", flush=True)
            shutil.rmtree(Path(folder, "out"), ignore_errors=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
