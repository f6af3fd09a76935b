"""The GPUs that costs are estimated for, and the models that are merged."""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Gpu:
    """A target and the published figures of a GPU that runs it (vendors' data sheets; dense, without sparsity)."""

    name: str
    target: GPUTarget
    processors: int  # SMs or CUs
    clock: float  # boost, Hz
    lanes: int  # that a processor issues an instruction for in a cycle: instructions a cycle * lanes of one
    tensor: float  # bfloat16 matrix units, flop/s
    bandwidth: float  # HBM, byte/s
    float64: float  # matrix units or, where there are none, vector units, flop/s
    registers: int = 65536  # of 32 bits, in a processor
    warps: int = 64  # that a processor holds


GPUS = {
    "sm_80": Gpu("A100 80GB SXM", GPUTarget("cuda", 80, 32), 108, 1.41e9, 128, 312e12, 2.04e12, 19.5e12),
    "sm_90": Gpu("H100 SXM", GPUTarget("cuda", 90, 32), 132, 1.83e9, 128, 989e12, 3.35e12, 67e12),
    "sm_100": Gpu("B200", GPUTarget("cuda", 100, 32), 148, 1.85e9, 128, 2250e12, 8.0e12, 37e12),
    "sm_120": Gpu("RTX PRO 6000", GPUTarget("cuda", 120, 32), 188, 2.6e9, 128, 503e12, 1.79e12, 1.95e12, warps=48),
    "gfx942": Gpu("MI300X", GPUTarget("hip", "gfx942", 64), 304, 2.1e9, 64, 1307e12, 5.3e12, 163.4e12, 131072, 32),
    "gfx950": Gpu("MI355X", GPUTarget("hip", "gfx950", 64), 256, 2.4e9, 64, 2300e12, 8.0e12, 78.6e12, 131072, 32),
}


def target_of(arch: str) -> GPUTarget:
    """What the compiler calls an architecture: one of the table, or another "sm_89", "gfx90a", ..."""
    if arch in GPUS:
        return GPUS[arch].target
    if arch.startswith("gfx9"):
        return GPUTarget("hip", arch, 64)
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    raise ValueError(f"architecture {arch!r}, wanted sm_80 or later, or gfx9 (CDNA)")


# ([(rows, columns, how many in a layer)] of the linear modules, layers)
MODELS = {
    "one 4096 x 4096": ([(4096, 4096, 1)], 1),
    "one 4096 x 14336": ([(4096, 14336, 1)], 1),
    "TinyLlama": ([(2048, 2048, 2), (256, 2048, 2), (5632, 2048, 2), (2048, 5632, 1)], 22),
    "Llama-7B": ([(4096, 4096, 4), (11008, 4096, 2), (4096, 11008, 1)], 32),
    "Llama-70B": ([(8192, 8192, 2), (1024, 8192, 2), (28672, 8192, 2), (8192, 28672, 1)], 80),
}
