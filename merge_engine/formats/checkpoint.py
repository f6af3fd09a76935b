"""Full models as transformers saves them. Opening reads no weights.

A folder with ``config.json`` and the weights: ``model.safetensors``, its shards with an index, or ``pytorch_model.bin``
likewise (through ``torch.load(weights_only=True)``).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from merge_engine.errors import ModelError, shown
from merge_engine.files.locate import find, leads_out
from merge_engine.files.text import read_object
from merge_engine.files.weights import StoredTensor, open_bin, open_safetensors, open_sharded
from merge_engine.formats.licence import CARD

MODEL_CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# Files beside the weights that a copy of the model needs, so that transformers loads it: code, too, since `auto_map` in
# config.json names it, and licenses, since they ask for it; but no weights of other formats and no model cards.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "*.py",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_HEADLESS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A full model on disk. Only headers have been read; several threads may read tensors at once."""

    name: str  # the last part of its folder or hub id
    source: str  # as it was asked for
    path: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]  # by key, in the order of the files
    twins: dict[str, str] = field(default_factory=dict)  # {key: the key whose weight it shares}

    @property
    def size_bytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def files(self) -> list[Path]:
        """Every weight file, in order."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    def companions(self) -> dict[str, Path]:
        """{name: file} of the files that belong to the model beside config.json and weights: see COMPANIONS.

        Raises ModelError where one is a link that leads out of the model: it would be copied into the output.
        """
        folders = [self.path, *(self.path / Path(pattern).parent for pattern in COMPANIONS if "/" in pattern)]
        found = {
            str(file.relative_to(self.path)): file
            for folder in folders
            if folder.is_dir()
            for file in folder.iterdir()
            if file.is_file() and file.suffix not in _WEIGHT_SUFFIXES
        }
        chosen = [name for name in sorted(found) if any(fnmatchcase(name, like) for like in COMPANIONS)]
        for name in chosen:
            check_inside(found[name], self.path, self.name)
        return {name: found[name] for name in chosen}

    @property
    def ties_embeddings(self) -> bool:
        """Whether the output head is the input embedding: as config.json says, else whether the files hold no head."""
        return _ties(self.config, self.tensors)


def check_inside(file: Path, folder: Path, owner: str) -> None:
    """Raise ModelError where a file that is to be copied is a link that leads out of its folder."""
    if leads_out(file, folder):
        raise ModelError(
            f"{owner}: {file} is a link to {os.path.realpath(file)}, outside of its folder; wanted the file itself, "
            "which is copied beside the weights"
        )


def is_head(key: str) -> bool:
    """Whether a tensor is the output head of a language model, by its usual names."""
    return key.rpartition(".")[0].rpartition(".")[2] in ("lm_head", "embed_out", "output_projection", "proj_out")


def open_checkpoint(source: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Open a full model from a local folder or from the hub, reading headers only.

    Args:
        source: a folder, or a hub id ``user/repo``; a folder of that name wins.
        revision: branch, tag or commit on the hub.

    Raises:
        MergeError: it is missing or damaged, or is no full model.
    """
    files = [MODEL_CONFIG, CARD, *COMPANIONS, "model.safetensors.index.json"]
    weights = ["model*.safetensors", "pytorch_model*.bin*"]
    name, path = find(source, revision, MODEL_CONFIG, files, weights, ModelError)
    config = _read_config(path, name)
    tensors = _open_weights(path, name)
    if not tensors:
        raise ModelError(f"{name}: {path} holds no tensors")
    twins = _twins(tensors)
    for head, key in (_tied_heads(tensors) if _ties(config, tensors) else {}).items():
        if twins.get(key) != head:  # a .bin file may have made the embedding the twin of the head
            twins[head] = twins.get(key, key)
    return Checkpoint(name, str(source), path, config, tensors, twins)


def _read_config(path: Path, name: str) -> dict[str, Any]:
    file = path / MODEL_CONFIG
    if not file.is_file():
        if (path / "adapter_config.json").is_file():
            raise ModelError(
                f"{name}: {path} is an adapter (adapter_config.json), wanted a full model ({MODEL_CONFIG})"
            )
        raise ModelError(f"{name}: {path} has no {MODEL_CONFIG}")
    config = read_object(file, name, ModelError)
    for part in (config, config.get("text_config")):
        size = part.get("vocab_size") if isinstance(part, dict) else None
        if size is not None and (type(size) is not int or size < 0):
            raise ModelError(f"{name}: vocab_size is {shown(size)} in {MODEL_CONFIG}, wanted a number of tokens")
    if config.get("quantization_config"):
        raise ModelError(f"{name}: {MODEL_CONFIG} has a quantization_config, wanted a model that is not quantized")
    return config


def _open_weights(path: Path, name: str) -> dict[str, StoredTensor]:
    def sharded_bin(index: Path, subject: str) -> dict[str, StoredTensor]:
        return open_sharded(index, subject, open_bin)

    openers: list[Callable[[Path, str], dict[str, StoredTensor]]] = [
        open_safetensors,
        open_sharded,
        open_bin,
        sharded_bin,
    ]
    for file, opener in zip(WEIGHTS, openers, strict=True):
        if (path / file).is_file():
            return opener(path / file, name)
    raise ModelError(f"{name}: {path} has no weights, wanted {', '.join(WEIGHTS)}")


def _twins(tensors: dict[str, StoredTensor]) -> dict[str, str]:
    """{key: an earlier key with the same memory}: tied weights, as torch.save keeps them."""
    first: dict[tuple[Any, ...], str] = {}
    twins = {}
    for key, stored in tensors.items():
        if stored.mapped is not None and stored.mapped.numel():
            place = (stored.mapped.data_ptr(), stored.shape, stored.mapped.stride(), stored.dtype)
            if first.setdefault(place, key) != key:
                twins[key] = first[place]
    return twins


def _ties(config: dict[str, Any], tensors: dict[str, StoredTensor]) -> bool:
    architectures = config.get("architectures")
    if isinstance(architectures, list) and any(str(name).endswith(_HEADLESS) for name in architectures):
        return False
    said = [config, *(config.get(part) for part in ("text_config", "decoder"))]
    ties = [each.get("tie_word_embeddings") for each in said if isinstance(each, dict)]
    ties = [each for each in ties if each is not None]
    return bool(ties[0]) if ties else not any(is_head(key) for key in tensors)


def _tied_heads(tensors: dict[str, StoredTensor]) -> dict[str, str]:
    """{head: embedding} where a head is saved beside the embedding that it is tied to: the same bits twice."""
    return {
        head: key
        for head, stored in tensors.items()
        if is_head(head) and len(stored.shape) == 2
        for key, other in tensors.items()
        if not is_head(key) and stored.same_as(other)
    }
