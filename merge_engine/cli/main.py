"""The merge-engine command.

Exit codes: 0 success; 1 an unexpected failure, or a sweep in which some merges or scores failed; 2 a user's mistake,
reported in one line; 130 interrupted; 141 the reader of the output has gone, as with ``| head``.
"""

import gc
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from merge_engine.cli import compare, completion, demo, info, merge, merge_models, normalize, recommend, search, serve
from merge_engine.cli.ending import end
from merge_engine.cli.options import as_flag
from merge_engine.cli.parser import Parser, Printable
from merge_engine.cli.postponed import allow
from merge_engine.errors import MergeError, printable, shortened
from merge_engine.version import __version__

COMMANDS = (merge, merge_models, normalize, info, compare, recommend, search, serve, demo, completion)


def command() -> int:
    """`main` in a process of its own, with garbage collection almost off.

    Importing torch and Numba creates millions of objects that are never freed; collections that go through them again
    and again, and once more at the end, would take 0.7 s. Does not return where nothing else runs in the process.
    """
    gc.set_threshold(1_000_000, 50, 50)
    allow()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for names that the terminal cannot show
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(Printable())
    code = main()
    gc.freeze()  # so that the interpreter does not collect at its end
    end(code, sys._getframe(1))
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    options = make_parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = _show_warning
            code: int | None = options.run(options)
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("merge-engine: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it again at its end
        return 141
    except OSError as error:
        print(f"merge-engine: error: {printable(str(error))}", file=sys.stderr)
        return 1
    except MergeError as error:
        several = os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ
        rank = f"rank {os.environ['RANK']}: " if several else ""
        print(f"merge-engine: error: {printable(shortened(rank + as_flag(str(error), options)))}", file=sys.stderr)
        return 2
    return code or 0


def make_parser() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(
        prog="merge-engine", description="Merge many LoRA adapters into one, fast, exactly and in little memory."
    )
    parser.add_argument("--version", action="version", version=f"merge-engine {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    for each in COMMANDS:
        each.add_to(commands)
    return parser


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    print(f"merge-engine: warning: {printable(shortened(str(message)))}", file=sys.stderr)
