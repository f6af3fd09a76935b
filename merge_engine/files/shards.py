"""The weights of a full model as a few .safetensors files of known layout, written at any place and in any order.

All shapes are known before the first byte is written, so every tensor has its place from the start: rows of one tensor,
tensors of one shard and shards of one model can be written by different threads, processes and runs.
"""

import json
import os
import struct
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from xxhash import xxh3_128

from merge_engine.errors import writing
from merge_engine.files.dtypes import DTYPE_NAMES

SHARD_SIZE = 5_000_000_000
INDEX_FILE = "model.safetensors.index.json"
_flush = getattr(os, "fdatasync", os.fsync)  # not every system has the first
_BLOCK = 1 << 22  # bytes read at a time when a tensor is hashed
AHEAD = 64 << 20  # bytes of a file that are written before the disk gets them, while more are merged


@dataclass(frozen=True)
class Slot:
    """Where one tensor goes."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: str  # the file
    offset: int  # of its first byte in that file

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Piece:
    """A part of a tensor that is written by itself: entries `start` to `start + count` of its first dimension."""

    key: str
    start: int
    count: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """All shards of a model: slots by key, and by shard its header and its size in bytes.

    places: the shard of each tensor, as the index file has it. A slot may be a piece of a tensor.
    """

    slots: dict[str, Slot]
    headers: dict[str, bytes]
    sizes: dict[str, int]
    places: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of all shards, with their headers."""
        return sum(self.sizes.values())

    def index(self) -> str | None:
        """The text of the index file; None where one shard needs none."""
        if len(self.headers) == 1:
            return None
        weight_map = {key: self.places[key] for key in sorted(self.places)}
        total = sum(slot.nbytes for slot in self.slots.values())
        return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"

    def divided(self, pieces: Mapping[str, Sequence[Piece]]) -> "Layout":
        """The same files, with a slot for each piece of these tensors, by its own key. Pieces cover their tensor."""
        slots: dict[str, Slot] = {}
        for key, slot in self.slots.items():
            width = prod(slot.shape[1:]) * slot.dtype.itemsize
            for piece in pieces.get(key, ()):
                offset = slot.offset + piece.start * width
                slots[piece.key] = Slot(piece.key, slot.dtype, piece.shape, slot.shard, offset)
            if key not in pieces:
                slots[key] = slot
        return replace(self, slots=slots)


def lay_out(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], shard_size: int) -> Layout:
    """Shards of at most `shard_size` bytes of tensors, in the given order; a larger tensor gets a shard of its own.

    Files are named as transformers names them. Within a shard wider dtypes come first, so that every tensor is aligned.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for key, (dtype, shape) in tensors.items():
        nbytes = prod(shape) * dtype.itemsize
        if shards[-1] and filled + nbytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += nbytes
    slots, headers, sizes = {}, {}, {}
    for number, keys in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        keys = sorted(keys, key=lambda key: -tensors[key][0].itemsize)
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key in keys:
            dtype, shape = tensors[key]
            start, end = end, end + prod(shape) * dtype.itemsize
            entries[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text = text.ljust(-(-len(text) // 8) * 8)  # readers map the data in place: it must start on a multiple of 8
        headers[name] = struct.pack("<Q", len(text)) + text
        sizes[name] = len(headers[name]) + end
        position = len(headers[name])
        for key in keys:
            dtype, shape = tensors[key]
            slots[key] = Slot(key, dtype, shape, name, position)
            position += slots[key].nbytes
    ordered = {key: slots[key] for key in tensors}
    return Layout(ordered, headers, sizes, {key: slot.shard for key, slot in ordered.items()})


class ShardFiles:
    """The shards of a layout in a folder, open for writing; safe from several threads and processes.

    After every 64 MiB of a shard a thread sends them to the disk, so that the last sync has little to wait for.
    Raises OutputError where the disk is full or a file cannot be written.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.layout = folder, layout
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="merge_engine_disk")  # no thread before it is used
        self._unsent: Counter[str] = Counter()
        self._sent: Future[None] | None = None

    def create(self) -> None:
        """Create every file that is missing or does not fit the layout, at its full size and with its header."""
        for name, header in self.layout.headers.items():
            if not self.is_started(name):
                with writing(self.folder / name):
                    descriptor = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
                    os.close(descriptor)
                    os.truncate(self.folder / name, self.layout.sizes[name])
                self._write(name, 0, header)

    def is_started(self, name: str) -> bool:
        """Whether a shard exists, of the right size and with the right header."""
        try:
            with open(self.folder / name, "rb") as file:
                header = self.layout.headers[name]
                return os.fstat(file.fileno()).st_size == self.layout.sizes[name] and file.read(len(header)) == header
        except OSError:
            return False

    def on_disk(self) -> int:
        """Bytes of disk that the files take up now."""
        found = [self.folder / name for name in self.layout.headers]
        return sum(path.stat().st_blocks * 512 for path in found if path.exists())

    def write(self, slot: Slot, start: int, data: memoryview) -> None:
        """Write bytes at position `start` of a tensor."""
        self._write(slot.shard, slot.offset + start, data)

    def digest(self, slot: Slot) -> str:
        """The hash of a tensor's bytes, XXH3 of 128 bits, as they are on the disk now."""
        digest = xxh3_128()
        descriptor = self._descriptor(slot.shard)
        with writing(self.folder / slot.shard):
            for start in range(0, slot.nbytes, _BLOCK):
                digest.update(os.pread(descriptor, min(_BLOCK, slot.nbytes - start), slot.offset + start))
        return digest.hexdigest()

    def close(self) -> None:
        """Close the files. The last sync to the disk is left to whoever places the folder."""
        try:
            if self._sent is not None:
                self._sent.result()
        finally:
            self._sender.shutdown()
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()

    def _write(self, name: str, offset: int, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        descriptor = self._descriptor(name)
        with writing(self.folder / name):
            while rest.nbytes:
                count = os.pwrite(descriptor, rest, offset)
                rest, offset = rest[count:], offset + count
        self._send(name, memoryview(data).nbytes, descriptor)

    def _send(self, name: str, count: int, descriptor: int) -> None:
        """So many bytes more were written: send what waits to the disk, if that is enough and it is not busy."""
        with self._lock:
            self._unsent[name] += count
            if self._unsent[name] < AHEAD or not (self._sent is None or self._sent.done()):
                return
            if self._sent is not None:
                self._sent.result()  # its error
            self._unsent[name] = 0
            self._sent = self._sender.submit(self._flush, name, descriptor)

    def _flush(self, name: str, descriptor: int) -> None:
        with writing(self.folder / name):
            _flush(descriptor)

    def _descriptor(self, name: str) -> int:
        with self._lock:
            if name not in self._open:
                with writing(self.folder / name):
                    self._open[name] = os.open(self.folder / name, os.O_RDWR)
            return self._open[name]
