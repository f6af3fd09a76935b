"""Carries out a merge of whole tensors: read ahead, merged one by one, rounded once, written behind."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merge_engine.errors import writing
from merge_engine.files.folder import check_target
from merge_engine.files.journal import Journal
from merge_engine.files.shards import INDEX_FILE, Layout, ShardFiles
from merge_engine.formats.checkpoint import FLOATS
from merge_engine.formats.licence import CARD
from merge_engine.into.merge import MergedModel
from merge_engine.into.place import place
from merge_engine.into.resume import finished_keys
from merge_engine.into.whole_companions import write_files
from merge_engine.into.whole_job import TensorWork, WholeJob
from merge_engine.into.write_pieces import write_pieces
from merge_engine.runtime.memory import new_tensor
from merge_engine.runtime.processes import Ranks
from merge_engine.runtime.progress import Bar
from merge_engine.runtime.threads import ahead
from merge_engine.whole_tensors.group import Group
from merge_engine.whole_tensors.table import merge_group

SMALL = 1 << 23  # elements of all models together: up to so many, a tensor is merged by one thread
MOST_SMALL = 8  # of these that are merged at a time
ROOM = 64 << 20  # bytes of merged tensors that wait to be written, beside the first: behind a large one are small ones


def run_whole(
    job: WholeJob, output: Path, *, overwrite: bool = False, dry_run: bool = False, progress: bool | None = None
) -> MergedModel:
    """Carry out a job; result and errors as of `into.merge.merge_into`."""
    start = time.perf_counter()
    copied = sum(len(work.keys) for work in job.works if work.is_copy)
    merged = len(job.layout.slots) - copied
    sizes = job.layout.sizes
    result = MergedModel(None, len(job.sources), None, job.layout.nbytes, merged, copied, 0, 0.0, sizes)
    if dry_run:
        with writing(output):
            check_target(output, overwrite, job.inputs)
        return replace(result, seconds=estimate(job))
    resumed = place(_Whole(job), output, overwrite=overwrite, progress=progress)
    return replace(result, path=output, resumed=resumed, seconds=time.perf_counter() - start)


@dataclass(frozen=True)
class _Whole:
    """A job as `into.place` carries it out."""

    job: WholeJob

    @property
    def layout(self) -> Layout:
        return self.job.layout

    @property
    def inputs(self) -> list[Path]:
        return self.job.inputs

    def identity(self) -> dict[str, Any]:
        return self.job.identity()

    @property
    def companions(self) -> set[str]:
        return {*self.job.companions, INDEX_FILE, CARD}

    def write(self, folder: Path, ranks: Ranks, progress: bool | None) -> int:
        return write_works(self.job, folder, ranks, progress)

    def finish(self, folder: Path) -> None:
        write_files(self.job, folder)


class Load(NamedTuple):
    """What was read for a tensor: its parts, the base first where there is one; none of what is copied."""

    work: TensorWork
    tensors: Sequence[Tensor]


class Item(NamedTuple):
    """A tensor on its way to the disk; merged: None where it is copied."""

    work: TensorWork
    merged: Tensor | None

    def size(self) -> int:
        """The bytes that it holds in memory."""
        return 0 if self.merged is None else self.merged.nbytes


def write_works(job: WholeJob, folder: Path, ranks: Ranks, progress: bool | None) -> int:
    """Write this rank's tensors that no earlier run has finished.

    Returns how many tensors of the whole model earlier runs had finished.
    """
    files = ShardFiles(folder, job.layout)
    try:
        with Journal(folder, ranks.rank) as journal:
            done = finished_keys(job.layout, files, folder)
            ranks.wait()  # no rank may add to the journal before every rank has read it
            mine = [job.works[i] for i in ranks.share([job.cost(work) for work in job.works])]
            work = sum(map(job.cost, mine))
            with Bar(work, len(mine), progress if ranks.rank == 0 else False, "tensors") as bar:
                items = merged_items(job, [work for work in mine if not done.issuperset(work.keys)])
                written = ahead(lambda item: _write(job, files, journal, item), items, size=Item.size, room=ROOM)
                for cost in written:
                    bar.finished(cost)
                bar.reach(work, len(mine))  # with what an earlier run has finished
    finally:
        files.close()
    return len(done)


def merged_items(job: WholeJob, works: Sequence[TensorWork]) -> Iterator[Item]:
    """The works, merged in their order; those after are read meanwhile.

    Of small tensors each is merged by one thread, with others beside it: threads that shared one would wait for each
    other after every sweep over its few blocks. All threads together merge a large one.
    """
    for is_small, alike in groupby(works, lambda work: job.elements(work) <= SMALL):
        if is_small:
            workers = min(torch.get_num_threads(), MOST_SMALL)
            yield from ahead(lambda work: _merge(job, _load(job, work)), alike, workers)
        else:
            yield from (_merge(job, load) for load in ahead(lambda work: _load(job, work), alike))


def _load(job: WholeJob, work: TensorWork) -> Load:
    if not _needs_merge(job, work):
        return Load(work, [])
    tensors = [job.sources[number].read(key) for number, key in work.all]
    if job.rows is not None and work.keys[0] in job.aligned:
        base = None if work.base is None else work.base[0]
        tensors = job.rows.align([number for number, _ in work.all], base, tensors)
    return Load(work, tensors)


def _needs_merge(job: WholeJob, work: TensorWork) -> bool:
    """Whether there is anything to be computed: not where one tensor is copied, nor where it is no floats."""
    number, key = work.all[0]
    if job.sources[number].stored(key).dtype not in FLOATS:
        return False
    return not work.is_copy or work.keys[0] in job.aligned or job.sources[number].is_changed(key)


def _merge(job: WholeJob, load: Load) -> Item:
    work, tensors = load
    if not tensors:
        return Item(work, None)
    slot = job.layout.slots[work.keys[0]]
    out = new_tensor(slot.shape, slot.dtype)
    base, parts = (None, tensors) if work.base is None else (tensors[0], tensors[1:])
    group = Group(work.keys[0], parts, base, out, dict(work.options), job.seed, job.published)
    merge_group(work.method, group)
    return Item(work, out)


def _write(job: WholeJob, files: ShardFiles, journal: Journal, item: Item) -> int:
    """Write a tensor to its places, and to the journal that it is finished. Returns its cost."""
    for key in item.work.keys:
        number, own = item.work.all[0]
        pieces = [item.merged] if item.merged is not None else job.sources[number].stored(own).pieces()
        write_pieces(files, journal, job.layout.slots[key], pieces, merged=item.merged is not None)
    return job.cost(item.work)


def estimate(job: WholeJob) -> float:
    """Seconds that the job would take: measured on its tensor of median cost, plus writing at 1 GB/s."""
    seconds = job.layout.nbytes / 1e9
    works = sorted((work for work in job.works if _needs_merge(job, work)), key=job.cost)
    if works:
        sample = works[len(works) // 2]
        for _ in range(2):  # the first time includes loading compiled code
            start = time.perf_counter()
            for _ in merged_items(job, [sample]):
                torch.get_num_threads()
        seconds += (time.perf_counter() - start) * sum(map(job.cost, works)) / job.cost(sample)
    return seconds
