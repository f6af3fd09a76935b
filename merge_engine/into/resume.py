"""How an interrupted merge goes on: the identity of a merge, and which tensors earlier runs of it have finished."""

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch

from merge_engine.engine.backend import Backend
from merge_engine.errors import OutputError
from merge_engine.files.folder import check_space, wipe
from merge_engine.files.journal import Journal, check_same, journals, read_journal
from merge_engine.files.shards import Layout, ShardFiles
from merge_engine.formats.adapter import Adapter
from merge_engine.into.job import IntoJob
from merge_engine.models.finetuned import Finetuned
from merge_engine.version import __version__

logger = logging.getLogger(__name__)
VERSIONS = {"merge-engine": __version__, "torch": str(torch.__version__)}
_HEAD = 1 << 20  # bytes at the start of a file, with its header, that are hashed


def take_up(identity: Mapping[str, Any], layout: Layout, output: Path, folder: Path) -> None:
    """Prepare the working folder: as an earlier run of the same merge left it, or a new one. Checks the free space."""
    found, _ = read_journal(folder)
    if found is None:
        wipe(folder)
    else:
        check_same(found, identity, output, folder)
    files = ShardFiles(folder, layout)
    try:
        check_space(output, layout.nbytes - files.on_disk())
        if found is None:
            with Journal(folder) as journal:
                journal.begin(identity)
        files.create()
    finally:
        files.close()


def check_files(layout: Layout, companions: Set[str], output: Path, folder: Path) -> None:
    """Raise OutputError for a file in the working folder that no run of the merge makes: it would get into the output.

    companions: the names of the files beside the weights, with folders before a slash.
    """
    beside = {name.partition("/")[0] for name in companions}
    foreign = set(os.listdir(folder)) - {*layout.headers, *beside, *(file.name for file in journals(folder))}
    if foreign:
        raise OutputError(f"{output}: {folder / min(foreign)} is not of this merge; move or remove it")


def finished_keys(layout: Layout, files: ShardFiles, folder: Path) -> set[str]:
    """The tensors that are finished by the journal, and whose bytes on the disk have the journal's hash."""
    done = set()
    for key, digest in read_journal(folder)[1].items():
        slot = layout.slots.get(key)
        if slot is not None and files.digest(slot) == digest:
            done.add(key)
        else:
            logger.warning("%s: %s is damaged and will be written again", folder, key)
    return done


def identity(job: IntoJob, backend: Backend) -> dict[str, Any]:
    """Everything that decides the bytes of the output: recipe, layout, inputs and versions.

    Inputs count by size, time of change and the hash of their header, since hashing all of them would take too long.
    """
    return {
        "recipe": {**job.plan.recipe.as_dict(), "weights": list(job.plan.weights)},
        "shard_size": job.shard_size,
        "vocab": "base" if job.union is None else f"union of {len(job.union.tokens)} tokens {job.union.digest[:16]}",
        "backend": backend.identity,
        "base": files_in(job.base.path, job.base.files),
        "inputs": [_files_of(source) for source in job.plan.adapters],
        "versions": VERSIONS,
    }


def _files_of(source: Adapter | Finetuned) -> dict[str, Any]:
    if isinstance(source, Finetuned):
        if source.adapter is None:
            return files_in(source.model.path, source.model.files)
        source = source.adapter
    return files_in(source.path, [file for file in sorted(source.path.glob("adapter_*")) if file.is_file()])


def files_in(folder: Path, files: Sequence[Path]) -> dict[str, Any]:
    """{file: its size, time of change, and the hash of its first bytes, which hold the header}, and the folder."""
    found: dict[str, Any] = {"folder": str(folder.resolve())}
    for file in files:
        stat = file.stat()
        with open(file, "rb") as opened:
            head = hashlib.sha256(opened.read(_HEAD)).hexdigest()
        found[file.name] = f"{stat.st_size} bytes, {stat.st_mtime_ns}, {head[:16]}"
    return found
