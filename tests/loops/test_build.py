"""What the compiler makes of a loop."""

import importlib
import time

import numpy as np
import pytest

from merge_engine.loops import door

build = pytest.importorskip("merge_engine.loops.build", exc_type=ImportError)


@pytest.mark.quick
def test_vectors_are_as_wide_as_the_cpu_has_them():
    import llvmlite.binding
    import numba

    if not llvmlite.binding.get_host_cpu_features().get("avx512f"):
        pytest.skip("needs a CPU with vectors of 512 bits")

    @numba.njit("void(f4[::1], f4[::1], f4[::1])")
    def product(a, b, out):
        build.wide()
        for j in range(len(out)):
            out[j] = a[j] * b[j]

    (machine_code,) = product.inspect_asm().values()
    assert "zmm" in machine_code
    a, out = np.arange(37, dtype=np.float32), np.empty(37, np.float32)
    product(a, a, out)
    assert np.array_equal(out, a * a)


@pytest.mark.quick
def test_a_compilation_says_so_and_a_cache_does_not(monkeypatch, caplog):
    kept = pytest.importorskip("merge_engine.loops.kept")
    monkeypatch.setattr(door, "LATE", 0.05)
    monkeypatch.setattr(importlib, "import_module", lambda name: time.sleep(0.5) or name)
    monkeypatch.setattr(kept, "keep", lambda name: None)
    for on_disk in (False, True):
        monkeypatch.setattr(door, "_loaded", {})
        monkeypatch.setattr(kept, "is_kept", lambda name, on_disk=on_disk: on_disk)
        assert door._load("tile_loops") == "merge_engine.loops.tile_loops"
        assert caplog.messages == ["compiling the loops for this CPU, once: some 10 s"]


@pytest.mark.quick
def test_numba_that_cannot_be_imported_is_reported(monkeypatch, caplog):
    def refuses(name):
        raise ImportError("Numba needs NumPy 2.5 or less")

    monkeypatch.setattr(door, "_loaded", {})
    monkeypatch.setattr(importlib, "import_module", refuses)
    assert not door.load() and door.loops() is None
    (message,) = set(caplog.messages)
    assert message.endswith("Numba needs NumPy 2.5 or less")
