"""The files beside the weights of a merge of whole tensors: configuration, tokenizer, model card and report."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from merge_engine.errors import ModelError, writing
from merge_engine.files.local_names import names_of_paths, renamed, shown_names
from merge_engine.files.locate import hub_ids
from merge_engine.files.shards import INDEX_FILE
from merge_engine.files.text import read_object
from merge_engine.formats.checkpoint import MODEL_CONFIG, Checkpoint
from merge_engine.formats.licence import CARD, agreed_licence
from merge_engine.formats.use import use_of_model
from merge_engine.into.companions import WITH_TOKENS
from merge_engine.into.full_inputs import FullInput
from merge_engine.into.whole_job import WholeJob
from merge_engine.models.token_rows import TokenRows
from merge_engine.report.card import front_matter
from merge_engine.report.merge_card import merge_card
from merge_engine.version import versions

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_TOKENIZER = (  # how the names of a tokenizer's files begin
    "tokenizer",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.",
    "merges.txt",
    "spiece.model",
    "sentencepiece",
    "chat_template",
    "additional_chat_templates",
)
MERGEKIT_FILE = "mergekit_config.yml"  # the recipe as it was written, by mergekit's own name of it
TEMPLATE_FILE = "chat_template.jinja"


def companions_of(
    donor: FullInput,
    rows: TokenRows | None,
    template: str | None,
    config: str,
    recipe: Mapping[str, str],
    report: Mapping[str, Any],
) -> dict[str, str | Path]:
    """{name: content, or the file to copy} of every file beside the weights.

    donor: the model whose files are taken; with rows, the tokenizer's files are those of its own donor, with the added
    tokens. template: the chat template, in place of theirs. recipe: files with the recipe as it was written.
    """
    files: dict[str, str | Path] = dict(donor.model.companions())
    if rows is not None:
        files = {name: file for name, file in files.items() if not name.startswith(_TOKENIZER)}
        files |= {name: file for name, file in rows.donor.companions().items() if name.startswith(_TOKENIZER)}
        for name, change in WITH_TOKENS.items():
            if rows.added and name in files:
                value = change(read_object(Path(files[name]), donor.name, ModelError), rows)
                files[name] = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    if template is not None and "tokenizer_config.json" in files:
        files = {name: file for name, file in files.items() if not name.startswith("chat_template")}
        held = files["tokenizer_config.json"]
        settings = json.loads(held) if isinstance(held, str) else read_object(held, donor.name, ModelError)
        settings.pop("chat_template", None)
        files["tokenizer_config.json"] = json.dumps(settings | {"chat_template": template}, indent=2) + "\n"
        files[TEMPLATE_FILE] = template
    files |= recipe
    files[MODEL_CONFIG] = config
    files["merge_report.json"] = json.dumps({**report, "versions": versions()}, indent=2) + "\n"
    return files


def write_files(job: WholeJob, folder: Path) -> None:
    """Write the companions of a job, its model card, and the index of its shards."""
    files = dict(job.companions)
    index = job.layout.index()
    if index is not None:
        files[INDEX_FILE] = index
    recipe = json.loads(str(files["merge_report.json"]))["recipe"]
    hub = hub_ids(source for each in job.sources for source in each.source.split("+"))
    front = front_matter(hub, "merge", "transformers", ["merge", "merge-engine"], agreed_licence(job.inputs))
    use = use_of_model(json.loads(str(files[MODEL_CONFIG])), files)
    seed = f" --seed {job.seed}" if job.seed else ""
    repeats = f"{MERGEKIT_FILE}{seed}" if MERGEKIT_FILE in files and not job.published else ""
    told = renamed(recipe, names_of_paths([recipe]))
    files[CARD] = merge_card(shown_names(each.source for each in job.sources), front, told, use, repeats)
    for name, content in files.items():
        with writing(folder / name):
            (folder / name).parent.mkdir(exist_ok=True)
            data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content.read_bytes()
            (folder / name).write_bytes(data)


def output_config(
    donor: Checkpoint,
    layers: Sequence[tuple[Checkpoint, int]] | None,
    dtype: torch.dtype | None,
    rows: int | None,
    untied: bool,
) -> str:
    """The text of config.json: the donor's, changed where the output differs from it.

    layers: (model, number of the layer in it) of each layer of the output, where they are not the donor's own: the
    number of layers, and every list with an entry for each layer, follow. rows: of tokens. untied: the output has a
    head of its own.
    """
    config = dict(donor.config)
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else None
    if dtype is not None:
        for key in [key for key in ("torch_dtype", "dtype") if key in config] or ["dtype"]:
            config[key] = str(dtype).removeprefix("torch.")
    if text is not None:
        config["text_config"] = _followed(dict(text), "text_config", layers, rows, untied)
    config = _followed(config, None, layers, rows, untied)
    if config == donor.config:
        return (donor.path / MODEL_CONFIG).read_text(encoding="utf-8")
    return json.dumps(config, indent=2) + "\n"


def _followed(
    config: dict[str, Any],
    section: str | None,
    layers: Sequence[tuple[Checkpoint, int]] | None,
    rows: int | None,
    untied: bool,
) -> dict[str, Any]:
    if rows is not None and "vocab_size" in config:
        config["vocab_size"] = rows
    if untied and config.get("tie_word_embeddings"):
        config["tie_word_embeddings"] = False
    counts = [key for key in LAYER_COUNTS if isinstance(config.get(key), int)]
    if layers is None or not counts:
        return config
    count = config[counts[0]]
    for key, value in list(config.items()):
        if isinstance(value, list) and len(value) == count:
            config[key] = [_of_layer(model, section, key, number, value) for model, number in layers]
    for key in counts:
        if config[key] == count:
            config[key] = len(layers)
    return config


def _of_layer(model: Checkpoint, section: str | None, key: str, number: int, donors: list[Any]) -> Any:
    """The entry of a layer, in its own model's list where that has one."""
    found = model.config if section is None else model.config.get(section)
    own = found.get(key) if isinstance(found, dict) else None
    values = own if isinstance(own, list) and number < len(own) else donors
    return values[min(number, len(values) - 1)]
