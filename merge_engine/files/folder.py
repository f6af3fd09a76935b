"""An output folder, or file, that appears whole or not at all.

The result is made in a working folder beside the target (`files.working`), flushed to the disk and renamed. A process
that is killed leaves the working folder behind; the next run for the same target wipes it and uses it again, or goes on
from it (``resume``).
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from merge_engine.errors import OutputError, writing
from merge_engine.files.journal import journals
from merge_engine.files.working import Working, flush
from merge_engine.rules.guesses import describe
from merge_engine.runtime.memory import size_text

# `overwrite` deletes a folder with all that is in it, so only folders with one of these files are replaced.
_MODEL_FILES = ("adapter_config.json", "config.json", "merge_report.json")


@contextmanager
def place_folder(
    target: Path,
    overwrite: bool = False,
    required_bytes: int = 0,
    *,
    resume: bool = False,
    inputs: Sequence[Path] = (),
) -> Iterator[Path]:
    """Yield a working folder that becomes ``target`` when the block ends, and vanishes when it raises.

    Missing parents are created, and removed again on failure.

    Args:
        target: the folder to be made.
        overwrite: replace an existing folder, if it holds a model or nothing.
        required_bytes: free space to ask for before anything is written.
        resume: keep what an earlier run left in the working folder, and keep the folder when the block raises, unless
            it is empty then.
        inputs: folders that the result is made from; a target that is one or holds one is never replaced.

    Raises:
        OutputError: the target exists or holds an input, another process is writing it, or there is too little space
            or no permission.
    """
    target = Path(os.path.realpath(target))  # a link means the place it leads to
    with writing(target):
        check_target(target, overwrite, inputs)
        made = _make_parents(target.parent)
    try:
        with Working(target) as working:
            with writing(target):
                working.recover()
                check_target(target, overwrite, inputs)
                _take(working, resume)
            try:
                check_space(target, required_bytes)
                yield working.result
                with writing(target):
                    sync(working.result)
                    check_target(target, overwrite, inputs)
                    working.swap()
            except BaseException:
                if resume:
                    _remove_if_empty(working.result)
                    working.keep_result()
                raise
    except BaseException:
        for parent in made:
            _remove_if_empty(parent)
        raise


@contextmanager
def place_file(
    target: Path, overwrite: bool = False, required_bytes: int = 0, *, inputs: Sequence[Path] = ()
) -> Iterator[Path]:
    """Yield a working folder, of whose files the one with ``target``'s name becomes ``target`` when the block ends.

    Whatever else the block made there is removed. The other arguments and the errors are those of `place_folder`; a
    target that is an input is never replaced.
    """
    target = Path(os.path.realpath(target))
    with writing(target):
        _check_file(target, overwrite, inputs)
        made = _make_parents(target.parent)
    try:
        with Working(target) as working:
            with writing(target):
                _take(working, resume=False)
            check_space(target, required_bytes)
            yield working.result
            with writing(target):
                sync(working.result)
                _check_file(target, overwrite, inputs)
                os.replace(working.result / target.name, target)
                flush(target.parent)
    except BaseException:
        for parent in made:
            _remove_if_empty(parent)
        raise


def output_path(output: Any) -> Path:
    """The path of an output. Raises OutputError for what is none, as a recipe that stands in its place."""
    if isinstance(output, str | os.PathLike):
        return Path(output)
    raise OutputError(
        f"output: wanted the path to write to, got {describe(output)}; fields of a recipe are keywords: method='linear'"
    )


def working_folder(target: Path) -> Path:
    """The folder in which `place_folder` makes what becomes ``target``."""
    return Working(Path(os.path.realpath(target))).result


def _take(working: Working, resume: bool) -> None:
    """An empty folder for the result, or what an earlier run left there. Refuses to wipe what can be resumed."""
    if not resume and journals(working.result):
        working.keep_result()
        raise OutputError(
            f"{working.target}: an unfinished merge into a model is in {working.root}; run its command again to finish "
            "it, or remove that folder"
        )
    working.result.mkdir(exist_ok=True)
    if not resume:
        wipe(working.result)


def check_target(target: Path, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Raise OutputError where `place_folder` would refuse to make or to replace ``target``."""
    target = Path(os.path.realpath(target))
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise OutputError(f"{target} is a file, wanted a folder to write to")
    for folder in inputs:
        for read in (folder, *filter(Path.is_file, folder.glob("*"))):  # any of these may be a link
            if target in (real := Path(os.path.realpath(read)), *real.parents):
                raise OutputError(f"{target} holds {folder}, which is merged; wanted another folder to write to")
    if not overwrite:
        raise OutputError(f"{target} already exists; pass overwrite to replace it")
    names = os.listdir(target)
    if names and not any(name in names for name in _MODEL_FILES):
        raise OutputError(
            f"{target} holds no model, so overwrite does not replace it; remove it or choose another folder"
        )


def _check_file(target: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Raise OutputError where `place_file` would refuse to make or to replace ``target``, a real path."""
    if not os.path.lexists(target):
        return
    if target.is_dir():
        raise OutputError(f"{target} is a folder, wanted a file to write to")
    if any(target == Path(os.path.realpath(read)) for read in inputs):
        raise OutputError(f"{target} is merged; wanted another file to write to")
    if not overwrite:
        raise OutputError(f"{target} already exists; pass overwrite to replace it")


def check_space(target: Path, required: int) -> None:
    """Raise OutputError where fewer than ``required`` bytes are free beside the target."""
    free = shutil.disk_usage(target.parent).free
    if required > free:
        raise OutputError(f"{target} needs {size_text(required, up=True)} of disk, {size_text(free)} is free")


def _make_parents(folder: Path) -> list[Path]:
    """Create ``folder`` and its missing parents; return those that were created, the deepest first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    made: list[Path] = []
    try:
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            made.insert(0, path)
    except BaseException:
        for path in made:
            _remove_if_empty(path)
        raise
    return made


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # someone else put something there meanwhile: it stays
        folder.rmdir()


def wipe(folder: Path) -> None:
    """Remove all that is in a folder."""
    for entry in list(folder.iterdir()):
        _remove(entry)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)  # another process may be wiping the same folder


def sync(folder: Path) -> None:
    """Flush every file below ``folder``, then the folders themselves."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            flush(Path(root, name))
        flush(Path(root))
