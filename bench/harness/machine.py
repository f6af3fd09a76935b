"""The machine of a run: its best rates, its free memory, its versions."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.harness.measure import MIB, Contestant, clock_of, interleaved, spread

PACKAGES = ("torch", "triton", "peft", "transformers", "numpy", "numba", "merge-engine")


@dataclass(frozen=True)
class Limits:
    """Best rates of this machine: bytes a second that a copy reads and writes, flops a second of a matrix product."""

    bandwidth: float
    matmul: float


def limits(device: str) -> Limits:
    """Medians of seven runs: a copy of 256 MiB, and 2048^3 (8192^3 on a GPU) by torch.mm in float32, without TF32."""
    clock, size = clock_of(device), 8192 if device == "cuda" else 2048
    source = torch.ones(64 * MIB, device=device)
    target = torch.empty_like(source)
    square = torch.randn(size, size, device=device)
    contestants = {
        "copy": Contestant(lambda: target.copy_(source)),
        "matmul": Contestant(lambda: torch.mm(square, square)),
    }
    taken = interleaved(contestants, clock, seconds=0, least=7)
    medians = {name: spread([sample.seconds for sample in samples]).median for name, samples in taken.items()}
    return Limits(2 * source.nbytes / medians["copy"], 2 * size**3 / medians["matmul"])


def free_memory(device: str) -> int:
    """Bytes of memory that are not in use."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])


def about(device: str, limits: Limits) -> dict[str, Any]:
    """What a report says of the machine: processor, rates, versions, commit, date, load."""
    found: dict[str, Any] = {"machine": processor(), "cores": os.cpu_count(), "threads_used": torch.get_num_threads()}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    found |= {"bandwidth_gb_s": round(limits.bandwidth / 1e9, 2), "matmul_gflop_s": round(limits.matmul / 1e9, 1)}
    return found | versions(PACKAGES) | {"load": round(os.getloadavg()[0], 2)}


def versions(packages: Sequence[str]) -> dict[str, Any]:
    """The versions of Python and of these packages, the commit, and the date."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found | {"commit": _commit(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """The commit of the checkout, with + where its files were changed; "none" outside a checkout."""
    root = Path(__file__).parents[2]
    try:
        done = [
            subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return done[0] + "+" * bool(done[1])
