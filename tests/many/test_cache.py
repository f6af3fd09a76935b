"""The cache of a session."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import pytest

from merge_engine.many.cache import Cache


@pytest.mark.quick
def test_the_cache_keeps_what_the_last_two_merges_used():
    cache = Cache(0)
    cache.begin(10)
    assert [cache.get(key, lambda key=key: key.upper(), lambda _: 4) for key in "abc"] == ["A", "B", "C"]
    assert (cache.find("a"), cache.find("b"), cache.find("c"), cache.held) == ("A", "B", None, 8)
    cache.begin(10)
    cache.get("b", str, len), cache.put("d", "D", 4)
    assert cache.find("a") == "A" and cache.find("d") is None  # a was used by the merge before
    cache.begin(10), cache.begin(10)
    cache.get("a", str, len), cache.put("d", "D", 4)
    assert (cache.find("a"), cache.find("b"), cache.find("d")) == ("A", None, "D")
    cache.begin(4)
    assert (cache.find("a"), cache.find("d"), cache.held) == (None, "D", 4)


def test_what_is_cheap_to_make_goes_when_a_merge_has_not_used_it():
    cache = Cache(0)
    cache.begin(100)
    for key in "abc":
        cache.put(key, key, 4, cheap=key != "c")
    cache.begin(100)
    assert cache.find("a") == "a"
    cache.begin(100)
    assert (cache.find("a"), cache.find("b"), cache.find("c"), cache.held) == ("a", None, "c", 8)
    cache.clear(), cache.begin(100)
    assert cache.held == 0


def test_the_cache_makes_a_value_once_for_all_who_ask():
    cache, asked, made = Cache(100), Barrier(3), []
    go = Event()

    def make():
        made.append(1)
        go.wait(10)
        if len(made) == 1:
            raise OSError("full")
        return "value"

    def ask():
        asked.wait(10)
        return cache.get("key", make, len)

    with ThreadPoolExecutor(2) as threads:
        first = [threads.submit(ask) for _ in range(2)]
        asked.wait(10)
        while not made:
            pass
        go.set()
        outcomes = [future.exception() for future in first]
    assert all(isinstance(error, OSError) or error is None for error in outcomes) and len(made) <= 2
    assert cache.get("key", make, len) == "value" == cache.find("key")
