"""What the benchmarks merge: layers of real sizes, adapters on disk, in memory and in PEFT, all random.

What factors hold does not change the work, only their size does: A ~ N(0, 1/in), B ~ N(0, 0.01^2), alpha = 2 r.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, int]]
Pair = tuple[Tensor, Tensor]

LAYERS, RANK, SCALING = 22, 16, 2.0  # of TinyLlama; of its adapters; alpha / r


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
    """(A [rank, columns], B [rows, rank]), float32."""
    A = torch.randn(rank, columns, generator=generator) / columns**0.5
    return A, torch.randn(rows, rank, generator=generator) * 0.01


def make_adapter(
    folder: Path, seed: int, layers: int = LAYERS, shapes: Shapes = TINY_LLAMA, base: Path | None = None
) -> None:
    """An adapter folder as PEFT writes it: rank 16, float32, of every linear module of a Llama of so many layers."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in shapes.items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            A, B = factors(rows, columns, RANK, generator)
            tensors |= {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": int(SCALING * RANK)}
    config |= {"target_modules": sorted({name.split(".")[1] for name in shapes})}
    config |= {"base_model_name_or_path": None if base is None else str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def hollow(rows: int, columns: int, device: str = "cpu") -> nn.Linear:
    """A linear layer whose weight takes no memory: a merge looks at its shape only."""
    layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.zeros(1, device=device).expand(rows, columns), requires_grad=False)
    return layer


def adapted(base: nn.Module, targets: list[str], names: Sequence[str], rank: int = RANK) -> Any:
    """The base as PEFT's model, with adapters of random factors."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = {"r": rank, "lora_alpha": int(SCALING * rank), "target_modules": targets, "init_lora_weights": False}
    model = get_peft_model(base, LoraConfig(**config), names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**config))
    return model


def peft_layer(pairs: Sequence[Pair], names: Sequence[str]) -> Any:
    """PEFT's layer with these factors, one pair a name."""
    (A, B), device = pairs[0], str(pairs[0][0].device)
    base = nn.ModuleDict({"layer": hollow(len(B), A.shape[1], device)})
    layer = adapted(base, ["layer"], names, len(A)).base_model.model["layer"]
    for name, (A, B) in zip(names, pairs, strict=True):
        layer.lora_A[name].weight, layer.lora_B[name].weight = (
            nn.Parameter(each, requires_grad=False) for each in (A, B)
        )
    return layer
