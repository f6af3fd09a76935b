"""The self-check: what compiled kernels have to do on a GPU, that no interpreter shows. Each check raises `Wrong`.

They need no oracle of their own speed: k is counted, bits are compared with bits.
"""

import logging
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from merge_engine.kernels.merge import merge_deltas
from merge_engine.kernels.source import Drop, Lora, Trim, pack
from merge_engine.kernels.trims import trims
from safetensors.torch import save_file
from torch import Tensor

import merge_engine
from bench.harness.disk import make_adapter
from bench.harness.inputs import SCALING, factors
from merge_engine.cpu.mask import keep_mask
from merge_engine.engine import triton_backend

RANK, MODULES, ADAPTERS, DENSITY = 16, 2, 3, 0.2
TIES: dict[str, Any] = {"elect": "total", "divisor": "count"}
LAYERS, MIB = 8, 1 << 20
Short = Callable[[torch.device, int], AbstractContextManager[None]]


class Wrong(AssertionError):
    """A kernel did not do what it has to do."""


class Skipped(Exception):
    """This machine has no such thing to check."""


@dataclass(frozen=True)
class Place:
    """Where kernels run, and on what: the shape of a module, and the dtype of factors."""

    device: torch.device
    shape: tuple[int, int] = (2048, 2816)
    dtype: torch.dtype = torch.bfloat16

    @property
    def kept(self) -> int:
        return int(DENSITY * self.shape[0] * self.shape[1])


def source_at(place: Place, device: torch.device | None = None) -> Lora:
    """Two modules of three random adapters; the same on every device."""
    generator = torch.Generator().manual_seed(3)
    made = [[factors(*place.shape, RANK, generator) for _ in range(ADAPTERS)] for _ in range(MODULES)]
    pairs = [[(A.to(place.dtype), B.to(place.dtype)) for A, B in row] for row in made]
    return pack(pairs, [[SCALING] * ADAPTERS] * MODULES, device=device or place.device)


def trim_of(source: Lora, kept: int) -> Trim:
    return trims(source, torch.full((1, MODULES, ADAPTERS), kept))


def merged_by_ties(source: Lora, kept: int) -> Tensor:
    return merge_deltas(source, [[1.0] * ADAPTERS], trim_of(source, kept), **TIES)


def merged_alone(source: Lora, adapter: int, keep: Trim | Drop | None = None) -> Tensor:
    """keep(t) of one adapter, in the launch of all: float32 [modules, M, N]."""
    return merge_deltas(source, [[float(each == adapter) for each in range(ADAPTERS)]], keep)[0]


def kept_is_k(place: Place) -> str:
    """What the merge keeps of each task tensor is counted: exactly k, which needs select and merge to agree."""
    source = source_at(place)
    found = trim_of(source, place.kept)
    for adapter in range(ADAPTERS):
        counts = (merged_alone(source, adapter, found) != 0).flatten(1).sum(1).tolist()
        if counts != [place.kept] * MODULES:
            raise Wrong(f"adapter {adapter}: wanted {place.kept} elements kept in each module, got {counts}")
    return f"{place.kept} of {place.shape[0] * place.shape[1]} elements in each of {MODULES * ADAPTERS} task tensors"


def repeats_are_equal(place: Place) -> str:
    """Three runs, search included, give the same bits."""
    source = source_at(place)
    first = merged_by_ties(source, place.kept)
    for number in (2, 3):
        _equal(merged_by_ties(source, place.kept), first, f"run {number} and run 1")
    return "3 runs"


def select_sees_what_merge_sees(place: Place) -> str:
    """The threshold that was found is, to the bit, the k-th largest magnitude of the task tensor that the merge writes.

    For one, a fifth, and nearly all elements.
    """
    source, numel = source_at(place), place.shape[0] * place.shape[1]
    numbers = (1, place.kept, numel - numel // 64)
    found = [trim_of(source, kept).value for kept in numbers]
    for adapter in range(ADAPTERS):
        ordered = merged_alone(source, adapter).abs().flatten(1).sort(1, descending=True).values.cpu()
        for kept, value in zip(numbers, found, strict=True):
            wanted, got = ordered[:, kept - 1], value[0, :, adapter].cpu()
            if not torch.equal(wanted, got):
                raise Wrong(
                    f"adapter {adapter}: wanted the magnitude number {kept} = {wanted.tolist()}, got {got.tolist()}"
                )
    return f"k = {', '.join(map(str, numbers))}"


def masks_are_those_of_the_host(place: Place) -> str:
    """A random drop on the device keeps what the mask that the host computes keeps."""
    source, (rows, columns) = source_at(place), place.shape
    density = torch.full((1, MODULES, ADAPTERS), 0.3, dtype=torch.float64)
    drop = Drop(density, [11], torch.arange(5, 5 + MODULES), torch.arange(ADAPTERS))
    for adapter in range(ADAPTERS):
        dropped, whole = merged_alone(source, adapter, drop).cpu(), merged_alone(source, adapter).cpu()
        for module in range(MODULES):
            where = {"seed": 11, "stream": 5 + module, "adapter": adapter}
            mask = keep_mask(0.3, rows=range(rows), columns=range(columns), **where)
            wanted = mask & (whole[module] != 0)
            if off := int(((dropped[module] != 0) != wanted).sum()):
                raise Wrong(f"module {module}, adapter {adapter}: {off} of {mask.numel()} elements are not as masked")
    return f"{MODULES * ADAPTERS} masks at density 0.3"


def a_stream_of_the_caller(place: Place) -> str:
    """What is launched on a stream of the caller's is the same."""
    if place.device.type != "cuda":
        raise Skipped("no streams on the CPU")
    source = source_at(place)
    want = merged_by_ties(source, place.kept)
    stream = torch.cuda.Stream(place.device)
    torch.cuda.synchronize(place.device)
    with torch.cuda.stream(stream):
        got = merged_by_ties(source, place.kept)
    stream.synchronize()
    _equal(got, want, "a stream of the caller's and the default one")
    return "one stream"


def two_devices(place: Place) -> str:
    """The last device gives the bits of the first, while the first is the current one."""
    last = torch.cuda.device_count() - 1
    if place.device.type != "cuda" or last < 1:
        raise Skipped("one device")
    first, other = torch.device("cuda", 0), torch.device("cuda", last)
    with torch.cuda.device(first):
        want, got = (merged_by_ties(source_at(place, device), place.kept).cpu() for device in (first, other))
    _equal(got, want, f"{other} and {first}")
    return f"{first} and {other}"


@contextmanager
def little_memory(device: torch.device, nbytes: int) -> Any:
    """For a while PyTorch may take so many bytes more of the device than it holds."""
    torch.cuda.empty_cache()
    index = device.index or 0
    allowed = torch.cuda.memory_reserved(index) + nbytes
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(index).total_memory, index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


def out_of_memory_halves(place: Place, short: Short = little_memory) -> str:
    """A merge into a base on a device that has no room for a whole group: the group is halved, the bytes are the same.

    short: (device, bytes): for a while the device has so many bytes left.
    """
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    log, level = triton_backend.logger, triton_backend.logger.level
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = _base_and_adapters(folder, place.shape)
        how = {"method": "ties", "density": DENSITY, "backend": "triton", "progress": False}
        merge_engine.merge_into(*inputs, folder / "wanted", **how)
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        try:
            # Base and result of all modules in bfloat16 do not fit, those of half of them do.
            with short(place.device, LAYERS * place.shape[0] * place.shape[1] * 5 // 2 + 2 * MIB):
                merge_engine.merge_into(*inputs, folder / "got", **how)
        finally:
            log.removeHandler(handler)
            log.setLevel(level)
        files = [folder / name / "model.safetensors" for name in ("wanted", "got")]
        same = files[0].read_bytes() == files[1].read_bytes()
    if not messages:
        raise Wrong(f"wanted a group of {LAYERS} modules halved, but it fitted")
    if not same:
        raise Wrong("the halved group gives other bytes")
    return "; ".join(messages)


def _base_and_adapters(folder: Path, shape: tuple[int, int]) -> tuple[Path, list[Path]]:
    """A base of LAYERS weights in bfloat16, and three adapters of all of them."""
    base, name = folder / "base", "self_attn.q_proj"
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{layer}.{name}.weight" for layer in range(LAYERS)]
    base.mkdir()
    save_file({name: torch.randn(shape, generator=generator).bfloat16() for name in names}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    adapters = [folder / f"{seed}" for seed in range(ADAPTERS)]
    for seed, adapter in enumerate(adapters):
        make_adapter(adapter, seed, LAYERS, {name: shape}, base)
    return base, adapters


def _equal(got: Tensor, want: Tensor, what: str) -> None:
    if not torch.equal(got, want):
        raise Wrong(f"{what} differ in {int((got != want).sum())} of {got.numel()} elements")


CHECKS: dict[str, Callable[[Place], str]] = {
    "what merge kept is k": kept_is_k,
    "repeated runs give equal bits": repeats_are_equal,
    "select and merge see the same bits": select_sees_what_merge_sees,
    "masks of host and device": masks_are_those_of_the_host,
    "a stream of the caller's": a_stream_of_the_caller,
    "two devices": two_devices,
    "out of memory halves": out_of_memory_halves,
}
