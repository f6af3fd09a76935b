"""Values that several merges share: made once, and kept while there is room. Threads may share a cache."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock
from typing import Any, TypeVar

T = TypeVar("T")


class Cache:
    """Values by key, of `limit` bytes at most.

    The value that was not used for the longest time is dropped first, but never one that this merge or the previous
    merge used: a pass over all modules that is larger than the cache would drop each value just before its next use.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._merge = 0
        # {key: (value, bytes, number of the merge that used it last)}, the least recently used first
        self._entries: OrderedDict[Hashable, tuple[Any, int, int]] = OrderedDict()
        self._cheap: set[Hashable] = set()
        self._making: dict[Hashable, Future[Any]] = {}
        self._lock = Lock()

    def begin(self, limit: int) -> None:
        """Begin the next merge, with this limit for the cache."""
        with self._lock:
            self._merge += 1
            self.limit = limit
            for key in [key for key in self._cheap if self._entries[key][2] < self._merge - 1]:
                self._drop(key)
            while self.held > limit:
                self._drop_oldest()

    def get(self, key: Hashable, make: Callable[[], T], size: Callable[[T], int]) -> T:
        """The value of a key. The first thread that asks makes it, others wait for it. It is kept if there is room."""
        with self._lock:
            if key in self._entries:
                found: T = self._used(key)
                return found
            making = self._making.get(key)
            is_first = making is None
            if making is None:
                making = self._making[key] = Future()
        if not is_first:
            result: T = making.result()
            return result
        try:
            made = make()
        except BaseException as error:
            with self._lock:
                del self._making[key]
            making.set_exception(error)
            raise
        with self._lock:
            del self._making[key]
            self._keep(key, made, size(made))
        making.set_result(made)
        return made

    def put(self, key: Hashable, value: Any, nbytes: int, *, cheap: bool = False) -> None:
        """Keep a value if there is room."""
        with self._lock:
            if key not in self._entries:
                self._keep(key, value, nbytes)
                if cheap and key in self._entries:
                    self._cheap.add(key)

    def find(self, key: Hashable) -> Any:
        """The value of a key, or None."""
        with self._lock:
            return self._used(key) if key in self._entries else None

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._cheap.clear()
            self.held = 0

    def _used(self, key: Hashable) -> Any:
        value, nbytes, _ = self._entries[key]
        self._entries[key] = value, nbytes, self._merge
        self._entries.move_to_end(key)
        return value

    def _keep(self, key: Hashable, value: Any, nbytes: int) -> None:
        while self.held + nbytes > self.limit and self._entries:
            _, _, used = next(iter(self._entries.values()))
            if used >= self._merge - 1:
                return
            self._drop_oldest()
        if self.held + nbytes <= self.limit:
            self._entries[key] = value, nbytes, self._merge
            self.held += nbytes

    def _drop_oldest(self) -> None:
        self._drop(next(iter(self._entries)))

    def _drop(self, key: Hashable) -> None:
        _, nbytes, _ = self._entries.pop(key)
        self._cheap.discard(key)
        self.held -= nbytes
