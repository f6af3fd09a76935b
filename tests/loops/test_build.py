"""What the compiler makes of a loop."""

import numpy as np
import pytest

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
