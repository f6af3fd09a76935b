"""A merged adapter of MLX: a folder that mlx-lm loads, with one scale and one rank for all modules."""

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from merge_engine.formats.adapter import Adapter, Module
from merge_engine.formats.mlx import ADAPTERS_FILE
from merge_engine.formats.one_rank import RankAxis, padded
from merge_engine.formats.peft_config import ADAPTER_CONFIG
from merge_engine.formats.peft_writer import AdapterWriter
from merge_engine.report.card import HERE, code


class MlxWriter(AdapterWriter):
    """As `AdapterWriter`, with MLX's two files in place of PEFT's. All modules have one rank, as MLX wants it."""

    file_name = ADAPTERS_FILE
    library = "mlx"

    def trouble_of_servers(self) -> str | None:
        """None: servers of PEFT's adapters load no such folder."""
        return None

    def _use(self) -> list[str]:
        """The lines of the card on how to load the result."""
        base = next((json.dumps(adapter.base_model) for adapter in self._adapters if adapter.base_model), "base_model")
        load = f"model, tokenizer = load({base}, adapter_path={json.dumps(HERE)})"
        return code("python", "from mlx_lm import load", "", load)

    def _keys(self, module: Module) -> tuple[str, str]:
        stem = module.name if module.expert is None else module.expert.layer
        return f"{stem}.lora_a", f"{stem}.lora_b"

    def _put(self, module: Module, a: Tensor, b: Tensor) -> None:
        super()._put(module, a.T, b.T)

    def _put_experts(self, module: Module, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        rank = max(len(a) for a, _ in pairs)
        a = torch.stack([padded(a, RankAxis(0), rank) for a, _ in pairs])
        b = torch.stack([padded(b, RankAxis(1), rank) for _, b in pairs])
        super()._put(module, a, b)

    def _axes(self, module: Module) -> tuple[RankAxis, RankAxis]:
        return (RankAxis(1), RankAxis(0)) if module.expert is None else (RankAxis(1), RankAxis(2))

    def _metadata(self, rank: int | None) -> dict[str, str]:
        return {"format": "mlx"}

    def _describe(self, written: Mapping[str, int]) -> str | None:
        """Write the configuration; the name of the base model."""
        base = next((adapter.base_model for adapter in self._adapters if adapter.base_model), None)
        stems = sorted({self._keys(module)[0].rpartition(".")[0] for module in self._modules.values()})
        parameters = {"rank": self.rank, "scale": 1.0, "dropout": 0.0, **_keys_of(self._adapters, stems)}
        layers = [adapter.config.get("num_layers", -1) for adapter in self._adapters]
        config = {
            "fine_tune_type": "lora",
            "num_layers": max(layers) if min(layers) > 0 else -1,  # -1: all of them
            "lora_parameters": parameters,
            **({} if base is None else {"model": base}),
        }
        self._write(ADAPTER_CONFIG, json.dumps(config, indent=4, sort_keys=True))
        return base


def _keys_of(adapters: Sequence[Adapter], stems: Sequence[str]) -> dict[str, list[str]]:
    """The ``keys`` of lora_parameters, which name the layers to adapt: all that any input names.

    MLX makes LoRA layers of all that are named, and those without factors in the file do nothing. Where only some
    inputs name theirs, the merged layers are named in full; where none does, MLX adapts every linear layer.
    """
    named = [adapter.config["lora_parameters"].get("keys") for adapter in adapters]
    if all(keys is None for keys in named):
        return {}
    if any(keys is None for keys in named):
        return {"keys": list(stems)}
    return {"keys": sorted({key for keys in named for key in keys})}
