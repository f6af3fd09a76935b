"""Tensors in weight files, by name: opening reads headers only, and each tensor is read when it is asked for."""

import json
import math
import mmap
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from merge_engine.errors import AdapterError, shown, some
from merge_engine.files.dtypes import DTYPE_NAMES, STORED_DTYPES
from merge_engine.files.text import TwiceError, unique_keys
from merge_engine.runtime.memory import new_tensor

_MAX_HEADER = 100_000_000  # the format's own limit
_DIMENSIONS = 64  # as many as NumPy and torch's operators take
_ELEMENTS = 2**60  # of sizes and their products, without those that are 0
_MAPPED = 1 << 16  # bytes of a tensor from which on mapping it takes less time than reading it


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, which any thread can read."""

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int = 0  # of its first byte, in a .safetensors file
    mapped: torch.Tensor | None = field(default=None, repr=False, compare=False)  # in a .bin file, mapped or loaded

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """A new contiguous tensor of the stored dtype.

        Raises:
            AdapterError: the file is gone or became shorter since it was opened.
        """
        if self.mapped is not None:
            return self.mapped.detach().clone(memory_format=torch.contiguous_format)
        tensor = new_tensor(self.shape, self.dtype)
        with self._opened() as file:
            self._fill(file, tensor)
        return tensor

    def view(self) -> torch.Tensor:
        """The contiguous tensor without a copy, where it lies in a .safetensors file: its pages are mapped.

        They count as memory of this process until the tensor is gone. What is written to it stays in memory. Raises as
        `read` does; a file that becomes shorter later on ends the process.
        """
        if self.mapped is not None or self.nbytes < _MAPPED or self.offset % self.dtype.itemsize:
            return self.read()
        start = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY
        length = self.offset + self.nbytes - start
        with self._opened() as file:
            if missing := max(0, start + length - os.fstat(file.fileno()).st_size):
                raise self._short(missing)
            memory = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=start)
        if hasattr(memory, "madvise"):
            memory.madvise(mmap.MADV_WILLNEED)  # read ahead, all of it
        data = torch.from_numpy(np.frombuffer(memory, np.uint8, self.nbytes, self.offset - start))
        return data.view(self.dtype).view(self.shape)

    def rows(self, start: int, count: int) -> "StoredTensor":
        """The tensor of so many entries of the first dimension, from one on; nothing is read."""
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        mapped = None if self.mapped is None else self.mapped[start : start + count]
        return replace(self, shape=(count, *self.shape[1:]), offset=self.offset + start * size, mapped=mapped)

    def pieces(self, elements: int = 1 << 20) -> Iterator[torch.Tensor]:
        """The tensor as flat pieces of at most ``elements`` elements. A piece may overwrite the one before.

        Raises as `read` does.
        """
        size = math.prod(self.shape)
        if self.mapped is not None:
            yield from self.mapped.detach().reshape(-1).split(elements) if size else ()
            return
        buffer = torch.empty(min(elements, size), dtype=self.dtype)
        with self._opened() as file:
            for start in range(0, size, elements):
                piece = buffer[: size - start]
                self._fill(file, piece)
                yield piece

    @contextmanager
    def _opened(self) -> Iterator[FileIO]:
        """The file, at the tensor's first byte. It is read, not mapped: mapped pages count as this process's memory."""
        try:
            with FileIO(self.file) as file:
                file.seek(self.offset)
                yield file
        except OSError as error:
            raise AdapterError(f"{self.file} cannot be read: {error.strerror or error}") from error

    def _fill(self, file: FileIO, tensor: torch.Tensor) -> None:
        rest = tensor.reshape(-1).view(torch.uint8).numpy().data
        while rest.nbytes:
            count = file.readinto(rest)
            if not count:
                raise self._short(rest.nbytes)
            rest = rest[count:]

    def _short(self, missing: int) -> AdapterError:
        return AdapterError(f"{self.file} ends inside tensor {self.key}, {some(missing, 'byte')} short")

    def same_as(self, other: "StoredTensor") -> bool:
        """Whether two tensors have the same shape, dtype and bits; raises as `read` does."""
        return (self.shape, self.dtype) == (other.shape, other.dtype) and all(
            torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8))
            for one, two in zip(self.pieces(), other.pieces(), strict=True)
        )


@dataclass(frozen=True)
class DerivedTensor:
    """A tensor that is made from a stored one when it is read; it goes by that one's key, file and size."""

    stored: StoredTensor

    @property
    def key(self) -> str:
        return self.stored.key

    @property
    def file(self) -> Path:
        return self.stored.file

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes


def open_safetensors(path: Path, subject: str) -> dict[str, StoredTensor]:
    """The tensors of a .safetensors file, from its header.

    Args:
        path: the file.
        subject: what to call its owner in messages.

    Raises:
        AdapterError: the file is truncated or damaged, or holds a dtype that torch does not have.
    """
    header, size = _read_header(path, subject)
    length = len(header)
    try:
        entries: dict[str, Any] = json.loads(header.decode(), object_pairs_hook=unique_keys)
        entries.pop("__metadata__", None)
        tensors = {}
        spans = []
        for key, entry in entries.items():
            dtype = STORED_DTYPES.get(entry["dtype"])
            if dtype is None:
                raise AdapterError(f"{subject}: tensor {key} is {entry['dtype']}, which cannot be read")
            start, end = entry["data_offsets"]
            if not all(type(number) is int and number >= 0 for number in (start, end, *entry["shape"])):
                raise ValueError("shapes and offsets are whole numbers")
            if not key.encode() or not _is_possible(entry["shape"]):
                raise AdapterError(
                    f"{subject}: tensor {key!r} is {shown(entry['shape'])}, wanted a name, and a shape that torch has"
                )
            tensor = StoredTensor(key, path, tuple(entry["shape"]), dtype, 8 + length + start)
            if tensor.nbytes != end - start:
                raise AdapterError(
                    f"{subject}: tensor {key} has {end - start} bytes, wanted {tensor.nbytes} for {list(tensor.shape)}"
                )
            tensors[key] = tensor
            spans.append((start, end))
    except TwiceError as error:
        raise AdapterError(f"{subject}: the header of {path.name} is damaged: it names {error} twice") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{subject}: the header of {path.name} is damaged ({type(error).__name__})") from error
    expected = 0
    for start, end in sorted(spans):
        if start != expected:
            raise AdapterError(f"{subject}: the header of {path.name} is damaged: tensors overlap or leave holes")
        expected = end
    if size != 8 + length + expected:
        state = "truncated" if size < 8 + length + expected else "damaged"
        raise AdapterError(
            f"{subject}: {path.name} is {state}: {size} bytes, wanted {8 + length + expected} from its header"
        )
    return tensors


def _is_possible(shape: Sequence[int]) -> bool:
    """Whether torch can have a tensor of a shape, which may have no elements."""
    return len(shape) <= _DIMENSIONS and math.prod(size for size in shape if size) < _ELEMENTS


def safetensors_metadata(path: Path, subject: str) -> dict[str, str]:
    """The ``__metadata__`` of a .safetensors file; empty where it has none.

    Raises AdapterError where the header is damaged, or holds metadata other than text.
    """
    try:
        metadata = json.loads(_read_header(path, subject)[0].decode()).get("__metadata__") or {}
    except (ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{subject}: the header of {path.name} is damaged ({type(error).__name__})") from error
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterError(f"{subject}: the header of {path.name} has __metadata__ other than text")
    return metadata


def _read_header(path: Path, subject: str) -> tuple[bytes, int]:
    """(the header of a .safetensors file, the size of the file)."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            header = file.read(length) if length <= min(size - 8, _MAX_HEADER) else b""
    except OSError as error:
        raise AdapterError(f"{subject}: {path.name} cannot be read: {error.strerror or error}") from error
    if not header:
        raise AdapterError(f"{subject}: {path.name} is truncated or damaged: {size} bytes, shorter than its header")
    return header, size


def open_sharded(
    index: Path, subject: str, opener: Callable[[Path, str], dict[str, StoredTensor]] = open_safetensors
) -> dict[str, StoredTensor]:
    """The tensors of the files that an index file names; `opener` reads one of them.

    Raises:
        AdapterError: the index is damaged, names a file outside of its folder, or disagrees with its files.
    """
    try:
        weight_map = json.loads(index.read_bytes(), object_pairs_hook=unique_keys)["weight_map"]
        shards = sorted(set(weight_map.values()))
    except TwiceError as error:
        raise AdapterError(f"{subject}: {index.name} is damaged: it names {error} twice") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(f"{subject}: {index.name} is damaged: wanted a weight_map of tensors to files") from error
    for shard in shards:
        # Only the name is checked: in the hub's cache files are links to another folder.
        if not isinstance(shard, str) or shard in ("", ".", "..") or "/" in shard or "\\" in shard:
            raise AdapterError(f"{subject}: {index.name} names {shard!r}, wanted a file in the same folder")
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        if not (index.parent / shard).is_file():
            raise AdapterError(f"{subject}: {shard} is missing, wanted by {index.name}")
        stored = opener(index.parent / shard, subject)
        wanted = {key for key, file in weight_map.items() if file == shard}
        for key in sorted(wanted ^ stored.keys()):
            if key in wanted:
                raise AdapterError(f"{subject}: {shard} lacks tensor {key}, which {index.name} lists")
            raise AdapterError(f"{subject}: {shard} holds tensor {key}, which {index.name} does not list")
        tensors.update(stored)
    return tensors


def open_bin(path: Path, subject: str) -> dict[str, StoredTensor]:
    """The tensors of a file made by ``torch.save``, mapped into memory where its format allows that.

    Raises:
        AdapterError: the file is damaged, or holds anything but named tensors.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises five unrelated types for a damaged file
        raise AdapterError(
            f"{subject}: {path.name} is damaged or holds more than tensors, wanted a file for "
            "torch.load(weights_only=True)"
        ) from error
    if not isinstance(loaded, dict):
        raise AdapterError(f"{subject}: {path.name} holds a {type(loaded).__name__}, wanted named tensors")
    tensors = {}
    for key, tensor in loaded.items():
        what = _what_is_not_dense(tensor)
        if not isinstance(key, str) or what is not None:
            raise AdapterError(
                f"{subject}: {shown(key, quoted=False)} in {path.name} is {what or 'no name'}, wanted a dense tensor"
            )
        tensor = tensor.resolve_conj().resolve_neg()
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise AdapterError(
                f"{subject}: {key} in {path.name} is {list(tensor.shape)}, more than the file has bytes for"
            )
        tensors[key] = StoredTensor(key, path, tuple(tensor.shape), tensor.dtype, mapped=tensor)
    return tensors


def _what_is_not_dense(tensor: Any) -> str | None:
    """What an entry of a .bin file is, where it is no tensor with its values in memory, of a dtype that files have."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.is_meta:
        return "a meta tensor, which has no values"
    if tensor.is_quantized or tensor.is_nested or tensor.layout != torch.strided:
        return "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else "sparse"
    if tensor.dtype not in DTYPE_NAMES:
        return str(tensor.dtype)
    return None if _is_possible(tensor.shape) else f"of shape {shown(list(tensor.shape))}"
