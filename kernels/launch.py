"""How a kernel is launched: tile shape and warps as data, chosen by a pure function of shape, rank, dtype and arch.

The evidence is machine code, since no GPU was at hand: `bench.static_cost.cost` reads it. For sm_90, bfloat16,
r = 16, ties, in instructions an output element (in the loop and adapter; outside of it) and registers:

    64x64, 4 warps    7.5  31.7  168    32 elements a thread
    128x64, 4 warps   9.1  32.6  255    64 elements a thread: spills 200 bytes, since four tiles are carried
    32x32, 1 warp     8.0  31.0  168    32 elements, but mma.sync with its fragments, not wgmma
    32x32, 2 warps    8.8  40.9   96    16 elements share what a tile costs once (addresses, barriers)
    16x16, 1 warp    11.0  58.8   63
    two recipes a program, 32x32, 2 warps: 20.3  61.9  230, against 2 * 7.5 and 2 * 31.7 apart

So one product for several recipes does not pay where the tensor cores make it: their ledgers halve the tile. It does
for float32 factors, which take 16 fused multiply-adds an element: 39.4 for two, against 2 * 25.3; four may spill.
Philox needs registers of its own, and so does a rank above 64: on sm_80 dare_ties spills 8 to 160 bytes at 64x64, by
rank and method, and none at 32x32 (2 warps), for 2 instructions more of 24. At rank 128 ptxas stops at 128 registers
and spills 8 bytes on sm_90 unless it is told that it may take 255. A CDNA lane has 512, and its warps are twice as
wide: two of them load 128 bits a lane, and no tile takes scratch memory on gfx942.
Pipelining the loads (num_stages = 2) added 1.3 an element to a draft: it takes the terms through shared memory too.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Launch:
    """block_m x block_n elements a program, of num_warps warps, for `recipes` recipes; a rank in steps of block_r.

    Selection and merge of a group take the same Launch, hence the same tiles and the same dot: the same bits.
    """

    block_m: int
    block_n: int
    block_r: int
    num_warps: int
    recipes: int = 1
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int | bool]:
        """What the compiler is told. No contraction: gain * product rounds, or opposite deltas would not cancel."""
        options = {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": False}
        return options if self.max_registers is None else {**options, "maxnreg": self.max_registers}


def launch_for(
    rows: int, columns: int, rank: int, dtype: torch.dtype, arch: str, *, recipes: int = 1, random: bool = False
) -> Launch:
    """The Launch for task tensors [rows, columns] of `rank` (0: dense) and dtype on arch ("sm_90", "gfx942", "cpu").

    recipes: how many there are to do. random: they drop at random.
    """
    block_r = next((step for step in (64, 32, 16) if rank and rank % step == 0), 16)
    if rank and dtype == torch.float32 and recipes % 2 == 0:
        return Launch(32, 32, block_r, 2, recipes=2)
    if arch.startswith("gfx"):
        return Launch(64, 64, block_r, 2)
    if arch.startswith("sm_") and rank > 64:
        return Launch(32, 32, block_r, 2, max_registers=255)
    if arch.startswith("sm_") and random:
        return Launch(32, 32, block_r, 2)
    return Launch(64, 64, block_r, 4)


def arch_of(device: torch.device) -> str:
    """ "sm_90", "gfx942", ... of the device at hand, or "cpu", where there is only the interpreter."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
