"""Merged adapters by name: with the bytes of a merge, built once, within the limit, and never half made."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
from sweeps import save_lora

import merge_engine
from merge_engine.errors import AdapterError, MergeError, OutputError
from merge_engine.serve import resolver as serve_resolver
from merge_engine.serve.resolver import BusyError, Resolver

WEIGHTS = "adapter_model.safetensors"


@pytest.mark.quick
def test_the_bytes_are_those_of_a_merge(served, tmp_path):
    resolver = Resolver(served, tmp_path / "cache")
    path = resolver.resolve("merge:sql*2+chat@ties,density=0.3")
    recipe = {"method": "ties", "density": 0.3, "weights": [2, 1]}
    merge_engine.merge([served / "sql", served / "chat"], tmp_path / "want", **recipe)
    assert (path / WEIGHTS).read_bytes() == (tmp_path / "want" / WEIGHTS).read_bytes()
    assert resolver.resolve("merge:sql*2.0+chat@ties,density=.30") == path
    assert Resolver(served, tmp_path / "cache").resolve("merge:sql*2+chat@ties,density=0.3") == path
    assert resolver.counts == {"built": 1, "cache": 1}
    save_lora(served / "sql", 99)  # other bytes are another merge
    other = resolver.resolve("merge:sql*2+chat@ties,density=0.3")
    assert other != path and (other / WEIGHTS).read_bytes() != (path / WEIGHTS).read_bytes()


def test_many_requests_build_each_once(served, tmp_path):
    resolver = Resolver(served, tmp_path / "cache", builds=2)
    names = [f"merge:sql+chat*{weight}@linear" for weight in range(1, 21)]
    with ThreadPoolExecutor(64) as threads:
        paths = list(threads.map(resolver.resolve, names * 10))
    assert len(set(paths)) == 20 and paths == paths[:20] * 10
    assert resolver.counts["built"] == 20 and resolver.counts.total() == 200


def test_the_limit_on_the_disk_holds(served, tmp_path):
    size = serve_resolver._bytes_of(Resolver(served, tmp_path / "one").resolve("merge:sql+chat@linear"))
    resolver = Resolver(served, tmp_path / "cache", limit=int(3.5 * size))
    first, made = resolver.resolve("merge:sql+chat@linear"), []
    for weight in range(2, 8):
        made.append(resolver.resolve(f"merge:sql+chat*{weight}@linear"))
        assert resolver.resolve("merge:sql+chat@linear") == first and resolver.held() <= resolver.limit
    assert resolver.counts["built"] == 7
    kept = {path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")}
    assert kept == {first, *made[-2:]}  # what was used last
    small = Resolver(served, tmp_path / "small", limit=100)
    with pytest.raises(OutputError, match="the cache's limit"):
        small.resolve("merge:sql+chat@linear")
    assert small.held() == 0


def test_what_is_refused_leaves_nothing(served, tmp_path):
    resolver = Resolver(served, tmp_path / "cache", max_rank=4)
    (tmp_path / "outside").mkdir()
    for name, kind in [
        ("merge:nobody+sql", AdapterError),
        ("merge:../outside", MergeError),
        ("merge:sql+chat", OutputError),
    ]:
        with pytest.raises(kind):
            resolver.resolve(name)
    assert resolver.resolve("merge:sql+chat@linear,rank=4").is_dir()
    assert resolver.counts == {"refused": 3, "built": 1}
    with pytest.raises(AdapterError, match="wanted a folder of adapters"):
        Resolver(tmp_path / "missing", tmp_path / "cache")


def test_a_request_that_finds_no_turn_is_told_so(served, tmp_path, monkeypatch):
    begun, go_on = Event(), Event()
    merge = serve_resolver.merge

    def slow(*arguments, **options):
        begun.set()
        assert go_on.wait(60)
        return merge(*arguments, **options)

    monkeypatch.setattr(serve_resolver, "merge", slow)
    resolver = Resolver(served, tmp_path / "cache", waiting=0.05)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(resolver.resolve, "merge:sql+chat")
        assert begun.wait(60)
        with pytest.raises(BusyError, match=r"wanted a turn within 0\.05 s"):
            resolver.resolve("merge:sql+ads")
        go_on.set()
        assert first.result().is_dir()


KILLED = """\
import sys, time
from merge_engine.engine.output import Output
def stop(self):
    open(sys.argv[3], "w").close()
    time.sleep(600)
Output.finish = stop
from merge_engine.serve.resolver import Resolver
Resolver(sys.argv[1], sys.argv[2]).resolve("merge:sql+chat@linear")
"""


def test_a_kill_leaves_no_half_made_entry(served, tmp_path):
    command = [sys.executable, "-c", KILLED, served, tmp_path / "cache", tmp_path / "begun"]
    environment = {**os.environ, "PYTHONPATH": str(Path(merge_engine.__file__).parent.parent)}
    process = subprocess.Popen(list(map(str, command)), env=environment)
    until = time.monotonic() + 300
    while not (tmp_path / "begun").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = [path for path in (tmp_path / "cache").iterdir() if path.name != ".locks"]
    assert len(left) == 1 and left[0].name.startswith(".")  # nothing that a request could find
    resolver = Resolver(served, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".locks"]
    assert (resolver.resolve("merge:sql+chat@linear") / WEIGHTS).is_file()
