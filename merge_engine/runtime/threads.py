"""Work on threads: all items of a list at once (`for_each`), or some items ahead of who uses the results (`ahead`)."""

import os
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from operator import itemgetter
from typing import TypeVar

import torch

R = TypeVar("R")
T = TypeVar("T")


def for_each(items: Sequence[T], work: Callable[[T], R]) -> list[R]:
    """work(item) for every item, by ``torch.get_num_threads()`` threads; the results come in the order of the items.

    When work fails for an item, its exception is raised, and items that have not been begun are skipped. A thread that
    runs torch's operators on one thread does all itself. Another one must not call this from within ``work``: it would
    wait for its own thread.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return [work(item) for item in items]
    left = iter(range(len(items)))

    def share(_: int) -> list[tuple[int, R]]:  # a thread takes items while any are left
        try:
            return [(i, work(items[i])) for i in left]
        except BaseException:
            deque(left, maxlen=0)
            raise

    done = [pair for pairs in workers(threads).map(share, range(min(threads, len(items)))) for pair in pairs]
    return [result for _, result in sorted(done, key=itemgetter(0))]


@lru_cache(maxsize=4)
def workers(threads: int) -> ThreadPoolExecutor:
    """A pool of threads that each run torch's operators on one thread: the items are what runs in parallel."""
    ready = threading.Barrier(threads + 1)

    def start() -> None:
        one_thread()
        ready.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="merge_engine")
    try:
        for _ in range(threads):
            pool.submit(start)
        ready.wait()
    except BaseException:  # interrupted: a thread that waits for ever would keep the process from ending
        ready.abort()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    torch.set_num_threads(threads)  # each thread has a count of its own, but new threads copy the one set last
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=workers.cache_clear)  # a child has none of its parent's threads
# Idle pools by their number of threads, for the next call of `ahead`: new threads share a core for their first 10 ms.
_idle: defaultdict[int, list[ThreadPoolExecutor]] = defaultdict(list)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # a child has none of its parent's threads


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside the block torch's operators run on ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread() -> None:
    """From now on this thread runs torch's operators on one thread.

    It reads the count before it sets it: at its first read, or its first operator, a thread's count becomes what any
    thread has set last, whatever it has set itself.
    """
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


def ahead(
    function: Callable[[T], R],
    items: Iterable[T],
    workers: int = 1,
    *,
    size: Callable[[T], int] = lambda item: 1,
    room: int = 0,
) -> Iterator[R]:
    """function(item) for every item, in order, computed in the background while the caller uses earlier results.

    At most workers + 1 results are being computed or are waiting, so memory is bounded; more are, as long as the sizes
    of all but the oldest ``workers`` sum to no more than ``room``. Each worker runs torch's operators on one thread:
    results do not depend on how many workers there are. An exception of `function` or `items` is raised here. If items
    is a generator, it is closed at the end.
    """
    before, caller = torch.get_num_threads(), threading.get_ident()
    pool = _take(workers)
    waiting: deque[tuple[Future[R], int]] = deque()
    total = 0  # of the sizes of all that wait
    try:
        for item in items:
            waiting.append((pool.submit(_on_one_thread, function, item), size(item)))
            total += waiting[-1][1]
            while total - sum(own for _, own in islice(waiting, workers)) > room:
                future, own = waiting.popleft()
                total -= own
                yield future.result()
        while waiting:
            yield waiting.popleft()[0].result()
    except BaseException:  # its threads may be busy, or missing in a forked child: the pool ends here
        pool.shutdown(wait=threading.get_ident() == caller, cancel_futures=True)
        raise
    else:
        _idle[workers].append(pool)
    finally:
        if threading.get_ident() == caller:  # another thread may collect this as garbage: its count is not touched
            torch.set_num_threads(before)  # new threads copy it
        if isinstance(items, Generator):
            items.close()  # its threads end now, even if a traceback keeps the generator


def _take(workers: int) -> ThreadPoolExecutor:
    try:
        return _idle[workers].pop()
    except IndexError:  # all are in use
        return ThreadPoolExecutor(workers)


def _on_one_thread(function: Callable[[T], R], item: T) -> R:
    one_thread()
    return function(item)
