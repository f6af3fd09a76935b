"""What a command says of its result: lines of text or, with --json, one JSON object on standard output."""

import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from merge_engine.cli.parser import Printable, show


class Result:
    """Facts by name, and the lines that say them."""

    def __init__(self, as_json: bool) -> None:
        self.facts: dict[str, Any] = {}
        self._as_json = as_json

    def say(self, text: str, **facts: Any) -> None:
        """Print the line, unless facts are wanted; these are taken note of."""
        self.facts |= facts
        if not self._as_json:
            show(text)


@contextmanager
def result_of(given: dict[str, Any]) -> Iterator[Result]:
    """The result of a command; takes `json` out of its options.

    With --json the object is printed at the end: the facts, "seconds" since the start unless they are a fact, and
    "warnings", which are on standard error as well. Where the block raises nothing is printed.
    """
    as_json, start = given.pop("json", False), time.perf_counter()
    result = Result(as_json)
    if not as_json:
        yield result
        return
    with _noted() as noted:
        yield result
    if result.facts:  # a rank that says nothing prints nothing
        seconds = {"seconds": round(time.perf_counter() - start, 3)}
        print(json.dumps({**seconds, **result.facts, "warnings": noted}, default=str))


@contextmanager
def _noted() -> Iterator[list[str]]:
    """The texts of the warnings of the block, which are shown as before."""
    noted: list[str] = []
    shown, logger = warnings.showwarning, logging.getLogger("merge_engine")

    def note(message: Any, *rest: Any, **more: Any) -> None:
        noted.append(str(message))
        shown(message, *rest, **more)

    class Note(logging.StreamHandler):
        def emit(self, record: logging.LogRecord) -> None:
            noted.append(record.getMessage())
            super().emit(record)

    handler = Note(sys.stderr)
    handler.setFormatter(Printable())
    handler.setLevel(logging.WARNING)
    logger.addHandler(handler)
    warnings.showwarning = note
    try:
        yield noted
    finally:
        warnings.showwarning = shown
        logger.removeHandler(handler)
