"""What the kernels read: task tensors, packed in groups of modules of one shape, and what is kept of each.

Shapes: modules of one shape [M, N] in a group, `adapters` adapters that have every one of them, R the padded rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .launch import Launch, arch_of, launch_for

RANK_STEP = 16  # tl.dot needs K >= 16

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Lora:
    """Task tensors scaling * B @ A of a group.

    A: [modules, adapters, R, N], B: [modules, adapters, M, R], of one dtype (float32, float16, bfloat16), contiguous,
    R a multiple of 16. scaling: float32 [modules, adapters], on the device of A and B.
    """

    A: Tensor
    B: Tensor
    scaling: Tensor

    def __post_init__(self) -> None:
        if self.A.ndim != 4 or self.B.ndim != 4:
            raise ValueError(f"A is {list(self.A.shape)} and B {list(self.B.shape)}, wanted four dimensions")
        modules, adapters, rows, rank = self.B.shape
        if rank == 0 or rank % RANK_STEP:
            raise ValueError(f"B has rank {rank}, wanted a multiple of {RANK_STEP} (see `pack`)")
        device = self.B.device
        check_tensor("B", self.B, (modules, adapters, rows, rank), device)
        check_tensor("A", self.A, (modules, adapters, rank, self.A.shape[3]), device, (self.B.dtype,))
        check_tensor("scaling", self.scaling, (modules, adapters), device, (torch.float32,), contiguous=False)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(modules, adapters, M, N)."""
        modules, adapters, rows, _ = self.B.shape
        return modules, adapters, rows, self.A.shape[3]

    @property
    def rank(self) -> int:
        return self.A.shape[2]

    @property
    def x(self) -> Tensor:
        return self.B

    @property
    def base(self) -> Tensor | None:
        return None


@dataclass(frozen=True)
class Dense:
    """Task tensors x, or x - base, of a group: whole matrices, or the factors themselves.

    x: [modules, adapters, M, N] (float32, float16, bfloat16), the last dimension contiguous, the others of any stride:
    factors padded for `Lora` serve as ``A[:, :, :r]`` and ``B[..., :r]``. A vector is a matrix of one row.
    base: [modules, M, N], contiguous, of any of these dtypes, or None.
    """

    x: Tensor
    base: Tensor | None = None

    def __post_init__(self) -> None:
        if self.x.ndim != 4:
            raise ValueError(f"x is {list(self.x.shape)}, wanted four dimensions")
        modules, adapters, rows, columns = self.x.shape
        check_tensor("x", self.x, (modules, adapters, rows, columns), self.x.device, contiguous=False)
        if self.x.stride(3) != 1 and columns > 1:
            raise ValueError(f"x has strides {self.x.stride()}, wanted 1 in the last dimension")
        if self.base is not None:
            check_tensor("base", self.base, (modules, rows, columns), self.x.device)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(modules, adapters, M, N)."""
        modules, adapters, rows, columns = self.x.shape
        return modules, adapters, rows, columns

    @property
    def rank(self) -> int:
        return 0

    @property
    def A(self) -> Tensor:
        return self.x  # never read: a dense tile has no second factor

    @property
    def scaling(self) -> Tensor:
        return torch.ones(self.x.shape[:2], device=self.x.device)


Source = Lora | Dense


@dataclass(frozen=True)
class Trim:
    """Keep |t| > value, and |t| = value at places before (row, column), row-major.

    value float32, row and column int32: [recipes, modules, adapters] on the source's device. `select.trims` makes them.
    """

    value: Tensor
    row: Tensor
    column: Tensor


@dataclass(frozen=True)
class Drop:
    """Keep at random with probability density, then multiply by factor, or divide by density where it is None.

    density: float64 [recipes, modules, adapters], 0 < density <= 1. seeds: one a recipe, in [0, 2**64).
    streams: int64 [modules], `rules.philox.stream_id` of each. adapters: int64 [adapters], the adapters' indices.
    factor: float32 [recipes, modules, adapters] or None.
    Tensors may lie on any device: they are small and copied.
    """

    density: Tensor
    seeds: Sequence[int]
    streams: Tensor
    adapters: Tensor
    factor: Tensor | None = None


@dataclass(frozen=True)
class Band:
    """Keep what `wide` keeps and `top` does not: of the largest magnitudes all, and of these the very largest.

    `select.bands` makes it.
    """

    wide: Trim
    top: Trim


Keep = Trim | Band | Drop | None


def pack(
    modules: Sequence[Sequence[Pair]],
    scaling: Sequence[Sequence[float]],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Lora:
    """Slabs of the factors (A [r, N], B [M, r]) of each adapter in each module of one shape.

    Ranks may differ: they are padded with zero rows of A and columns of B to the largest, rounded up to 16, which adds
    exact zeros to every product. dtype: by default what all the factors promote to, so that packing never rounds.
    device: by default that of the first factor. Raises ValueError where shapes or counts differ.
    """
    pairs = [pair for row in modules for pair in row]
    if not pairs:
        raise ValueError("modules hold no factors: wanted at least one (A, B)")
    adapters, columns, rows = len(modules[0]), pairs[0][0].shape[1], pairs[0][1].shape[0]
    if [len(row) for row in modules] != [adapters] * len(modules) or [len(row) for row in scaling] != [adapters] * len(
        modules
    ):
        raise ValueError(f"modules and scaling want {adapters} adapters in each of {len(modules)} modules")
    for A, B in pairs:
        if A.ndim != 2 or B.ndim != 2 or A.shape != (B.shape[1], columns) or B.shape[0] != rows:
            raise ValueError(f"got A {list(A.shape)} and B {list(B.shape)}, wanted [r, {columns}] and [{rows}, r]")
    if dtype is None:
        dtype = pairs[0][0].dtype
        for factor in (factor for pair in pairs for factor in pair):
            dtype = torch.promote_types(dtype, factor.dtype)
    largest = max(max(A.shape[0] for A, _ in pairs), 1)
    rank = -(-largest // RANK_STEP) * RANK_STEP
    device = torch.device(device) if device is not None else pairs[0][0].device
    slab_a = torch.zeros(len(modules), adapters, rank, columns, dtype=dtype, device=device)
    slab_b = torch.zeros(len(modules), adapters, rows, rank, dtype=dtype, device=device)
    for i, row in enumerate(modules):
        for j, (A, B) in enumerate(row):
            slab_a[i, j, : A.shape[0]].copy_(A, non_blocking=True)
            slab_b[i, j, :, : B.shape[1]].copy_(B, non_blocking=True)
    return Lora(slab_a, slab_b, on_device(torch.tensor(scaling, dtype=torch.float32), device))


def launch_of(source: Source, *, recipes: int = 1, keep: Keep = None, twice: bool = False) -> Launch:
    """`launch_for` of a source."""
    _, _, rows, columns = source.shape
    how = {"random": isinstance(keep, Drop), "band": isinstance(keep, Band), "twice": twice}
    return launch_for(rows, columns, source.rank, source.x.dtype, arch_of(source.x.device), recipes=recipes, **how)


def task_arguments(source: Source, precision: str, launch: Launch) -> dict[str, Any]:
    """The arguments by which every kernel sees its task tensors."""
    modules, adapters, rows, columns = source.shape
    if precision not in ("ieee", "tf32x3", "tf32"):
        raise ValueError(f"precision is {precision!r}, wanted 'ieee', 'tf32x3' or 'tf32'")
    x = source.x
    return {
        "x_ptr": x,
        "stride_xm": x.stride(0),
        "stride_xa": x.stride(1),
        "stride_xr": x.stride(2),
        "a_ptr": source.A,
        "minus_ptr": x if source.base is None else source.base,
        "modules": modules,
        "adapters": adapters,
        "M": rows,
        "N": columns,
        "RANK": source.rank,
        "SUBTRACT": source.base is not None,
        "PRECISION": precision,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_R": launch.block_r,
        **launch.options,
    }


def tiles_of(source: Source, launch: Launch) -> int:
    """How many tiles a task tensor has."""
    _, _, rows, columns = source.shape
    return -(-rows // launch.block_m) * -(-columns // launch.block_n)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; from the host through pinned memory, so that nobody waits for the copy."""
    if tensor.device == device:
        return tensor
    if tensor.device.type == "cpu" and device.type == "cuda":
        with torch.cuda.device(device):  # else the current device would pin it, and get a context of its own
            return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    *,
    contiguous: bool = True,
) -> None:
    """Raise a ValueError that says what was wanted and what came."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {list(tensor.shape)}, wanted {list(shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, wanted {' or '.join(map(str, dtypes))}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, wanted {device}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, wanted it contiguous")
