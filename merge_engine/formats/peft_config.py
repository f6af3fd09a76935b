"""The configuration of a PEFT LoRA adapter: which fields decide what its factors mean, and which forbid a merge."""

import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from merge_engine.errors import AdapterError, printable, shown
from merge_engine.files.text import read_object
from merge_engine.formats.ways_out import OTHER_METHODS, STARTS, way_out
from merge_engine.rules.matching import Pattern

logger = logging.getLogger(__name__)
ADAPTER_CONFIG = "adapter_config.json"
# Every field of PEFT's LoraConfig is in one of the four tables below. These decide what the factors mean:
READ = frozenset(
    {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"}
    | {"target_parameters", "lora_bias", "use_dora"}
)
# These name the base model, or the tensors that are saved beside the factors, and are kept:
KEPT = frozenset(
    {"base_model_name_or_path", "revision", "task_type", "auto_mapping", "fan_in_fan_out", "modules_to_save"}
    | {"trainable_token_indices"}
)
# These say how an adapter was trained and how its modules were chosen. The output's tensors say that; they are reset:
RESET = frozenset(
    {"peft_version", "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
    | {"lora_dropout", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying", "velora_config"}
    | {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}
)
# These change the arithmetic or the base model, so that s * B @ A is not what the adapter does:
REFUSED = {
    "bias": "biases of the base model were trained",
    "layer_replication": "it applies to a model with repeated layers",
    "alora_invocation_tokens": "activated LoRA (aLoRA) acts after its invocation tokens only, a merged delta always",
    "use_qalora": "QA-LoRA pools the input",
    "use_bdlora": "BD-LoRA factors are block-diagonal",
    "arrow_config": "Arrow routes between adapters by the input, so it is no one delta; merge the adapters",
    "kasa_config": "KaSA changes the base weights",
    "monteclora_config": "MonteCLoRA samples its weights",
    "megatron_config": "Megatron's parallel layers are not supported",
}
CHANGES_BASE = tuple(STARTS)  # initialisations that subtract the start of the adapter from the base weights
# These are merged where PEFT's folders have them; other formats have no place for them:
OF_FOLDERS = {
    "use_dora": "DoRA rescales the base weight",
    "lora_bias": "its bias is not part of the delta",
    "target_parameters": "LoRA on bare parameters is not supported",
}
_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(["rank_pattern", "alpha_pattern", "auto_mapping"], dict),
    **dict.fromkeys(["modules_to_save", "target_parameters"], list),
    **dict.fromkeys(["base_model_name_or_path", "revision", "task_type"], str),
    **dict.fromkeys(["use_rslora", "fan_in_fan_out", "lora_bias", "use_dora"], bool),
    "trainable_token_indices": (list, dict),
    "init_lora_weights": (bool, str),
}
_LARGEST = 2**63  # JSON may hold Infinity, NaN and integers of any size


def read_config(path: Path, name: str) -> dict[str, Any]:
    """The configuration in the folder ``path`` of the adapter ``name``, checked.

    Raises:
        AdapterError: it is missing or damaged, or says that the adapter's effect is not ``s * B @ A``.
    """
    file = path / ADAPTER_CONFIG
    if not os.access(path, os.R_OK | os.X_OK):
        raise AdapterError(f"{name}: {path} cannot be read: Permission denied")
    if not file.is_file():
        if not any(path.iterdir()):
            raise AdapterError(f"{name}: {path} is empty, wanted {ADAPTER_CONFIG}")
        if (path / "config.json").is_file():
            raise AdapterError(f"{name}: {path} is a full model (config.json), wanted an adapter ({ADAPTER_CONFIG})")
        raise AdapterError(f"{name}: {path} has no {ADAPTER_CONFIG}")
    config = read_object(file, name, AdapterError)
    check_config(config, name)
    return config


def rank_and_scaling(config: dict[str, Any], name: str) -> Callable[[str], tuple[int, float]]:
    """A function from a module's name to its rank and scaling, as PEFT resolves them.

    The scaling is alpha / r, or alpha / sqrt(r) with rsLoRA, after rank_pattern and alpha_pattern.

    Raises:
        AdapterError: a pattern is no regular expression, or its value no number.
    """
    ranks, alphas = _patterns(config, "rank_pattern", name), _patterns(config, "alpha_pattern", name)

    def resolve(module: str) -> tuple[int, float]:
        rank = next((value for pattern, value in ranks if pattern.match(module)), config.get("r", 8))
        alpha = next((value for pattern, value in alphas if pattern.match(module)), config.get("lora_alpha", 8))
        return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank

    return resolve


def check_config(config: dict[str, Any], name: str, refused: Mapping[str, str] = REFUSED) -> None:
    if config.get("peft_type") != "LORA":
        method = shown(config.get("peft_type"), quoted=False)
        raise AdapterError(f"{name}: peft_type is {method}, wanted LORA{way_out(OTHER_METHODS, method)}")
    for key, reason in refused.items():
        if config.get(key) not in (None, False, "none", [], {}):
            raise AdapterError(f"{name}: {key} is set in {ADAPTER_CONFIG}; {reason}")
    for key, kind in _TYPES.items():
        value = config.get(key)
        texts = kind is not list or value is None or (isinstance(value, list) and all(map(_is_text, value)))
        if not texts or (value is not None and not isinstance(value, kind)):
            wanted = " or a ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
            wanted += " of names" if kind is list else ""
            raise AdapterError(f"{name}: {key} is {shown(value)} in {ADAPTER_CONFIG}, wanted a {wanted}")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise AdapterError(
            f"{name}: init_lora_weights is {start}, which changed the base weights{way_out(STARTS, start.lower())}"
        )
    for key in config.keys() - READ - KEPT - RESET - REFUSED.keys():
        if config[key]:
            logger.warning("%s: %s in %s is not known and ignored", name, printable(key), ADAPTER_CONFIG)
    _check_number(config.get("r", 8), "r", name, int)
    _check_number(config.get("lora_alpha", 8), "lora_alpha", name, int | float)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _check_number(value: Any, key: str, name: str, kind: Any) -> None:
    number = isinstance(value, kind) and not isinstance(value, bool) and abs(value) < _LARGEST
    if not number or (kind is int and value < 1):
        wanted = "a positive integer" if kind is int else "a number"
        raise AdapterError(f"{name}: {key} is {shown(value)} in {ADAPTER_CONFIG}, wanted {wanted}")


def _patterns(config: dict[str, Any], key: str, name: str) -> list[tuple[Pattern, Any]]:
    """[(pattern, value)]: a pattern matches a whole module name, or its end after a dot; the first match decides."""
    patterns = []
    for text, value in (config.get(key) or {}).items():
        _check_number(value, f"{key}[{text[:100]!r}]", name, int if key == "rank_pattern" else int | float)
        patterns.append((Pattern(r"(.*\.)?", text, f"{name}: {key} has {text[:100]!r}, which", AdapterError), value))
    return patterns
