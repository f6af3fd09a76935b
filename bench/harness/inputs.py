"""What the benchmarks merge: layers of real sizes, with random factors.

The values of the factors do not change the work, only their sizes do: A ~ N(0, 1/in), B ~ N(0, 0.01^2), alpha = 2 r.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, int]]
Pair = tuple[Tensor, Tensor]

LAYERS = 22  # of TinyLlama
RANK = 16  # of the adapters of a whole model
SCALING = 2.0  # alpha / r


def llama(hidden: int, keys: int, mlp: int) -> dict[str, tuple[int, int]]:
    """(rows, columns) of every linear module of a Llama block."""
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }


TINY_LLAMA = llama(2048, 256, 5632)
LLAMA_134M = "Llama-134M"  # with 12 layers and 32000 tokens
TWO_OF_TINY_LLAMA = "2048x2048 and 2048x5632"  # modules of TinyLlama, of two sizes only
FLUX = "Flux"  # with 19 double and 38 single blocks: as 19 layers of one double and two single blocks


def flux(hidden: int) -> dict[str, tuple[int, int]]:
    """(rows, columns) of the linear modules of a double block and of two single ones, as kohya's scripts adapt them.

    The names are those of kohya's files; {0}, {1} and {2} are the numbers of the three blocks.
    """
    double = {"attn_qkv": (3, 1), "attn_proj": (1, 1), "mlp_0": (4, 1), "mlp_2": (1, 4), "mod_lin": (6, 1)}
    single = {"linear1": (7, 1), "linear2": (1, 5), "modulation_lin": (3, 1)}
    names = {f"double_blocks_{{0}}_{side}_{name}": shape for side in ("img", "txt") for name, shape in double.items()}
    names |= {f"single_blocks_{{{number}}}_{name}": shape for number in (1, 2) for name, shape in single.items()}
    return {name: (rows * hidden, columns * hidden) for name, (rows, columns) in names.items()}


MODELS = {
    "TinyLlama": TINY_LLAMA,
    TWO_OF_TINY_LLAMA: {name: TINY_LLAMA[name] for name in ("self_attn.q_proj", "mlp.down_proj")},
    LLAMA_134M: llama(768, 768, 2048),
    FLUX: flux(3072),
}


def factors(rows: int, columns: int, rank: int, generator: torch.Generator) -> Pair:
    """Random (A [rank, columns], B [rows, rank]), float32."""
    A = torch.randn(rank, columns, generator=generator) / columns**0.5
    return A, torch.randn(rows, rank, generator=generator) * 0.01
