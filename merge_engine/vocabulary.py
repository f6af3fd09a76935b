"""Models whose embedding and head have more rows than the base: which tokens they added."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merge_engine.checkpoint import Checkpoint
from merge_engine.errors import ModelError

_SHOWN = 8  # tokens that a message names


def check_vocabulary(base: Checkpoint, models: Sequence[Checkpoint]) -> None:
    """Raise ModelError where an embedding or a head has another number of rows than in the base.

    The message names every such model, both sizes, and the tokens that its tokenizer has beyond the base's.
    """
    known, told = tokens(base.path), []
    for model in models:
        for key in vocabulary_keys(base):
            have, want = model.tensors[key].shape if key in model.tensors else (), base.tensors[key].shape
            if have and have[0] != want[0] and have[1:] == want[1:]:
                added = [token for token in tokens(model.path) if token not in known]
                more = f", ... ({len(added)} in all)" if len(added) > _SHOWN else ""
                names = f" (added: {', '.join(added[:_SHOWN])}{more})" if added else ""
                told.append(f"{model.name} has {have[0]} rows in {key}{names}")
                break
    if told:
        rows = base.tensors[vocabulary_keys(base)[0]].shape[0]
        raise ModelError(f"vocabularies differ: {base.name} has {rows} tokens; {'; '.join(told)}")


def vocabulary_keys(base: Checkpoint) -> list[str]:
    """The tensors with one row a token: two-dimensional, and as many rows as config.json has tokens."""
    sizes = [base.config, base.config.get("text_config")]
    size = next((each["vocab_size"] for each in sizes if isinstance(each, dict) and "vocab_size" in each), None)
    return [key for key, stored in base.tensors.items() if len(stored.shape) == 2 and stored.shape[0] == size]


def tokens(folder: Path) -> dict[str, int]:
    """{token: id} of a model's tokenizer files, by id; empty where they are missing or cannot be understood."""
    whole = _json(folder / "tokenizer.json")
    vocabulary = whole.get("model", {}).get("vocab", {}) if isinstance(whole.get("model"), dict) else {}
    found: dict[str, Any] = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    for entry in whole.get("added_tokens") or []:
        found[entry["content"]] = entry["id"]
    for number, entry in (_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}).items():
        found[entry["content"]] = int(number)
    found.update(_json(folder / "added_tokens.json"))
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
