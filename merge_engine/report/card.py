"""Model cards: the README.md of a merged adapter and of a merged model."""

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

_SHOWN = 64  # added tokens that a model card lists


def adapter_card(
    sources: Sequence[str], weights: Sequence[Any], recipe: Mapping[str, Any], base: Any, hub: bool
) -> str:
    """The README.md of a merged adapter: front matter for the hub, what was merged and how, and how to load it.

    sources: where the inputs came from, in order. base: the base model's name; hub: whether that is a hub id.
    """
    return _page(
        {"library_name": "peft", "tags": ["lora", "merge", "merge-engine"]},
        base if hub else None,  # the hub takes no local path
        "Merged LoRA adapter",
        f"Made by merge-engine{f' for the base model `{base}`' if base else ''} from:",
        ("adapter", sources, weights),
        recipe,
        [
            "What each module kept is in `merge_report.json`.",
            "",
            "## Use",
            "",
            "```python",
            "from peft import PeftModel",
            "",
            "model = PeftModel.from_pretrained(base_model, path_to_this_folder)  # base_model: loaded as usual",
            "```",
        ],
    )


def full_model_card(
    sources: Sequence[str],
    weights: Sequence[float],
    recipe: Mapping[str, Any],
    base: str,
    hub: bool,
    tokens: Mapping[str, int],
) -> str:
    """The README.md of a merged model: front matter for the hub, what was merged into what, and how.

    base: the base model's folder or hub id; hub: whether it is one. tokens: {token: index} that the base lacks.
    """
    return _page(
        {"library_name": "transformers", "tags": ["merge", "merge-engine"]},
        base if hub else None,
        "Merged model",
        f"Made by merge-engine: `{base}` with these merged into it:",
        ("input", sources, weights),
        recipe,
        _tokens_card(tokens) if tokens else [],
    )


def _page(
    front: dict[str, Any],
    base: str | None,
    title: str,
    lead: str,
    inputs: tuple[str, Sequence[str], Sequence[Any]],
    recipe: Mapping[str, Any],
    ending: Sequence[str],
) -> str:
    import yaml

    if base is not None:
        front = {"base_model": base, **front}
    what, sources, weights = inputs
    rows = [f"| {_cell(source)} | {weight} |" for source, weight in zip(sources, weights, strict=True)]
    header = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {title}", "", lead, ""]
    table = [f"| {what} | weight |", "| --- | --- |", *rows, ""]
    return "\n".join([*header, *table, "## Recipe", "", "```yaml", recipe_text(recipe), "```", "", *ending])


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """A recipe as YAML for a model card: of a table {module: value} only the length, and nothing of an empty one."""
    import yaml

    shown = {}
    for key, value in recipe.items():
        if not key.startswith("module_"):
            shown[key] = value
        elif value:
            shown[key] = f"of {len(value)} modules, listed in merge_report.json"
    return yaml.safe_dump(shown, sort_keys=False).strip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _tokens_card(tokens: Mapping[str, int]) -> list[str]:
    """The table of the tokens that the base lacks; tokens are JSON strings, escaped for a Markdown table."""
    rows = []
    for token, index in islice(tokens.items(), _SHOWN):
        text = json.dumps(token, ensure_ascii=False).replace("`", "\\u0060").replace("|", "\\u007c")
        rows.append(f"| `{text}` | {index} |")
    rest = len(tokens) - len(rows)
    more = [f"and {rest} more, listed in `merge_report.json`.", ""] if rest else []
    return ["## Added tokens", "", "| token | index |", "| --- | --- |", *rows, "", *more]
