"""Stages of work that overlap: each runs in threads of its own, and hands its results on in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's operators run on so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ahead(function: Callable[[T], R], items: Iterable[T], workers: int = 1) -> Iterator[R]:
    """function(item) for every item, in order, computed in the background while earlier results are in use.

    At most workers + 1 results are under way or waiting, so memory is bounded. Each worker runs torch's operators on
    one thread: results do not depend on how many there are. An exception of `function` or `items` is raised here.
    """
    before = torch.get_num_threads()  # a thread that has not asked yet gets what another one sets below
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # for threads that are still to come
