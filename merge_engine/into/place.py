"""How a full model gets to its place: a working folder for all ranks, resumed after a kill, renamed when whole."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from merge_engine.errors import MergeError, OutputError, writing
from merge_engine.files.folder import place_folder, sync, wipe, working_folder
from merge_engine.files.journal import read_journal, remove_journal
from merge_engine.files.shards import Layout
from merge_engine.into.resume import check_files, take_up
from merge_engine.runtime.processes import Ranks, join


class FullMerge(Protocol):
    """A merge whose result is a full model."""

    @property
    def layout(self) -> Layout:
        """Of its tensors, in shards."""
        ...

    @property
    def inputs(self) -> list[Path]:
        """The folders that it reads."""
        ...

    def identity(self) -> dict[str, Any]:
        """Everything that decides the bytes of the output."""
        ...

    @property
    def companions(self) -> set[str]:
        """The names of all files that `finish` may write."""
        ...

    def write(self, folder: Path, ranks: Ranks, progress: bool | None) -> int:
        """Write this rank's tensors; how many of the whole model earlier runs had finished."""
        ...

    def finish(self, folder: Path) -> None:
        """Write the files beside the weights."""
        ...


def place(merge: FullMerge, output: Path, *, overwrite: bool, progress: bool | None) -> int:
    """Carry out a merge into ``output``, which appears whole or not at all; how many tensors earlier runs had finished.

    Raises MergeError: OutputError where it cannot be written. Then, after an error while reading, and where an earlier
    run had finished tensors, the next run goes on from what is there.
    """
    ranks = join()
    chosen: AbstractContextManager[Path] = nullcontext(working_folder(output))
    if ranks.rank == 0:
        identity, companions = merge.identity(), merge.companions  # a mistake in the inputs leaves no folder
        chosen = place_folder(output, overwrite, resume=True, inputs=merge.inputs)
    with chosen as folder:
        if ranks.rank == 0:
            take_up(identity, merge.layout, output, folder)
            check_files(merge.layout, companions, output, folder)
        ranks.wait()
        begun = bool(read_journal(folder)[1])
        ranks.wait()  # no rank may add to the journal before every rank has read it
        try:
            resumed = merge.write(folder, ranks, progress)
        except MergeError as error:
            if not (begun or isinstance(error, OutputError) or _is_of_disk(error)):
                wipe(folder)  # a mistake in the inputs: no later run can go on from here
            raise
        ranks.wait()
        if ranks.rank == 0:
            merge.finish(folder)
            with writing(output):
                sync(folder)  # this takes a while; after a kill in it the journal is still there
            remove_journal(folder)
    ranks.wait()
    return resumed


def _is_of_disk(error: BaseException | None) -> bool:
    """Whether an error was caused by one of the disk: what was asked for may well be right."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return error is not None
