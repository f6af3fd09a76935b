"""Stages of work that overlap: each runs in threads of its own, and hands its results on in order."""

import os
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from operator import itemgetter
from typing import TypeVar

import torch

R = TypeVar("R")
T = TypeVar("T")


def for_each(items: Sequence[T], work: Callable[[T], R]) -> list[R]:
    """work(item) for every item, in their order, shared out over the threads; not from within work, which would wait.

    When work fails for an item, those that are not begun are left.
    """
    threads, left = torch.get_num_threads(), iter(range(len(items)))

    def share(_: int) -> list[tuple[int, R]]:  # each thread takes the next as it gets to it: one hand-over a thread
        try:
            return [(i, work(items[i])) for i in left]
        except BaseException:
            deque(left, maxlen=0)
            raise

    done = [pair for pairs in workers(threads).map(share, range(min(threads, len(items)))) for pair in pairs]
    return [result for _, result in sorted(done, key=itemgetter(0))]


@lru_cache(maxsize=4)
def workers(threads: int) -> ThreadPoolExecutor:
    """Threads that each run torch's operators on one thread: the tiles are what runs in parallel."""
    ready = threading.Barrier(threads + 1)

    def start() -> None:
        one_thread()
        ready.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="merge_engine")
    for _ in range(threads):
        pool.submit(start)
    ready.wait()
    torch.set_num_threads(threads)  # the setting is each thread's own, but new threads copy the latest
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=workers.cache_clear)  # a child has none of its parent's threads
# Threads by how many they are, for the next who works ahead: new ones share a core for their first 10 ms or so.
_idle: defaultdict[int, list[ThreadPoolExecutor]] = defaultdict(list)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # a child has none of its parent's threads


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's operators run on so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread() -> None:
    """This thread runs torch's operators alone from now on.

    It has to ask before it sets: a thread that asks for the first time, or runs its first operator, gets what any other
    thread has set last, in place of what it has set itself.
    """
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


def ahead(function: Callable[[T], R], items: Iterable[T], workers: int = 1) -> Iterator[R]:
    """function(item) for every item, in order, computed in the background while earlier results are in use.

    At most workers + 1 results are under way or waiting, so memory is bounded. Each worker runs torch's operators on
    one thread: results do not depend on how many there are. An exception of `function` or `items` is raised here. Where
    items is a generator, it is closed at the end.
    """
    before, caller = torch.get_num_threads(), threading.get_ident()
    pool = _take(workers)
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_on_one_thread, function, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BaseException:  # these threads may be at work, or not be there in a child: they end, and are no one's
        pool.shutdown(wait=threading.get_ident() == caller, cancel_futures=True)
        raise
    else:
        _idle[workers].append(pool)
    finally:
        if threading.get_ident() == caller:  # and not in a thread that collects garbage, whose count it would set
            torch.set_num_threads(before)  # for threads that are still to come
        if isinstance(items, Generator):
            items.close()  # with its threads: kept by a traceback, it would wait for garbage to be collected


def _take(workers: int) -> ThreadPoolExecutor:
    try:
        return _idle[workers].pop()
    except IndexError:  # all are in use
        return ThreadPoolExecutor(workers)


def _on_one_thread(function: Callable[[T], R], item: T) -> R:
    one_thread()
    return function(item)
