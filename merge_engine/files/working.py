"""The working folder ``.<name>.partial`` beside a target: ours only with our mark in it, and our lock on it.

The result is made in a folder in it, so that the mark never gets into the result::

    .out.partial/.merge-engine   the mark: the first file to be made there, and the last to be removed
    .out.partial/result          becomes ``out``
    .out.partial/replaced        the old ``out`` for the moment between two renames, where they cannot be exchanged
    .out.partial/removed         an old ``out`` that is being removed, and must never be put back

A link, a folder without the mark that is not empty, and one with anything else in it are someone else's: they are
refused by name, and nothing in them is read, changed or removed.
"""

import ctypes
import errno
import fcntl
import os
import shutil
from pathlib import Path

from merge_engine.errors import OutputError, writing

MARK = ".merge-engine"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux: <fcntl.h>, <linux/fs.h>
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # a file system that cannot, or an old kernel


class Working:
    """The working folder of one target, a real path: held and marked inside ``with``, removed at its end.

    Entering raises OutputError: another process holds it, it is not ours, or it cannot be made.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.root = target.with_name(f".{target.name}.partial")
        self.result = self.root / "result"
        self._replaced, self._removed = self.root / "replaced", self.root / "removed"
        self._keeps = False
        self._lock = -1

    def __enter__(self) -> "Working":
        with writing(self.target):
            try:
                self._take_lock()
                self._claim()
            except BaseException:  # an interrupt, too, at any moment
                self._give_up()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if _is_open_folder(self.root, self._lock):  # else someone removed it, and this may be another one
                self._clear()
        finally:
            self._close()

    def keep_result(self) -> None:
        """Leave what is in `result` for the next run, if it exists."""
        self._keeps = True

    def recover(self) -> None:
        """Put an old result back, where an earlier run was killed before the new one was in its place."""
        if os.path.lexists(self._replaced) and not os.path.lexists(self.target):
            self._replaced.rename(self.target)

    def swap(self) -> None:
        """Move the result to its place. An old one there goes in the same moment, where the file system can do so."""
        if not os.path.lexists(self.target):
            self.result.rename(self.target)
        elif not _exchange(self.result, self.target):
            self._discard()
            self.target.rename(self._replaced)
            try:
                self.result.rename(self.target)
            except BaseException:
                self._replaced.rename(self.target)
                raise
        flush(self.target.parent)

    def _take_lock(self) -> None:
        """Create the folder where it is missing, and hold an exclusive lock on it by a descriptor, `_lock`."""
        while True:
            if self.root.is_symlink() or (os.path.lexists(self.root) and not self.root.is_dir()):
                raise self._foreign("it is a link" if self.root.is_symlink() else "it is no folder")
            self.root.mkdir(exist_ok=True)
            try:
                locked = self._try_lock()
            except FileNotFoundError:
                continue  # its owner removed it between the two calls
            if not locked:
                raise OutputError(f"{self.target} is being written by another process")
            # The lock is on a folder, not a name: what was opened may have been removed in between.
            if _is_open_folder(self.root, self._lock):
                return
            self._close()

    def _try_lock(self) -> bool:
        """Open the folder and lock it; False where another process holds it."""
        self._lock = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._close()
            return False
        return True

    def _give_up(self) -> None:
        """Remove the folder where it can be locked and holds nothing but the mark."""
        try:
            if (self._lock >= 0 or self._try_lock()) and _is_open_folder(self.root, self._lock):
                self._remove_root()
        except OSError:
            return  # it is gone, or someone else's
        finally:
            self._close()

    def _close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _claim(self) -> None:
        """Mark an empty folder as ours; raise OutputError for one that holds what is not ours."""
        names = set(os.listdir(self.root))
        if names and MARK not in names:
            raise self._foreign(f"it has no {MARK} in it")
        ours = {MARK, *(path.name for path in (self.result, self._replaced, self._removed))}
        if names - ours:
            raise self._foreign(f"{min(names - ours)} in it is of someone else")
        if linked := [name for name in sorted(names) if (self.root / name).is_symlink()]:
            raise self._foreign(f"{linked[0]} in it is a link")
        (self.root / MARK).touch()

    def _foreign(self, why: str) -> OutputError:
        return OutputError(
            f"{self.target}: {self.root} is wanted as working folder, but {why}; move or remove it, or choose another "
            "output"
        )

    def _discard(self) -> None:
        """Remove an old result. It gets another name first: what is half removed must never be put back."""
        if os.path.lexists(self._removed):
            shutil.rmtree(self._removed)
        if os.path.lexists(self._replaced):
            self._replaced.rename(self._removed)
            shutil.rmtree(self._removed)

    def _clear(self) -> None:
        """Remove the folder: not a result that is kept, nor an old one that is not yet back in its place."""
        try:
            if os.path.lexists(self.target):
                self._discard()
            if os.path.lexists(self.result) and not self._keeps:
                shutil.rmtree(self.result)
            self._remove_root()
        except OSError:
            return  # the next run for this target goes on with it

    def _remove_root(self) -> None:
        """Remove the folder if nothing but the mark is in it."""
        if set(os.listdir(self.root)) <= {MARK}:
            (self.root / MARK).unlink(missing_ok=True)
            self.root.rmdir()


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if not rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE):
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _is_open_folder(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def flush(path: Path) -> None:
    """Flush one file, or the list of names in one folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
