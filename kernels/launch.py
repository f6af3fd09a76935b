"""How a kernel is launched: tile shape and warps as data, chosen by a pure function of shape, rank, dtype and arch.

The evidence is machine code, since no GPU was at hand: `bench.static.cost` reads it. For sm_90, bfloat16, r = 16, ties:
instructions per output element and adapter (in the loop), instructions per output element (outside of it), registers.

    64x64, 4 warps    7.5  31.7  168    32 elements per thread
    128x64, 4 warps   9.1  32.6  255    64 elements per thread: spills 200 bytes, since four tiles are carried
    32x32, 1 warp     8.0  31.0  168    32 elements, but mma.sync with its fragments, not wgmma
    32x32, 2 warps    8.8  40.9   96    16 elements share what a tile costs once (addresses, barriers)
    16x16, 1 warp    11.0  58.8   63
    two recipes per program, 32x32, 2 warps: 20.3  61.9  230, against 2 * 7.5 and 2 * 31.7 in two programs

So to share one product among recipes does not pay where tensor cores compute it: the recipes' ledgers halve the tile.
It pays for float32 factors, which take 16 fused multiply-adds per element: 39.4 for two recipes, against 2 * 25.3. At
rank 16 alone: at 32 and 64 some methods spill 8 to 4544 bytes, and four recipes may. Philox needs registers of its own,
and so does a rank above 64: on sm_80 dare_ties spills 8 to 160 bytes at 64x64, depending on rank and method, and none
at 32x32 (2 warps), at a cost of 2 in 24 instructions. At rank 128 ptxas stops at 128 registers and spills 8 bytes on
sm_90 unless it is told that it may use 255. On sm_100 a band of float32 factors does so too, while a consensus at rank
128 spills 8 if it is told, and else uses 146. A CDNA lane has 512, and its warps are twice as wide: two of them load
128 bits per lane, and no tile uses scratch memory on gfx942. On sm_100 four warps would take tcgen05, whose results are
not the same each time (triton-lang/triton #9871, #10590; pytorch/pytorch #181248), and on which Triton 3.7.1 fails to
compile `collect`; two warps take mma.sync, at no cost. Pipelined loads (num_stages = 2) added 1.3 per element to a
draft: they move the terms through shared memory, too.
"""

from dataclasses import dataclass, replace

import torch

SMALL = {"enable_fp_fusion": False}  # compiler options of kernels that see no tiles


@dataclass(frozen=True)
class Launch:
    """A program computes block_m x block_n elements of `recipes` recipes with num_warps warps, the rank by block_r.

    Selection and merge of a group use the same Launch, so the same tiles and the same dot, and so see the same bits.
    """

    block_m: int
    block_n: int
    block_r: int
    num_warps: int
    recipes: int = 1
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int | bool]:
        """Compiler options. No fused multiply-add: gain * product has to round, so that opposite deltas cancel."""
        options = {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": False}
        return options if self.max_registers is None else {**options, "maxnreg": self.max_registers}


def launch_for(
    rows: int,
    columns: int,
    rank: int,
    dtype: torch.dtype,
    arch: str,
    *,
    recipes: int = 1,
    random: bool = False,
    band: bool = False,
    twice: bool = False,
) -> Launch:
    """The Launch for task tensors [rows, columns] of `rank` (0: dense) and dtype on arch ("sm_90", "gfx942", "cpu").

    recipes: how many will be merged. random: whether they drop at random. band: whether they keep bands, which
    changes no tile. twice: whether each product is computed twice, for a consensus.
    """
    block_r = next((step for step in (64, 32, 16) if rank and rank % step == 0), 16)
    if rank == 16 and dtype == torch.float32 and recipes % 2 == 0:
        return Launch(32, 32, block_r, 2, recipes=2)
    if arch.startswith("gfx"):
        return Launch(64, 64, block_r, 2)
    if arch.startswith("sm_") and rank > 64:
        return Launch(32, 32, block_r, 2, max_registers=None if twice else 255)
    if arch.startswith("sm_") and random:
        return Launch(32, 32, block_r, 2)
    if arch.startswith(("sm_10", "sm_11")) and rank and dtype != torch.float32:
        return Launch(32, 64, block_r, 2, max_registers=255)
    all_registers = arch.startswith("sm_12") or (band and arch.startswith("sm_"))
    return Launch(64, 64, block_r, 4, max_registers=255 if all_registers else None)


def search_launch(launch: Launch, arch: str) -> Launch:
    """That of the sweeps before a merge: the same tiles, but all registers; ptxas stops at 128 for float32 factors."""
    return replace(launch, max_registers=255) if arch.startswith("sm_") else launch


def finish_launch(launch: Launch, dtype: torch.dtype) -> Launch:
    """That of a search's last kernel: float32 factors take twice the warps, or scalars spill.

    They see the same bits: a float32 product adds its terms one after the other, wherever it is computed.
    """
    return replace(launch, num_warps=2 * launch.num_warps) if dtype == torch.float32 else launch


def has_launch(arch: str) -> bool:
    """Whether the kernels compile for arch without spills: sm_80 and later, and CDNA (gfx9). Not RDNA, nor sm_75."""
    if arch.startswith("sm_"):
        return int(arch.removeprefix("sm_")) >= 80
    return arch == "cpu" or arch.startswith("gfx9")


def arch_of(device: torch.device) -> str:
    """ "sm_90", "gfx942", ... of the device at hand, or "cpu", where there is only the interpreter."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
