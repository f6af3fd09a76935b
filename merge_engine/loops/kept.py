"""Which loops have machine code on disk, in the folder that Numba keeps it in; and a process that puts it there."""

import contextlib
import functools
import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import llvmlite
import llvmlite.binding
import numba

from merge_engine.loops.build import FOLDER

SWITCH = "MERGE_ENGINE_BACKGROUND"  # 0: a merge waits for the compiler, and none is started beside it
LOCK = "compiling.lock"
_HERE = Path(__file__).parent
_SOURCES = ("build.py", "term.py")


def is_kept(name: str) -> bool:
    """Whether the module of loops of that name was compiled, as it is now, for this CPU."""
    return FOLDER is not None and (FOLDER / _mark(name)).exists()


def keep(name: str) -> None:
    """Mark that the module's machine code is on disk, all of it."""
    if FOLDER is not None and not is_kept(name):
        with contextlib.suppress(OSError):  # without a mark there is one more look at the disk
            for old in FOLDER.glob(f"{name}.*.complete"):
                old.unlink(missing_ok=True)
            (FOLDER / _mark(name)).touch()


@functools.cache
def _mark(name: str) -> str:
    """The name of a file; it depends on all that Numba asks for before it takes machine code from the disk."""
    files = [_HERE / f"{name}.py", *(_HERE / source for source in _SOURCES)]
    stamps = [(file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    cpu = llvmlite.binding.get_host_cpu_name(), llvmlite.binding.get_host_cpu_features().flatten()
    chosen = sorted((key, value) for key, value in os.environ.items() if key.startswith("NUMBA_CPU"))
    known = numba.__version__, llvmlite.__version__, platform.python_version(), cpu, chosen, stamps
    return f"{name}.{hashlib.sha256(repr(known).encode()).hexdigest()[:16]}.complete"


_CODE = """
import os, sys
if os.fork():
    os._exit(0)  # nobody needs to wait for the other
os.nice(10)
sys.path[:] = {path!r}
from merge_engine.loops.kept import compile_now
compile_now()
"""


@functools.cache
def compile_in_background() -> bool:
    """Start a process that compiles the loops, for later merges; whether that could be done.

    It has a session of its own, holds no file or folder of this process, and ends by itself. Only one of them works.
    """
    executable = sys.executable or ""
    if not hasattr(os, "fork") or FOLDER is None or os.environ.get(SWITCH) == "0":
        return False
    if getattr(sys, "frozen", False) or not Path(executable).name.startswith("python"):
        return False  # a program that contains Python
    code = _CODE.format(path=[os.path.abspath(entry) for entry in sys.path])
    try:
        started = subprocess.run(
            [executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return started.returncode == 0


def limit_itself() -> None:
    """End this process after five minutes of work, whatever happens."""
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (300, 300))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def compile_now() -> None:
    """In the background: compile what is not kept, unless another process is at it. Errors end it, unheard."""
    import fcntl

    assert FOLDER is not None
    limit_itself()
    with open(FOLDER / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        from merge_engine.loops import door

        door.load()
