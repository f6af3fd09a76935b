"""How many times the kernels are compiled for a whole model, as Triton tells launches apart, without a GPU."""

import os
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from merge_engine.kernels.merge import merge_deltas
from merge_engine.kernels.source import Drop, Lora
from merge_engine.kernels.trims import trims
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

from bench.static.gpus import MODELS
from bench.static.rows import GROUP_BYTES, compiles

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="replaces the launch of interpreted kernels"
)
HOPPER = CUDABackend(GPUTarget("cuda", 90, 32))


class Compiled:
    """Launches that are told apart as `JITFunction.run` does it, and not carried out."""

    def __init__(self) -> None:
        self.keys: set[Any] = set()

    def run(self, kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        function = JITFunction(kernel.fn, **kernel.kwargs)
        bind = create_function_from_signature(function.signature, function.params, HOPPER)
        _, specialization, rest = bind(*arguments, **options)
        self.keys.add((function.__name__, str(specialization), str(sorted(rest.items()))))


def launched(model: str, method: str, adapters: Sequence[int]) -> set[Any]:
    """Of a merge of bfloat16 adapters of rank 16, group by group."""
    modules, layers = MODELS[model]
    compiled = Compiled()
    with mock.patch.object(InterpretedFunction, "run", lambda kernel, *a, **o: compiled.run(kernel, *a, **o)):
        for rows, columns, count in modules:
            size = max(1, GROUP_BYTES // (4 * rows * columns))
            for held in {min(size, count * layers), count * layers % size} - {0}:
                for many in adapters:
                    merge_group(held, many, rows, columns, method)
    return compiled.keys


def merge_group(modules: int, adapters: int, rows: int, columns: int, method: str) -> None:
    def slab(*shape: int) -> torch.Tensor:
        return torch.empty(modules, adapters, *shape, dtype=torch.bfloat16, device="meta")

    source = Lora(slab(16, columns), slab(rows, 16), torch.empty(modules, adapters, device="meta"))
    if method == "ties":
        keep: Any = trims(source, torch.full((1, modules, adapters), 1000))
    else:
        density = torch.full((1, modules, adapters), 0.2, dtype=torch.float64)
        keep = Drop(density, [1], torch.arange(modules), torch.arange(adapters))
    merge_deltas(source, [[1.0] * adapters], keep, elect="total", divisor="count")


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
@pytest.mark.parametrize("model", ["TinyLlama", "Llama-7B", "Llama-70B"])
def test_compiles_of_a_whole_model(model: str, method: str) -> None:
    """No more for several numbers of adapters and modules than for one, and as many as the static report says."""
    keys = launched(model, method, [3, 16])
    assert len(keys) == compiles(model, method)
