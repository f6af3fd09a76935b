"""Work ahead of its consumer: order, bounds, errors, and threads that stay for the next."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from merge_engine.runtime import threads as runtime_threads
from merge_engine.runtime.threads import ahead, for_each, threads

ROOT = Path(__file__).parents[2]
PATIENCE = 60  # seconds after which a barrier gives up: only a failure waits as long


@pytest.fixture(autouse=True)
def idle(monkeypatch):
    """No thread is idle at first; those that are at the end belong to no other test."""
    found = defaultdict(list)
    monkeypatch.setattr(runtime_threads, "_idle", found)
    yield found
    for pools in found.values():
        for pool in pools:
            pool.shutdown()


def met(parties):
    """A function whose first so many calls wait for each other, and the threads that they ran in."""
    barrier, seen = threading.Barrier(parties, timeout=PATIENCE), []

    def work(_):
        seen.append(threading.current_thread())
        barrier.wait()
        return torch.get_num_threads()

    return work, seen


@pytest.mark.quick
@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_results_come_in_order_whoever_is_first(workers, count):
    """Of the items under way at once, every one waits for the one behind it."""
    done = [threading.Event() for _ in range(count)]

    def work(i):
        last_of_its_run = i % workers == workers - 1 or i == count - 1
        assert last_of_its_run or done[i + 1].wait(PATIENCE)
        done[i].set()
        return i * i

    assert list(ahead(work, range(count), workers)) == [i * i for i in range(count)]


@pytest.mark.parametrize("workers", [1, 3])
def test_no_more_is_under_way_than_allowed(workers):
    drawn = []

    def items():
        for i in range(20):
            drawn.append(i)
            yield i

    for taken, result in enumerate(ahead(str, items(), workers)):
        assert result == str(taken) and len(drawn) == min(taken + workers + 1, 20)


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_comes_in_its_place_when_nothing_is_under_way_any_more(workers):
    started, ended, got = [], [], []

    def work(i):
        started.append(i)
        if i == 4:
            raise KeyError("the fifth")
        time.sleep(0.02)
        ended.append(i)
        return i

    with pytest.raises(KeyError, match="the fifth"):
        got.extend(ahead(work, range(100), workers))
    assert sorted(ended) == sorted(set(started) - {4}) and len(started) <= 5 + workers
    before = list(started)
    assert list(ahead(str, range(3), workers)) == ["0", "1", "2"]
    assert started == before and set(range(4)) <= set(ended)


def test_an_error_of_the_items_is_raised_when_nothing_is_under_way_any_more():
    ended = []

    def work(i):
        time.sleep(0.05)
        ended.append(i)

    def items():
        yield from range(3)
        raise OSError("no more")

    before = torch.get_num_threads()
    with pytest.raises(OSError, match="no more"):
        list(ahead(work, items(), 4))
    now = list(ended)
    time.sleep(0.1)
    assert ended == now and torch.get_num_threads() == before


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals to threads here")
def test_an_interrupt_is_raised_when_nothing_is_under_way_any_more():
    """Files that the work writes to are closed next."""
    log, all_started = [], threading.Event()

    def items():
        yield from range(2)
        all_started.set()  # a pool does not wait for a thread that an interrupt met while it started
        yield from range(2, 9)

    def work(i):
        log.append(f"{i} begins")
        if i == 0:
            assert all_started.wait(PATIENCE)
            time.sleep(0.05)  # until a result is waited for, most likely
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.2)
        log.append(f"{i} ends")

    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        list(ahead(work, items(), 2))
    now = list(log)
    assert "0 ends" in now and len(now) % 2 == 0
    time.sleep(0.3)
    assert log == now and torch.get_num_threads() == before


def test_one_who_leaves_early_waits_for_what_is_under_way_and_starts_nothing():
    started, ended = [], []

    def work(i):
        started.append(i)
        time.sleep(0.05)
        ended.append(i)
        return i

    before = torch.get_num_threads()
    results = ahead(work, range(100), 2)
    assert next(results) == 0
    results.close()
    now = list(started)
    assert sorted(now) == sorted(ended) and len(now) <= 3
    time.sleep(0.1)
    assert started == now and torch.get_num_threads() == before


@pytest.mark.quick
def test_threads_stay_for_the_next_of_as_many_workers(idle):
    work, first = met(3)
    list(ahead(work, range(3), 3))
    work, second = met(3)
    list(ahead(work, range(3), 3))
    assert len(set(first)) == 3 and set(first) == set(second)
    work, other = met(2)
    list(ahead(work, range(2), 2))
    assert len(set(other)) == 2 and not set(other) & set(first)
    assert {workers: len(pools) for workers, pools in idle.items()} == {3: 1, 2: 1}


@pytest.mark.parametrize("how", ["error", "left early"])
def test_threads_of_what_ended_early_end_too(idle, how):
    seen = []

    def work(i):
        seen.append(threading.current_thread())
        if how == "error":
            raise RuntimeError("no")

    results = ahead(work, range(9), 2)
    if how == "error":
        with pytest.raises(RuntimeError):
            next(results)
    else:
        next(results)
        results.close()
    assert seen and not any(thread.is_alive() for thread in seen) and not idle[2]


@pytest.mark.parametrize(("room", "most"), [(0, 2), (4, 2), (5, 3), (9, 3), (10, 4), (1000, 7)])
def test_small_items_wait_beside_the_one_in_work(room, most):
    """As many as there is room for, the oldest not counted."""
    begun, go, drawn = threading.Event(), threading.Event(), []

    def items():
        for i in range(6):
            drawn.append(i)
            yield i
        drawn.append(6)

    def work(i):
        begun.set()
        assert go.wait(10)
        return i

    results = ahead(work, items(), size=lambda i: 1000 if i == 0 else 5, room=room)
    taken = threading.Thread(target=lambda: drawn.append(next(results)))
    taken.start()
    assert begun.wait(10)
    deadline = time.monotonic() + 10
    while len(drawn) < most and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert len(drawn) == most
    go.set()
    taken.join()
    assert list(results) == [1, 2, 3, 4, 5]


def test_items_may_come_from_work_ahead_of_as_many_workers():
    inner = ahead(lambda i: i + 1, range(50), 2)
    outer = ahead(lambda i: 2 * i, inner, 2)
    assert list(ahead(str, outer, 2)) == [str(2 * (i + 1)) for i in range(50)]


def test_work_may_have_work_ahead_of_its_own():
    def work(i):
        assert torch.get_num_threads() == 1
        return sum(ahead(lambda j: i * j, range(10), 2))

    with threads(3):
        assert list(ahead(work, range(12), 2)) == [45 * i for i in range(12)]
        assert torch.get_num_threads() == 3


def test_several_at_once_have_threads_of_their_own():
    """All four workers of two who work ahead are needed at once; of a pool that both had taken there would be two."""
    list(ahead(str, range(2), 2))  # one pool is idle: who comes second must not get it too
    work, seen = met(4)
    results = []
    own = [threading.Thread(target=lambda: results.append(list(ahead(work, range(2), 2)))) for _ in range(2)]
    for thread in own:
        thread.start()
    for thread in own:
        thread.join()
    assert results == [[1, 1], [1, 1]] and len(set(seen)) == 4


def test_many_threads_over_and_over():
    failed = []

    def loop(seed):
        for i in range(60):
            want = [seed * j + i for j in range(7)]
            if list(ahead(lambda j, i=i: seed * j + i, range(7), 1 + i % 2)) != want:
                failed.append((seed, i))

    own = [threading.Thread(target=loop, args=(seed,)) for seed in range(6)]
    for thread in own:
        thread.start()
    for thread in own:
        thread.join()
    assert not failed


def test_torch_runs_on_one_thread_in_workers_that_start_late_too():
    """Of three workers the first item needs one: the others start when the threads are taken over."""
    with threads(3):
        assert list(ahead(lambda _: torch.get_num_threads(), range(1), 3)) == [1]
        work, seen = met(3)
        assert list(ahead(work, range(3), 3)) == [1, 1, 1] and len(set(seen)) == 3
        assert torch.get_num_threads() == 3
        got = []
        later = threading.Thread(target=lambda: got.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert got == [3]


def test_a_count_set_meanwhile_does_not_reach_the_workers():
    """Not even those that have had nothing to do yet: a thread's first operation asks what others have set."""
    with threads(2):
        assert list(ahead(lambda _: 0, range(4), 2)) == [0] * 4
        torch.set_num_threads(4)
        work, seen = met(2)
        assert list(ahead(work, range(2), 2)) == [1, 1] and len(set(seen)) == 2
        assert torch.get_num_threads() == 4


FORKS = """
import os, signal, sys, time
from merge_engine.runtime.threads import ahead

def child(does):
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)  # a child that waits for threads which it has not would wait for ever
        os._exit(0 if does() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, does

def works():
    return list(ahead(str, range(5), 2)) == list("01234")

def left():
    results.close()
    return works()

assert works()
child(works)
results = ahead(lambda i: time.sleep(0.3 * (i > 0)), range(9), 2)
next(results)
child(left)
results.close()
assert works()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_of_a_fork_has_threads_of_its_own():
    """Forked while threads are idle, and while they are at work."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKS], cwd=ROOT, check=True, timeout=PATIENCE)


def test_a_process_ends_with_work_under_way():
    code = (
        "import time; from merge_engine.runtime.threads import ahead; list(ahead(str, range(3), 2)); "
        "results = ahead(lambda i: time.sleep(0.1), range(9), 2); next(results); print('end')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_items_end_with_the_work_although_a_traceback_keeps_them():
    """An error that is kept has frames that keep all they know: what they know must have ended by then."""
    ended = []

    def items():
        try:
            yield from ahead(lambda item: item, range(9))
        finally:
            ended.append(threading.current_thread())

    def fails(item):
        raise ValueError(item)

    kept = []
    try:
        list(ahead(fails, items()))
    except ValueError as error:
        kept.append(error)
    assert ended == [threading.current_thread()] and kept


def test_a_count_stays_where_garbage_is_collected():
    """A generator that ends in another thread leaves that thread's count alone, and does not wait there."""
    unfinished = ahead(lambda item: item, range(9))
    next(unfinished)

    def collect():
        torch.get_num_threads()
        torch.set_num_threads(1)
        unfinished.close()
        return torch.get_num_threads()

    with threads(3), ThreadPoolExecutor(1) as other:
        assert other.submit(collect).result() == 1


SHARED = """
import torch
from merge_engine.runtime.threads import for_each

torch.set_num_threads(3)
seen = for_each(range(9), lambda _: torch.get_num_threads())
assert seen == [1] * 9, seen
assert torch.get_num_threads() == 3
"""


def test_threads_that_share_items_run_operators_alone():
    """In a process of its own, since a thread settles how many it uses once."""
    subprocess.run([sys.executable, "-c", SHARED], cwd=ROOT, check=True)


@pytest.mark.quick
def test_results_of_shared_items_come_in_their_order():
    """Of every two items each thread takes one."""
    both = threading.Barrier(2, timeout=PATIENCE)

    def work(item):
        both.wait()
        return item

    with threads(2):
        assert for_each(range(6), work) == list(range(6))


def test_a_tile_that_fails_ends_the_others():
    seen, all_free = [], threading.Barrier(torch.get_num_threads(), timeout=PATIENCE)

    def work(item):
        seen.append(item)
        if item == 3:
            raise RuntimeError("cannot be read")

    with pytest.raises(RuntimeError, match="cannot be read"):
        for_each(range(100_000), work)
    for_each(range(all_free.parties), lambda _: all_free.wait())
    assert len(seen) < 100_000


LATER = """
import threading
import torch
from merge_engine.runtime.threads import ahead

torch.set_num_threads(3)
got = []
list(ahead(lambda item: got.append(torch.get_num_threads()), range(3)))
assert got == [1] * 3, got
thread = threading.Thread(target=lambda: got.append(torch.get_num_threads()))
thread.start()
thread.join()
assert got[-1] == torch.get_num_threads() == 3, got
"""


def test_a_thread_that_has_not_asked_keeps_all_threads():
    """Stages in the background run on one thread each; what a later thread gets is the count from before."""
    subprocess.run([sys.executable, "-c", LATER], cwd=ROOT, check=True)


@pytest.mark.quick
def test_an_interrupt_while_threads_start_leaves_none_waiting(monkeypatch):
    """Else the process would wait for them at its end, for ever."""
    here, started = threading.current_thread(), []

    class Interrupted(threading.Barrier):
        def wait(self, timeout=None):
            if threading.current_thread() is here:
                while len(started) < 3:
                    time.sleep(0.001)
                raise KeyboardInterrupt
            started.append(threading.current_thread())
            return super().wait(timeout)

    monkeypatch.setattr(runtime_threads.threading, "Barrier", Interrupted)
    runtime_threads.workers.cache_clear()
    with pytest.raises(KeyboardInterrupt):
        runtime_threads.workers(3)
    for thread in started:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in started)
    monkeypatch.undo()
    assert runtime_threads.for_each([1, 2, 3], lambda each: 2 * each) == [2, 4, 6]
