"""The end of the command's own process, without the 0.2 s in which Python takes apart what torch has made."""

import atexit
import os
import sys
import threading
from types import FrameType

_OUTERMOST = ("<module>", "_run_code", "_run_module_as_main")  # of a script, and of python -m


def end(code: int, frame: FrameType | None) -> None:
    """End the process as Python does: threads are joined, exit handlers run, streams are flushed. Then at once.

    frame: of the module that runs the command. Returns where Python is to do it: another program runs that module (as
    a profiler or a debugger does), or a stream cannot be flushed.
    """
    while frame is not None:
        if frame.f_code.co_name not in _OUTERMOST:
            return
        frame = frame.f_back
    # Private in Python, but there from 3.9 on.
    join_threads, run_handlers = getattr(threading, "_shutdown", None), getattr(atexit, "_run_exitfuncs", None)
    if sys.gettrace() or sys.getprofile() or join_threads is None or run_handlers is None:
        return
    join_threads()
    run_handlers()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        return
    os._exit(code)
