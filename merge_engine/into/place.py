"""How a full model gets to its place: a working folder for all ranks, resumed after a kill, renamed when whole."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from merge_engine.errors import MergeError, OutputError, writing
from merge_engine.files.folder import place_folder, sync, wipe, working_folder
from merge_engine.files.journal import remove_journal
from merge_engine.files.shards import Layout
from merge_engine.into.resume import take_up
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

    def write(self, folder: Path, ranks: Ranks, progress: bool | None) -> int:
        """Write this rank's tensors; how many of the whole model earlier runs had finished."""
        ...

    def finish(self, folder: Path) -> None:
        """Write the files beside the weights."""
        ...


def place(merge: FullMerge, output: Path, *, overwrite: bool, progress: bool | None) -> int:
    """Carry out a merge into ``output``, which appears whole or not at all; how many tensors earlier runs had finished.

    Raises MergeError: OutputError where it cannot be written, and then the next run goes on from what is there.
    """
    ranks = join()
    chosen: AbstractContextManager[Path] = nullcontext(working_folder(output))
    if ranks.rank == 0:
        chosen = place_folder(output, overwrite, resume=True, inputs=merge.inputs)
    with chosen as folder:
        if ranks.rank == 0:
            take_up(merge.identity(), merge.layout, output, folder)
        ranks.wait()
        try:
            resumed = merge.write(folder, ranks, progress)
        except MergeError as error:
            if not isinstance(error, OutputError):
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
