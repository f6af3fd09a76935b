"""What an unfinished output already holds, so that the same command can continue it after a kill.

The journal lies in the working folder beside the output: one file of JSON lines for each rank. The first line of
rank 0's file says what is being made; every other line names a finished tensor and the hash of its bytes. The hash is
XXH3 of 128 bits: it finds damage as well as SHA-256 does, 20 times as fast, but does not protect from forgery. A tensor
is written before its line, and a line in one call; an incomplete last line is ignored. Every line is checked against
the disk before it is used.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_engine.errors import OutputError, shown, writing

_PREFIX = ".journal."


class Journal:
    """One rank's file of the journal, open for appending."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self._path = folder / f"{_PREFIX}{rank}"
        with writing(self._path):
            self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            size = os.fstat(self._file).st_size
            if size and os.pread(self._file, 1, size - 1) != b"\n":
                os.write(self._file, b"\n")  # a kill left an incomplete line: ours start on a new one

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Note what is being made. Only for rank 0, in an empty folder."""
        self._add({"merge": identity})

    def finished(self, key: str, digest: str) -> None:
        """Note that one tensor is whole."""
        self._add({"tensor": key, "xxh3": digest})

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def _add(self, entry: Mapping[str, Any]) -> None:
        with writing(self._path):
            os.write(self._file, json.dumps(entry).encode() + b"\n")


def read_journal(folder: Path) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """(what is being made, or None where no line says it; {tensor: hash} of all ranks)."""
    identity, finished = None, {}
    for path in journals(folder):
        for line in path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if not isinstance(entry, dict):
                continue
            if isinstance(entry.get("merge"), dict):
                identity = entry["merge"]
            elif isinstance(entry.get("tensor"), str) and isinstance(entry.get("xxh3"), str):
                finished[entry["tensor"]] = entry["xxh3"]
    return identity, finished


def check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], output: Path, folder: Path) -> None:
    """Raise OutputError, which names what differs, unless the unfinished output in `folder` is of the same merge."""
    wanted = json.loads(json.dumps(wanted))
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise OutputError(
                f"{output}: an unfinished merge is in {folder}, with another {_difference(key, found, wanted)}; "
                "run the same command to finish it, or remove that folder"
            )


def journals(folder: Path) -> list[Path]:
    """The files of the journal of every rank: none where the folder is missing."""
    return sorted(filter(Path.is_file, folder.glob(f"{_PREFIX}*")))


def remove_journal(folder: Path) -> None:
    """Delete the journal of every rank: the output is whole."""
    with writing(folder):
        for path in journals(folder):
            path.unlink()


def _difference(key: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    old, new = found.get(key), wanted.get(key)
    if isinstance(old, dict) and isinstance(new, dict):
        parts = sorted(old.keys() | new.keys())
        part = next(part for part in parts if (part in old, old.get(part)) != (part in new, new.get(part)))
        return f"{key} ({part})" if isinstance(old.get(part), dict) else _difference(part, old, new)
    return f"{key} (it was {shown(old, quoted=False)}, now {shown(new, quoted=False)})"
