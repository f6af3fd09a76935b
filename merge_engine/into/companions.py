"""The files beside the weights of a full model: configuration, tokenizer, model card and report."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from merge_engine.engine.plan import Plan
from merge_engine.errors import ModelError, writing
from merge_engine.files.local_names import shown_name, shown_names
from merge_engine.files.locate import hub_ids
from merge_engine.files.shards import INDEX_FILE, Layout
from merge_engine.files.text import read_object
from merge_engine.formats.checkpoint import MODEL_CONFIG, Checkpoint
from merge_engine.formats.licence import CARD, agreed_licence
from merge_engine.formats.use import use_of_model
from merge_engine.models.vocabulary import TOKENIZER_FILE, Union
from merge_engine.report.card import RECIPE_FILE, Card, front_matter, recipe_file, tokens_text
from merge_engine.rules.resolved import OF_ADAPTERS, resolved
from merge_engine.version import versions

REPORT_FILE = "merge_report.json"


def write_companions(
    folder: Path,
    base: Checkpoint,
    plan: Plan,
    layout: Layout,
    backend: str,
    union: Union | None = None,
) -> None:
    """Copy the base's files, and write index, config.json, README.md, recipe.yaml and merge_report.json.

    union: the tokens of the output, where vocabularies are united; tokenizer files and config.json are written for it.
    """
    for name, file in base.companions().items():
        with writing(folder / name):
            (folder / name).parent.mkdir(exist_ok=True)
            if union is not None and union.added and name in WITH_TOKENS:
                value = WITH_TOKENS[name](read_object(file, base.name, ModelError), union)
                (folder / name).write_text(
                    json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8", "backslashreplace"
                )
            else:
                shutil.copyfile(file, folder / name)
    recipe = plan.recipe.as_dict()
    recipe["weights"] = list(plan.weights)
    recipe["vocab"] = "base" if union is None else "union"
    report: dict[str, Any] = {
        "base": base.source,
        "inputs": [source.source for source in plan.adapters],
        "modules": len(plan.modules),
        "backend": backend,
        "recipe": recipe,
        "versions": versions(),
    }
    made_by = {**resolved(plan.recipe, plan.weights, leave_out=OF_ADAPTERS), "vocab": recipe["vocab"]}
    added = {} if union is None else {token: entry["id"] for token, entry in union.added.items()}
    if union is not None:
        report["added_tokens"] = added
    texts = {
        MODEL_CONFIG: _config(base, plan.recipe.dtype, union),
        INDEX_FILE: layout.index(),
        CARD: _card(base, plan, made_by, added),
        RECIPE_FILE: recipe_file(report["inputs"], made_by, into=base.source),
        REPORT_FILE: json.dumps(report, indent=2) + "\n",
    }
    for name, text in texts.items():
        if text is not None:
            with writing(folder / name):
                (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")


def names_beside(base: Checkpoint) -> set[str]:
    """The names of all files that `write_companions` may write."""
    return {*base.companions(), MODEL_CONFIG, INDEX_FILE, CARD, RECIPE_FILE, REPORT_FILE}


def _card(base: Checkpoint, plan: Plan, made_by: Mapping[str, Any], added: Mapping[str, int]) -> str:
    """The README.md. added: {token: index} that the base lacks."""
    sources = [source.source for source in plan.adapters]
    licence = agreed_licence([base.path, *plan.inputs])
    return (
        Card(
            "Merged model",
            f"Made by merge-engine: `{shown_name(base.source)}` with these merged into it:",
            "input",
            list(zip(shown_names(sources), plan.weights, strict=True)),
            made_by,
            front_matter(hub_ids([base.source, *sources]), "merge", "transformers", ["merge", "merge-engine"], licence),
            use_of_model(base.config, base.companions()),
            tokens_text(added) if added else [],
        ).text()
        + "\n"
    )


def _config(base: Checkpoint, dtype: str | None, union: Union | None) -> str:
    """The base's text; changed only where another dtype is written, or the union has more rows than the base."""
    grows = union is not None and union.rows != union.base_rows
    if dtype is None and not grows:
        return (base.path / MODEL_CONFIG).read_text(encoding="utf-8")
    config = dict(base.config)
    if dtype is not None:
        for key in [key for key in ("torch_dtype", "dtype") if key in config] or ["dtype"]:
            config[key] = dtype
    if union is not None and grows:
        if isinstance(config.get("text_config"), dict):
            config["text_config"] = _resized(config["text_config"], union)
        config = _resized(config, union)
    return json.dumps(config, indent=2) + "\n"


def _resized(config: dict[str, Any], union: Union) -> dict[str, Any]:
    return config | ({"vocab_size": union.rows} if config.get("vocab_size") == union.base_rows else {})


class Extended(Protocol):
    """A vocabulary that extends a model's."""

    @property
    def added(self) -> dict[str, dict[str, Any]]:
        """The tokens that the model lacks, as entries of a tokenizer.json."""
        ...


def _tokenizer(value: dict[str, Any], union: Extended) -> dict[str, Any]:
    """tokenizer.json with the added tokens. Loaders number them in this order, from the first free index."""
    return {**value, "added_tokens": [*(value.get("added_tokens") or []), *union.added.values()]}


def _tokenizer_config(value: dict[str, Any], union: Extended) -> dict[str, Any]:
    decoder = value.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        new = {str(entry["id"]): {key: entry[key] for key in entry if key != "id"} for entry in union.added.values()}
        value = {**value, "added_tokens_decoder": decoder | new}
    return _special_tokens(value, union)


def _special_tokens(value: dict[str, Any], union: Extended) -> dict[str, Any]:
    """Append special tokens without a role to the file's list of these, under its newer name or its older one."""
    key = "extra_special_tokens" if isinstance(value.get("extra_special_tokens"), list) else "additional_special_tokens"
    new = [token for token, entry in union.added.items() if entry["special"]]
    return {**value, key: [*(value.get(key) or []), *new]} if new else value


def _added_tokens(value: dict[str, Any], union: Extended) -> dict[str, Any]:
    return value | {token: entry["id"] for token, entry in union.added.items()}


WITH_TOKENS: dict[str, Callable[[dict[str, Any], Extended], dict[str, Any]]] = {
    TOKENIZER_FILE: _tokenizer,
    "tokenizer_config.json": _tokenizer_config,
    "special_tokens_map.json": _special_tokens,
    "added_tokens.json": _added_tokens,
}
