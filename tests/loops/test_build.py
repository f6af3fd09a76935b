"""What the compiler makes of a loop."""

import builtins
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
    monkeypatch.setattr(door, "LATE", 0.05)
    monkeypatch.setattr(door, "_was_compiled", lambda: False)
    real = builtins.__import__

    def slow(name, *rest):
        if name == "merge_engine.loops":
            time.sleep(0.5)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", slow)
    assert door.loops.__wrapped__() is not None
    assert caplog.messages == ["compiling the loops for this CPU, once: some 10 s"]
    monkeypatch.setattr(door, "_was_compiled", lambda: True)
    assert door.loops.__wrapped__() is not None
    assert len(caplog.messages) == 1
