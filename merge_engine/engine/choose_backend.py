"""The one door to the two backends: which of them computes, and why."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from merge_engine.engine.backend import Backend
from merge_engine.engine.cpu_backend import TorchBackend
from merge_engine.errors import RecipeError, some
from merge_engine.loops import door
from merge_engine.runtime.processes import gpu
from merge_engine.version import __version__

BACKENDS = ("auto", "triton", "torch")
_MISSING = "not installed"
VARIABLE = "MERGE_ENGINE_BACKEND"


def choose(name: str | None = None) -> Backend:
    """The backend of that name: "triton", "torch", or "auto", which takes Triton on a GPU and torch elsewhere.

    None: what the environment variable MERGE_ENGINE_BACKEND says, or "auto". Raises RecipeError for an unknown name,
    and for "triton" where it cannot run, with the reason.
    """
    name = name or os.environ.get(VARIABLE) or "auto"
    if name not in BACKENDS:
        raise RecipeError(f"backend: wanted one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "torch" or (name == "auto" and not torch.cuda.is_available()):
        return TorchBackend()  # without Triton's import, of 0.2 s
    device, reason = triton_device()
    if device is None:
        if name == "triton":
            raise RecipeError(f"backend: triton cannot run here: {reason}")
        return TorchBackend()
    from merge_engine.engine.triton_backend import TritonBackend

    return TritonBackend(device)


def triton_device() -> tuple[torch.device | None, str]:
    """(where Triton's kernels can run, why): this process's GPU (`ranks.gpu`), the CPU if interpreted, or None."""
    if not (torch.cuda.is_available() or "triton" in sys.modules or os.environ.get("TRITON_INTERPRET")):
        if (found := _version("triton")) != _MISSING:  # to import it would take 0.2 s, and 3.9 reports leaks at the end
            return None, f"triton {found} sees no CUDA or ROCm device"
    try:
        import triton
    except ImportError as error:
        return None, f"triton cannot be imported ({error})"
    if torch.cuda.is_available():
        from merge_engine.kernels.launch import arch_of, has_launch

        device = gpu()
        if not has_launch(arch := arch_of(device)):
            return None, f"the kernels have no launch for {arch}: wanted sm_80 or later, or gfx9 (CDNA)"
        return device, f"triton {triton.__version__} on {torch.cuda.get_device_name(device)}"
    if triton.knobs.runtime.interpret:
        return torch.device("cpu"), f"triton {triton.__version__} in its interpreter (TRITON_INTERPRET=1), very slow"
    return None, f"triton {triton.__version__} sees no CUDA or ROCm device"


def system() -> dict[str, str]:
    """What `merge-engine info --system` shows: versions, threads, and which backend "auto" takes here, and why."""
    device, reason = triton_device()
    chosen = choose()
    asked = os.environ.get(VARIABLE)
    return {
        "merge-engine": __version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {some(torch.get_num_threads(), 'thread')}, "
        + torch.backends.cpu.get_cpu_capability(),
        "numba": _numba(),
        "triton": reason if device is not None else f"not used: {reason}",
        "backend": f"{chosen.name} on {chosen.device}" + (f" ({VARIABLE}={asked})" if asked else ""),
        **{name: _version(name) for name in ("safetensors", "transformers", "peft")},
    }


def _numba() -> str:
    state = door.state()
    return f"{_version('numba')}, {state}" if door.installed() else state


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return _MISSING
