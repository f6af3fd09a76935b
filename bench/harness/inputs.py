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
MODELS = {"TinyLlama": TINY_LLAMA, LLAMA_134M: llama(768, 768, 2048)}


def factors(rows: int, columns: int, rank: int, generator: torch.Generator) -> Pair:
    """Random (A [rank, columns], B [rows, rank]), float32."""
    A = torch.randn(rank, columns, generator=generator) / columns**0.5
    return A, torch.randn(rows, rank, generator=generator) * 0.01
