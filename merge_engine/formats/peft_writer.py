"""A merged adapter, written module by module into a folder that PEFT loads."""

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from merge_engine.errors import OutputError, writing
from merge_engine.files.local_names import shown_name, shown_names
from merge_engine.files.locate import hub_ids
from merge_engine.files.safetensors_writer import SafetensorsWriter
from merge_engine.formats.adapter import KEY_PREFIX, Adapter, Expert, Module, saves, short_name
from merge_engine.formats.biases import BIAS, check_biases, layer_of, without_bias
from merge_engine.formats.experts import nested_stems, stacked
from merge_engine.formats.extras import shared_extras
from merge_engine.formats.licence import CARD, agreed_licence
from merge_engine.formats.one_rank import RankAxis, to_one_rank
from merge_engine.formats.peft_config import ADAPTER_CONFIG
from merge_engine.formats.peft_tensors import WEIGHTS_FILE
from merge_engine.formats.servers import trouble_of_servers
from merge_engine.formats.tokens import token_settings
from merge_engine.formats.use import use_of_adapter, use_on_vllm
from merge_engine.report.card import RECIPE_FILE, Card, front_matter, recipe_file
from merge_engine.rules.recipe import DTYPES, Recipe
from merge_engine.rules.resolved import resolved
from merge_engine.runtime.finite import finite
from merge_engine.version import versions

logger = logging.getLogger(__name__)


class AdapterWriter:
    """Takes each module's factors in any order; ``finish`` completes the folder. For one thread.

    The scaling of the result is 1 everywhere: the delta of a module is ``B @ A`` as given. Only the cast to ``dtype``
    rounds. With ``ranks="one"`` all modules are written with the largest rank of any of them, by zeros.

    Args:
        folder: an existing folder to write into.
        adapters: what is merged; their common extras are copied.
        modules: every module that will be added, with the shapes of any adapter that has it.
        dtype: of the stored factors.
        ranks: "one", or "own": each module has the rank it was given with, and the configuration a rank_pattern.
        saved: which of the layers that they save whole is taken where they differ; see `extras.carried_over`.

    Raises:
        AdapterError: the adapters' extras differ, or PEFT loads no adapter with all that they have.
        OutputError: the disk is full, the folder cannot be written, or a value does not fit ``dtype``.
        ValueError: a module that was not planned, comes twice or never comes; factors of a wrong shape.
    """

    file_name = WEIGHTS_FILE
    library = "peft"  # which loads the result, by the hub's name

    def __init__(
        self,
        folder: Path,
        adapters: Sequence[Adapter],
        modules: Mapping[str, Module],
        dtype: torch.dtype,
        ranks: str = "one",
        saved: str | None = None,
    ) -> None:
        self._folder = Path(folder)
        self._adapters = list(adapters)
        self._modules = dict(modules)
        self._dtype = dtype
        self._one_rank = ranks == "one"
        self._ranks: dict[str, int] = {}
        self._config: dict[str, Any] = {}
        self.rank = 0  # the largest one that was written, once all are there
        check_biases(adapters)
        self._extras = shared_extras(adapters, saved)
        self._stems = nested_stems(module.expert for module in self._modules.values() if module.expert is not None)
        self._waiting: dict[str, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {}  # experts, by whole parameter
        keys = dict.fromkeys(key for module in self._modules.values() for key in self._keys(module))
        self._zeros = {f"{KEY_PREFIX}{layer.name}.lora_B.bias": layer.rows for layer in without_bias(modules.values())}
        self._file = self._folder / self.file_name
        keys |= dict.fromkeys((*self._zeros, *self._extras, *self._added()))
        self._weights = SafetensorsWriter(self._file, list(keys), self._metadata(None))

    def add(self, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """Append one module: ``A [k, N]``, ``B [M, k]``, any float dtype; k may differ from module to module."""
        module = self._modules.get(name)
        if module is None:
            raise ValueError(f"{name}: this module was not planned")
        rank = a.shape[0]
        if a.shape != (rank, module.columns) or b.shape != (module.rows, rank) or rank < 1:
            raise ValueError(
                f"{name}: factors are {list(a.shape)} and {list(b.shape)}, wanted "
                f"[k, {module.columns}] and [{module.rows}, k]"
            )
        self._ranks[name] = rank
        if module.kind == BIAS:
            (key,) = self._keys(module)
            self._weights.add(key, self._cast((b @ a)[0], key))
            return
        key_a, key_b = self._keys(module)
        a = self._cast(a, key_a).reshape(rank, *module.a_shape[1:])
        b = self._cast(b, key_b).reshape(module.rows, rank, *module.b_shape[2:])
        if module.expert is not None:
            self._add_expert(module, module.expert, a, b)
        else:
            self._put(module, a, b)

    def _add_expert(self, module: Module, expert: Expert, a: torch.Tensor, b: torch.Tensor) -> None:
        """Keep an expert's pair until those of all have come; then write them as one."""
        waiting = self._waiting.setdefault(expert.key, {})
        waiting[expert.number] = a, b
        if len(waiting) == expert.count:
            pairs = self._waiting.pop(expert.key)
            self._put_experts(module, [pairs[number] for number in sorted(pairs)])

    def _put(self, module: Module, a: torch.Tensor, b: torch.Tensor) -> None:
        """Write the two tensors of a module, or of all experts."""
        for key, tensor in zip(self._keys(module), (a, b), strict=True):
            self._weights.add(key, tensor)

    def _put_experts(self, module: Module, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Write the pairs of all experts, in their order, as one. module: of any of them."""
        self._put(module, *stacked(pairs))

    def _cast(self, tensor: torch.Tensor, key: str) -> torch.Tensor:
        cast = tensor.detach().to(self._dtype)
        if self._dtype.itemsize < tensor.dtype.itemsize and not finite(cast):
            raise OutputError(f"{key} reaches {tensor.abs().max().item():.3g}, which overflows {self._dtype}")
        return cast

    def complete(self) -> str | None:
        """Complete the weights and write the configuration; the name of the base model."""
        written = self._complete()
        self.rank = max(written.values())
        return self._describe(written)

    def trouble_of_servers(self) -> str | None:
        """See `servers.trouble_of_servers`."""
        return trouble_of_servers(self._modules.values(), list(self._extras))

    def finish(self, recipe: Mapping[str, Any], report: Mapping[str, Any]) -> None:
        """`complete`, and write model card, recipe.yaml and report.

        Args:
            recipe: what was asked for: fields of `Recipe`, plain values as in JSON, with a weight for each adapter.
            report: figures of the merge; each module's rank before zeros is added to ``report["modules"][name]``, and
                the largest one as ``report["rank"]``.
        """
        base = self.complete()
        modules = report.get("modules", {})
        full_report = {
            **report,
            "recipe": dict(recipe),
            "versions": versions(),
            "rank": self.rank,
            "modules": {name: {"rank": rank, **modules.get(name, {})} for name, rank in sorted(self._ranks.items())},
        }
        self._write("merge_report.json", json.dumps(full_report, indent=2))
        sources = [adapter.source for adapter in self._adapters]
        weights = recipe.get("weights") or [1.0] * len(sources)
        dtype = short_name(self._dtype)
        made_by = resolved(Recipe.from_mapping({**recipe, "dtype": dtype if dtype in DTYPES else None}), weights)
        licence = agreed_licence([adapter.path for adapter in self._adapters])
        card = Card(
            "Merged LoRA adapter",
            f"Made by merge-engine{f' for the base model `{shown_name(base)}`' if base else ''} from:",
            "adapter",
            list(zip(shown_names(sources), weights, strict=True)),
            made_by,
            front_matter(
                hub_ids([base, *sources]), "adapter", self.library, ["lora", "merge", "merge-engine"], licence
            ),
            self._use(),
            ["What each module kept is in `merge_report.json`.", ""],
        )
        self._write(CARD, card.text())
        self._write(RECIPE_FILE, recipe_file(sources, made_by).rstrip("\n"))

    def _use(self) -> list[str]:
        """The lines of the card on how to load the result."""
        served = [] if self.trouble_of_servers() else use_on_vllm(self._config)
        return use_of_adapter(self._config, {key: extra.shape for key, extra in self._extras.items()}) + served

    def _keys(self, module: Module) -> tuple[str, ...]:
        """The keys of A and of B, or of a bias."""
        if module.kind == BIAS:
            return (f"{KEY_PREFIX}{layer_of(module.name)}.lora_B.bias",)
        stem = KEY_PREFIX + (module.name if module.expert is None else self._stems[module.target])
        if module.kind == "embedding":
            return f"{stem}.lora_embedding_A", f"{stem}.lora_embedding_B"
        return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"

    def _axes(self, module: Module) -> tuple[RankAxis, RankAxis]:
        """Where the two tensors of a module, or of all experts, have their rank."""
        count = 1 if module.expert is None else module.expert.count
        return RankAxis(0, before=count), RankAxis(1, after=count)

    def _added(self) -> Sequence[str]:
        """The keys of tensors that are written beside factors and extras."""
        return ()

    def _metadata(self, rank: int | None) -> dict[str, str] | None:
        """The ``__metadata__`` of the file. It takes no more room than with rank None: when that is not known yet."""
        return None

    def _complete(self) -> dict[str, int]:
        """Complete the weights; the rank of every module in the file, by its target, once all are made one."""
        for key, rows in self._zeros.items():
            self._weights.add(key, torch.zeros(rows, dtype=self._dtype))
        for key, extra in self._extras.items():
            self._weights.add(key, extra.read())
        self._weights.close()
        if self._one_rank:
            return self._made_one(self._metadata(None))
        ranks: dict[str, int] = {}
        for module in self._matrices():  # of experts, the largest one counts
            ranks[module.target] = max(self._ranks[module.name], ranks.get(module.target, 0))
        return ranks

    def _matrices(self) -> list[Module]:
        return [module for module in self._modules.values() if module.kind != BIAS]

    def _made_one(self, metadata: Mapping[str, str] | None) -> dict[str, int]:
        keys: dict[str, RankAxis] = {}
        for module in self._matrices():
            keys |= zip(self._keys(module), self._axes(module), strict=True)
        rank = to_one_rank(self._file, keys, metadata)
        return {module.target: rank for module in self._matrices()}

    def _describe(self, written: Mapping[str, int]) -> str | None:
        """Write the configuration; the name of the base model."""
        self._config = adapter_config(self._adapters, written, list(self._extras))
        if len(self._matrices()) < len(self._modules):
            self._config["lora_bias"] = True
        self._write(ADAPTER_CONFIG, json.dumps(self._config, indent=2, sort_keys=True))
        return self._config["base_model_name_or_path"]

    def _write(self, name: str, text: str) -> None:
        with writing(self._folder / name):
            (self._folder / name).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")

    def abandon(self) -> None:
        """Close the weights file unfinished. Whoever made the folder deletes it."""
        self._weights.abandon()


def adapter_config(adapters: Sequence[Adapter], ranks: Mapping[str, int], extras: Sequence[str] = ()) -> dict[str, Any]:
    """The ``adapter_config.json`` of a merged adapter in which every module has scaling 1.

    Args:
        adapters: what was merged.
        ranks: the rank of each merged module, by what PEFT calls it (`Module.target`).
        extras: keys of the tensors that are copied beside the factors.
    """
    ((rank, _),) = Counter(ranks.values()).most_common(1)
    # PEFT looks for a pattern at the end of a module's name; anchored at both ends, each names these modules only.
    patterns = {
        "^(" + "|".join(re.escape(name) for name in sorted(ranks) if ranks[name] == other) + ")": other
        for other in sorted(set(ranks.values()) - {rank})
    }
    experts = {
        module.target for adapter in adapters for module in adapter.modules.values() if module.expert is not None
    }
    parameters = sorted(ranks.keys() & experts)
    saved = sorted({str(target) for adapter in adapters for target in adapter.config.get("modules_to_save") or ()})
    saved = [target for target in saved if any(saves(target, key) for key in extras)]
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": next((adapter.base_model for adapter in adapters if adapter.base_model), None),
        **{key: _agreed(adapters, key) for key in ("revision", "task_type", "auto_mapping")},
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": sorted(ranks.keys() - experts),
        # PEFT itself sets this right for Linear and Conv1D, with a warning, wherever it is wrong.
        "fan_in_fan_out": any(adapter.config.get("fan_in_fan_out") for adapter in adapters),
        "modules_to_save": saved or None,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    if parameters:
        config["target_parameters"] = _agreed(adapters, "target_parameters") or parameters
    tokens = token_settings(adapters, extras)
    if tokens is not None:
        config["trainable_token_indices"] = tokens
    return config


def _agreed(adapters: Sequence[Adapter], key: str) -> Any:
    values = [adapter.config.get(key) for adapter in adapters]
    return values[0] if all(value == values[0] for value in values) else None
