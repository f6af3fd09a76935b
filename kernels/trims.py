"""Launches the search of `search` and `finish`: exactly k of each task tensor stay."""

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from .finish import _finish_kernel
from .launch import SMALL, Launch, arch_of, finish_launch, search_launch
from .search import (
    BINS,
    LOWEST,
    STATE,
    _bracket_kernel,
    _collect_kernel,
    _count_kernel,
    _narrow_kernel,
    _sample_kernel,
)
from .source import Band, Source, Trim, check_tensor, launch_of, on_device, task_arguments, tiles_of

CHUNK = 2048  # of a sample, that a program looks at at a time
TILES_A_PROGRAM = 16  # a program adds its counts to memory once for so many tiles

_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
KEEPS_LAYOUT = _VERSION < (3, 9)  # `can_reorder` is deprecated from there on


def in_shared(dtype: torch.dtype) -> bool:
    """Whether a sweep counts by `tl.histogram`: from Triton 3.8 on it is made of atomics in shared memory.

    Before, it is made of ballots, and takes 230 instructions an element. With float32 factors registers do not suffice.
    """
    return _VERSION >= (3, 8) and dtype != torch.float32


def list_length(numel: int) -> int:
    """How many elements of one bin are listed: about twice to ten times what is expected of a bin of a bracket."""
    return min(max(1024, 1 << max(numel >> 12, 1).bit_length() - 1), 16384)


def search_bytes(numel: int) -> int:
    """Bytes that the search for one threshold among so many elements takes: state, counts, lists, and the sample."""
    return 8 * STATE.value + 4 * BINS.value + 12 + 8 * list_length(numel) + 2 * min(numel, 1 << 17)


def sample_of(source: Source, launch: Launch) -> tuple[int, int]:
    """(tiles, every which of their elements) of a sample: about 64 thousand elements, or all of a small tensor."""
    _, _, rows, columns = source.shape
    longer = max(-(-rows // launch.block_m), -(-columns // launch.block_n))
    tiles = min(tiles_of(source, launch), max(longer, (64 * 64 * 64) // (launch.block_m * launch.block_n)), 512)
    every = 1
    while tiles * launch.block_m * launch.block_n // every > 1 << 16 and every < 16:
        every *= 2
    return tiles, every


def trims(
    source: Source,
    kept: Tensor,
    *,
    ties: str = "exact",
    precision: str = "ieee",
    launch: Launch | None = None,
) -> Trim:
    """What keeps the `kept` largest magnitudes of each task tensor: `Trim`, [recipes, modules, adapters].

    kept: int64 [recipes, modules, adapters], 0 <= kept <= M * N, on any device. ties: "exact" keeps exactly that many,
    equal magnitudes by lowest flat index; "keep" all that equal the last. precision and launch must be those of the
    merge, which has to see the same bits. Nothing waits for the device. Raises ValueError for what does not fit.
    """
    modules, adapters, rows, columns = source.shape
    recipes, device = len(kept), source.x.device
    check_tensor("kept", kept, (recipes, modules, adapters), kept.device, (torch.int64,), contiguous=False)
    if ties not in ("exact", "keep"):
        raise ValueError(f"ties is {ties!r}, wanted 'exact' or 'keep'")
    launch = launch or launch_of(source, recipes=recipes)
    shape = (recipes, modules, adapters)
    slots = recipes * modules * adapters
    fields = torch.empty(3, *shape, dtype=torch.int32, device=device)
    value, row, column = fields.unbind()
    if slots and rows * columns == 0:
        fields.zero_()  # of nothing, nothing stays
    elif slots:
        with torch.cuda.device_of(fields):
            _search(
                source, on_device(kept, device).contiguous(), (value, row, column), ties == "exact", precision, launch
            )
    return Trim(value.view(torch.float32), row, column)


def _search(
    source: Source, kept: Tensor, found: tuple[Tensor, Tensor, Tensor], exact: bool, precision: str, launch: Launch
) -> None:
    """found = (value, row, column), all int32 [recipes, modules, adapters]: the value's bits."""
    _, _, rows, columns = source.shape
    slots, tensors, numel, device = kept.numel(), kept[0].numel(), rows * columns, kept.device
    tiles, every = sample_of(source, launch)
    area, longest = launch.block_m * launch.block_n, list_length(numel)
    runs = slots * -(-tiles_of(source, launch) // TILES_A_PROGRAM)

    def memory(width: int, dtype: torch.dtype, make: Callable[..., Tensor] = torch.empty) -> Tensor:
        return make(slots, width, dtype=dtype, device=device)

    state, counts = memory(STATE.value, torch.int64), memory(BINS.value, torch.int32, torch.zeros)
    reached, length = memory(1, torch.int64, torch.zeros), memory(1, torch.int32, torch.zeros)
    keys, places = memory(longest, torch.int32), memory(longest, torch.int32)
    sampled = tiles * (area // every)
    chunk = CHUNK if device.type != "cpu" else triton.next_power_of_2(sampled)
    sample = torch.full((tensors, -(-sampled // chunk) * chunk), LOWEST.value, dtype=torch.int16, device=device)
    task = {"scaling_ptr": source.scaling.contiguous(), **task_arguments(source, precision, launch)}
    _sample_kernel[(tensors * tiles,)](sample, samples=tiles, length=sample.shape[1], EVERY=every, **task)
    _bracket_kernel[(slots,)](state, sample, kept, tensors, numel, sample.shape[1], CHUNK=chunk, **SMALL)
    options = search_launch(launch, arch_of(device)).options
    swept = {**task, **options, "KEEPS_LAYOUT": KEEPS_LAYOUT, "TILES": TILES_A_PROGRAM}
    _count_kernel[(runs,)](counts, reached, state, IN_SHARED=in_shared(source.x.dtype), **swept)
    _narrow_kernel[(slots,)](state, counts, reached, numel, EXACT=exact, LIST=longest, AREA=area, **SMALL)
    _collect_kernel[(runs,)](counts, length, keys, places, state, LIST=longest, **swept)
    last = {**task, **finish_launch(launch, source.x.dtype).options}
    _finish_kernel[(slots,)](*found, counts, length, keys, places, state, EXACT=exact, LIST=longest, **last)


def bands(
    source: Source,
    kept: Tensor,
    topped: Tensor,
    *,
    ties: str = "exact",
    precision: str = "ieee",
    launch: Launch | None = None,
) -> Band:
    """What drops the `topped` largest magnitudes of each task tensor and keeps the `kept` next: `trims` of both.

    kept, topped: int64 [recipes, modules, adapters], together at most M * N.
    """
    launch = launch or launch_of(source, recipes=len(kept))
    both = trims(source, torch.cat([kept + topped, topped]), ties=ties, precision=precision, launch=launch)
    fields = (both.value, both.row, both.column)
    return Band(Trim(*(field[: len(kept)] for field in fields)), Trim(*(field[len(kept) :] for field in fields)))
