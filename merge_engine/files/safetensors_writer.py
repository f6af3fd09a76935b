"""Writes a .safetensors file tensor by tensor, in bounded memory; a shape is known only when its tensor comes.

The format puts a header with every shape and offset before the data. Ranks are known only when a module is merged, so
room for the header is reserved by the names alone. The data follows in the order in which it comes. The header is
written last; spaces fill the rest of its room, which the format allows.
"""

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

import torch

from merge_engine.errors import OutputError, writing
from merge_engine.files.dtypes import DTYPE_NAMES

# A header entry without its name: `:{"dtype":"F8_E4M3","shape":[...],"data_offsets":[...]},` is 54 characters, the
# offsets take up to 20 digits each, and eight dimensions up to 12 with their commas.
_ENTRY_ROOM = 54 + 2 * 20 + 8 * 12


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, in row-major order; no copy where it is contiguous on the CPU already."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class SafetensorsWriter:
    """One .safetensors file, written with ``add`` in any order and completed by ``close``.

    As a context manager it closes the file when all went well. On an exception it leaves an unfinished file, which no
    reader accepts: whoever owns the folder deletes it.

    Args:
        path: the file to create; an existing one is replaced.
        names: the name of every tensor that will be added.
        metadata: the header's ``__metadata__``.

    Raises:
        OutputError: the disk is full, or the file cannot be written.
        ValueError: a name that was not planned, comes twice or never comes; a dtype that safetensors does not have.
    """

    def __init__(self, path: Path, names: Iterable[str], metadata: Mapping[str, str] | None = None) -> None:
        self.path = Path(path)
        self._waiting = set(names)
        self._header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
        room = len(_json(self._header)) + sum(len(_json(name)) + _ENTRY_ROOM for name in self._waiting)
        self._room = -(-room // 8) * 8  # readers map the data in place: it must start on a multiple of 8
        self._end = 0
        with writing(self.path):
            # Unbuffered: tensors are large, and a full disk is noticed in `add`, not when the file is closed.
            self._file = open(self.path, "wb", buffering=0)
        # Until `close` the file claims a header of impossible size, so that no reader takes it for whole.
        self._write(0, b"\xff" * 8)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor, as it is."""
        if name not in self._waiting:
            raise ValueError(
                f"{self.path.name}: tensor {name} was {'added twice' if name in self._header else 'not planned'}"
            )
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{self.path.name}: tensor {name} is {tensor.dtype}, which safetensors does not have")
        data = tensor_bytes(tensor)
        self._write(8 + self._room + self._end, data)
        self._header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._end, self._end + data.nbytes],
        }
        self._end += data.nbytes
        self._waiting.remove(name)

    def close(self, metadata: Mapping[str, str] | None = None) -> None:
        """Write the header. Syncing to the disk is left to whoever places the folder.

        metadata: in place of that given at the start, and no longer.
        """
        if metadata is not None:
            self._header["__metadata__"] = dict(metadata)
        if self._waiting:
            missing = ", ".join(sorted(self._waiting)[:3])
            raise ValueError(f"{self.path.name}: {len(self._waiting)} planned tensors never came: {missing}")
        header = _json(self._header)
        if len(header) > self._room:
            raise ValueError(f"{self.path.name}: header is {len(header)} bytes, room is {self._room}")
        self._write(0, struct.pack("<Q", self._room) + header.ljust(self._room))
        with writing(self.path):
            self._file.close()

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the file unfinished."""
        self._file.close()

    def _write(self, offset: int, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        try:
            with writing(self.path):
                self._file.seek(offset)
                while rest.nbytes:
                    rest = rest[self._file.write(rest) :]
        except OutputError:
            self.abandon()
            raise


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
