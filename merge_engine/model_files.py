"""What a full model's folder holds beside its weights: configuration, tokenizer, model card and report."""

import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from merge_engine.adapter_writer import recipe_text, versions
from merge_engine.checkpoint import CONFIG_FILE, Checkpoint
from merge_engine.plan import Plan
from merge_engine.shards import INDEX_FILE, Layout
from merge_engine.source import is_hub_id
from merge_engine.stream import writing
from merge_engine.vocabulary import TOKENIZER_FILE, Union

_SHOWN = 64  # added tokens that a model card lists


def write_companions(
    folder: Path, base: Checkpoint, plan: Plan, layout: Layout, backend: str, union: Union | None = None
) -> None:
    """Copy what belongs to the base, and write index, config.json, README.md and merge_report.json.

    union: the tokens of the output, if they are not just the base's: tokenizer and config.json tell of them.
    """
    for name, file in base.companions().items():
        with writing(folder / name):
            (folder / name).parent.mkdir(exist_ok=True)
            if union is not None and union.added and name in _WITH_TOKENS:
                value = _WITH_TOKENS[name](json.loads(file.read_bytes()), union)
                (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            else:
                shutil.copyfile(file, folder / name)
    recipe = plan.recipe.as_dict()
    recipe["weights"] = list(plan.recipe.weights_for([source.name for source in plan.adapters]))
    recipe["vocab"] = "base" if union is None else "union"
    report = {
        "base": base.source,
        "inputs": [source.source for source in plan.adapters],
        "modules": len(plan.modules),
        "backend": backend,
        "recipe": recipe,
        "versions": versions(),
    }
    if union is not None:
        report["added_tokens"] = {token: entry["id"] for token, entry in union.added.items()}
    texts = {
        CONFIG_FILE: _config(base, plan.recipe.dtype, union),
        INDEX_FILE: layout.index(),
        "README.md": model_card(base, plan, recipe, union),
        "merge_report.json": json.dumps(report, indent=2) + "\n",
    }
    for name, text in texts.items():
        if text is not None:
            with writing(folder / name):
                (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")


def _config(base: Checkpoint, dtype: str | None, union: Union | None) -> str:
    """The base's own text, or with the dtype that was asked for and the rows that the union has."""
    grows = union is not None and union.rows != union.base_rows
    if dtype is None and not grows:
        return (base.path / CONFIG_FILE).read_text(encoding="utf-8")
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


def _tokenizer(value: dict[str, Any], union: Union) -> dict[str, Any]:
    """tokenizer.json: loaders number the added tokens in the order of their list, from the first free index."""
    return {**value, "added_tokens": [*(value.get("added_tokens") or []), *union.added.values()]}


def _tokenizer_config(value: dict[str, Any], union: Union) -> dict[str, Any]:
    decoder = value.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        new = {str(entry["id"]): {key: entry[key] for key in entry if key != "id"} for entry in union.added.values()}
        value = {**value, "added_tokens_decoder": decoder | new}
    return _special_tokens(value, union)


def _special_tokens(value: dict[str, Any], union: Union) -> dict[str, Any]:
    """Special tokens without a role of their own, in the list that there is, by its newer name or its older one."""
    key = "extra_special_tokens" if isinstance(value.get("extra_special_tokens"), list) else "additional_special_tokens"
    new = [token for token, entry in union.added.items() if entry["special"]]
    return {**value, key: [*(value.get(key) or []), *new]} if new else value


def _added_tokens(value: dict[str, Any], union: Union) -> dict[str, Any]:
    return value | {token: entry["id"] for token, entry in union.added.items()}


_WITH_TOKENS: dict[str, Callable[[dict[str, Any], Union], dict[str, Any]]] = {
    TOKENIZER_FILE: _tokenizer,
    "tokenizer_config.json": _tokenizer_config,
    "special_tokens_map.json": _special_tokens,
    "added_tokens.json": _added_tokens,
}


def model_card(base: Checkpoint, plan: Plan, recipe: dict[str, Any], union: Union | None = None) -> str:
    """The README.md of a merged model: front matter for the hub, what was merged into what, and how."""
    import yaml

    front: dict[str, Any] = {"library_name": "transformers", "tags": ["merge", "merge-engine"]}
    if is_hub_id(base.source):  # the hub takes no local path here
        front = {"base_model": base.source, **front}
    weights = plan.recipe.weights_for([source.name for source in plan.adapters])
    rows = [
        f"| {source.source.replace('|', chr(92) + '|')} | {weight} |"
        for source, weight in zip(plan.adapters, weights, strict=True)
    ]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).strip(),
            "---",
            "",
            "# Merged model",
            "",
            f"Made by merge-engine: `{base.source}` with these merged into it:",
            "",
            "| input | weight |",
            "| --- | --- |",
            *rows,
            "",
            "## Recipe",
            "",
            "```yaml",
            recipe_text(recipe),
            "```",
            "",
            *([] if union is None or not union.added else _tokens_card(union)),
        ]
    )


def _tokens_card(union: Union) -> list[str]:
    """Which tokens the base lacks, as JSON strings that a table can hold."""
    rows = []
    for token, entry in islice(union.added.items(), _SHOWN):
        text = json.dumps(token, ensure_ascii=False).replace("`", "\\u0060").replace("|", "\\u007c")
        rows.append(f"| `{text}` | {entry['id']} |")
    rest = len(union.added) - len(rows)
    more = [f"and {rest} more, listed in `merge_report.json`.", ""] if rest else []
    return ["## Added tokens", "", "| token | index |", "| --- | --- |", *rows, "", *more]
