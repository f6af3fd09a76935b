"""Stages of work that overlap: each runs in threads of its own, and hands its results on in order."""

import os
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

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
