"""One part of the first run, in a process of its own: python -m bench.first_contact.part NAME

Prints what it found as one line of JSON; {"skipped": reason} where there is nothing to do. A failure is a traceback.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

COMPILERS = 8  # processes


def environment() -> dict[str, Any]:
    """The device, and what runs on it. Raises RuntimeError where the kernels have no launch for it."""
    import triton
    from merge_engine.kernels.launch import arch_of, has_launch

    from bench.harness.machine import PACKAGES, processor, versions

    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    found = {
        "device": torch.cuda.get_device_name(device),
        "arch": arch_of(device),
        "devices": torch.cuda.device_count(),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda or f"hip {torch.version.hip}",
        "machine": processor(),
        "cores": os.cpu_count(),
        **versions(PACKAGES),
    }
    if not has_launch(found["arch"]):
        raise RuntimeError(f"no launch for {found['arch']} ({found['device']}): wanted sm_80 or later, or gfx9 (CDNA)")
    if triton.knobs.runtime.interpret:
        raise RuntimeError("wanted compiled kernels, got Triton's interpreter (TRITON_INTERPRET is set)")
    return found


def compile_all(arch: str, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Compile every kernel for arch. Raises RuntimeError that names those that fail or spill."""
    from bench.static.kernels import METHODS, SEARCH, SELECTIONS, Case

    names = names or (*METHODS, "vote_balance", "terms", *SEARCH, *SELECTIONS)
    cases = [Case(name, dtype) for name in names for dtype in ("bf16", "fp32")]
    begun = time.perf_counter()
    workers = min(COMPILERS, os.cpu_count() or 1, len(cases))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(_compiled, cases, [arch] * len(cases)))
    wrong = {f"{case.name}, {case.dtype}": each for case, each in zip(cases, found, strict=True) if each}
    if wrong:
        raise RuntimeError("; ".join(f"{case}: {each}" for case, each in wrong.items()))
    return {"arch": arch, "kernels": len(cases), "spills": 0, "seconds": round(time.perf_counter() - begun, 1)}


def _compiled(case: Any, arch: str) -> str:
    """What is wrong with it, or nothing."""
    from bench.static.cost import resources

    try:
        spilled = resources(case, arch).spill_bytes
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return f"spills {spilled} bytes" if spilled else ""


def checked(name: str) -> dict[str, Any]:
    """One check of the self-check."""
    from bench.first_contact.checks import CHECKS, Place, Skipped

    try:
        return {"checked": CHECKS[name](Place(torch.device("cuda", torch.cuda.current_device())))}
    except Skipped as reason:
        return {"skipped": str(reason)}


def _compile_here() -> dict[str, Any]:
    from merge_engine.kernels.launch import arch_of

    return compile_all(arch_of(torch.device("cuda", torch.cuda.current_device())))


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"environment": environment, "compile": _compile_here}

if __name__ == "__main__":
    part = sys.argv[1]
    print(json.dumps(PARTS[part]() if part in PARTS else checked(part)))
