"""From the name of a merge to a folder with it: merged once, kept by what it is made of, within a limit on the disk."""

import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from threading import BoundedSemaphore, Lock

from merge_engine.engine.merge import merge
from merge_engine.errors import AdapterError, MergeError, OutputError
from merge_engine.formats.open import open_adapters
from merge_engine.rules.recipe import Recipe
from merge_engine.runtime.memory import parse_size
from merge_engine.serve.names import Wanted, parse_name
from merge_engine.sweeps.table import digest_of
from merge_engine.version import __version__

LOCKS = ".locks"


class BusyError(MergeError):
    """More merges are under way or waiting than are allowed; try again later."""


class Resolver:
    """Merged adapters by name, made of the adapters in one folder.

    adapters: a folder of adapter folders, the only source. cache: a folder for the results; processes may share it.
    limit: what the cache may hold, as "20GB". The results that were not asked for the longest time go first.
    builds: merges at once; waiting: seconds that a request waits for its turn, then BusyError.
    max_rank: the largest rank that a result may have; None: any.
    counts: how many requests were served from the "cache", "built", "shared" a build, or "refused".

    A result is keyed by the recipe, the bytes of its inputs and this package's version. It appears whole or not at all,
    at one rank.
    """

    def __init__(
        self,
        adapters: str | Path,
        cache: str | Path,
        *,
        limit: int | str = "20GB",
        builds: int = 1,
        waiting: float = 60.0,
        max_rank: int | None = None,
    ) -> None:
        self.adapters, self.cache = Path(adapters).absolute(), Path(cache).absolute()
        if not self.adapters.is_dir():
            raise AdapterError(f"{self.adapters}: wanted a folder of adapters, got none")
        self.limit, self.waiting, self.max_rank = parse_size(limit, "limit"), waiting, max_rank
        self.counts: Counter[str] = Counter()
        self._turns, self._lock = BoundedSemaphore(builds), Lock()
        self._making: dict[str, Future[Path]] = {}
        self._digests: dict[Path, tuple[tuple[int, ...], str]] = {}
        (self.cache / LOCKS).mkdir(parents=True, exist_ok=True)
        self._remove_half_made()

    def resolve(self, name: str) -> Path:
        """The folder of a merge, by name; see `names.parse_name`. Raises MergeError: nothing was kept."""
        try:
            return self.find(parse_name(name))
        except MergeError:
            self.refused()
            raise

    def find(self, wanted: Wanted) -> Path:
        """The folder of a merge. The first one that asks makes it, others wait for that."""
        key = self.key(wanted)
        path = self.cache / key
        if self._touched(path):
            self._count("cache")
            return path
        with self._lock:
            making = self._making.get(key)
            first = making is None
            if making is None:
                making = self._making[key] = Future()
        if not first:
            self._count("shared")
            return making.result()
        try:
            self._build(wanted, path)
        except BaseException as error:
            making.set_exception(error)
            raise
        else:
            making.set_result(path)
        finally:
            with self._lock:
                del self._making[key]
        return path

    def key(self, wanted: Wanted) -> str:
        """SHA-256 of the recipe, the inputs' bytes and the version. Raises AdapterError for an unknown adapter."""
        digests = [self._digest(name) for name in wanted.adapters]
        return hashlib.sha256(json.dumps([__version__, wanted.name, digests]).encode()).hexdigest()

    def refused(self) -> None:
        """Count a request that was refused."""
        self._count("refused")

    def names(self) -> list[str]:
        """The adapters that a name may hold."""
        return sorted(path.parent.name for path in self.adapters.glob("*/adapter_config.json"))

    def held(self) -> int:
        """Bytes that the cache holds."""
        return sum(_bytes_of(path) for path in self._entries())

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def _build(self, wanted: Wanted, path: Path) -> None:
        if not self._turns.acquire(timeout=self.waiting):
            raise BusyError(f"{wanted.name}: other merges are under way; wanted a turn within {self.waiting:g} s")
        try:
            with self._alone(path.name[:2]):  # of all processes; a lock for each key would leave a file for each
                if self._touched(path):
                    self._count("cache")
                    return
                self._check(wanted)
                merge([self.adapters / name for name in wanted.adapters], path, progress=False, **wanted.fields())
                self._count("built")
                with self._alone("all"):
                    self._make_room(path)
        finally:
            self._turns.release()

    def _check(self, wanted: Wanted) -> None:
        """Raise OutputError, before anything is merged, where the result is too large."""
        from merge_engine.engine.output import output_bytes
        from merge_engine.engine.plan import make_plan

        opened = open_adapters([self.adapters / name for name in wanted.adapters])
        plan = make_plan(opened, Recipe.from_mapping(wanted.fields()))
        rank = max(module.rank for module in plan.modules)
        if self.max_rank is not None and rank > self.max_rank:
            raise OutputError(
                f"{wanted.name}: wanted a rank up to {self.max_rank}, got {rank}; rank={self.max_rank} cuts"
            )
        if output_bytes(plan) > self.limit:
            raise OutputError(
                f"{wanted.name}: wanted up to {self.limit} bytes, the cache's limit, got {output_bytes(plan)}"
            )

    def _make_room(self, newest: Path) -> None:
        """Remove what was not used for the longest time, but not the newest, until the cache is within its limit."""
        sizes = {path: _bytes_of(path) for path in self._entries()}
        for path in sorted(sizes, key=lambda path: path.stat().st_mtime_ns):
            if sum(sizes.values()) <= self.limit:
                return
            if path != newest:
                gone = path.with_name(f".{path.name}.gone")
                os.rename(path, gone)  # so that nobody finds half of it
                shutil.rmtree(gone)
                del sizes[path]
        if sum(sizes.values()) > self.limit:
            shutil.rmtree(newest)
            raise OutputError(f"cache: wanted up to {self.limit} bytes, got a merge of {sizes[newest]}")

    def _entries(self) -> list[Path]:
        return [path for path in self.cache.iterdir() if not path.name.startswith(".") and path.is_dir()]

    def _touched(self, path: Path) -> bool:
        """Whether an entry is there; if so, it counts as used now."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _digest(self, name: str) -> str:
        folder = self.adapters / name
        if not (folder / "adapter_config.json").is_file():
            raise AdapterError(f"{name}: wanted one of the adapters that are served, got another name")
        files = sorted(path for path in folder.glob("adapter_*") if path.is_file())
        stamp = tuple(n for path in files for n in (path.stat().st_mtime_ns, path.stat().st_size))
        known = self._digests.get(folder)
        if known is None or known[0] != stamp:
            (adapter,) = open_adapters([folder])
            known = self._digests[folder] = stamp, digest_of(adapter)
        return known[1]

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        with open(self.cache / LOCKS / name, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _remove_half_made(self) -> None:
        """Remove what a killed process left, and no process is making."""
        for path in self.cache.glob(".*.*"):
            with open(self.cache / LOCKS / path.name[1:3], "wb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                shutil.rmtree(path, ignore_errors=True)


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
