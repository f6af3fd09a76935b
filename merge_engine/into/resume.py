"""What makes an interrupted merge go on: the identity of a merge, and what earlier runs of it have finished."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from merge_engine.engine.backend import Backend
from merge_engine.files.folder import check_space, wipe
from merge_engine.files.journal import Journal, check_same, read_journal
from merge_engine.files.shards import ShardFiles
from merge_engine.formats.adapter import Adapter
from merge_engine.into.job import IntoJob
from merge_engine.models.finetuned import Finetuned
from merge_engine.version import __version__

logger = logging.getLogger(__name__)
_HEAD = 1 << 20  # bytes of a file that say what it is


def take_up(job: IntoJob, output: Path, folder: Path, backend: Backend) -> None:
    """Make the working folder ready: as an earlier run of the same merge left it, or new. Checks the disk's space."""
    identity = _identity(job, backend)
    found, _ = read_journal(folder)
    if found is None:
        wipe(folder)
    else:
        check_same(found, identity, output, folder)
    files = ShardFiles(folder, job.layout)
    try:
        check_space(output, job.layout.nbytes - files.on_disk())
        if found is None:
            with Journal(folder) as journal:
                journal.begin(identity)
        files.create()
    finally:
        files.close()


def finished_keys(job: IntoJob, files: ShardFiles, folder: Path) -> set[str]:
    """The tensors that the journal says are finished, and that are on the disk as it says."""
    done = set()
    for key, digest in read_journal(folder)[1].items():
        slot = job.layout.slots.get(key)
        if slot is not None and files.digest(slot) == digest:
            done.add(key)
        else:
            logger.warning("%s: %s is damaged, it is made again", folder, key)
    return done


def _identity(job: IntoJob, backend: Backend) -> dict[str, Any]:
    """What decides every byte of the output: recipe, layout, inputs (by size, time of change and header), versions."""
    return {
        "recipe": {**job.plan.recipe.as_dict(), "weights": list(job.plan.weights)},
        "shard_size": job.shard_size,
        "vocab": "base" if job.union is None else f"union of {len(job.union.tokens)} tokens {job.union.digest[:16]}",
        "backend": backend.identity,
        "base": _files(job.base.path, job.base.files),
        "inputs": [_files_of(source) for source in job.plan.adapters],
        "versions": {"merge-engine": __version__, "torch": str(torch.__version__)},
    }


def _files_of(source: Adapter | Finetuned) -> dict[str, Any]:
    if isinstance(source, Finetuned):
        if source.adapter is None:
            return _files(source.model.path, source.model.files)
        source = source.adapter
    return _files(source.path, [file for file in sorted(source.path.iterdir()) if file.name.startswith("adapter_")])


def _files(folder: Path, files: Sequence[Path]) -> dict[str, Any]:
    """{file: size, time of change, and the hash of its first bytes, a header} of what an input is read from."""
    found: dict[str, Any] = {"folder": str(folder.resolve())}
    for file in files:
        stat = file.stat()
        with open(file, "rb") as opened:
            head = hashlib.sha256(opened.read(_HEAD)).hexdigest()
        found[file.name] = f"{stat.st_size} bytes, {stat.st_mtime_ns}, {head[:16]}"
    return found
