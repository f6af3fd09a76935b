"""The model card of a merge of whole models, as the hub reads it: every input listed, and the recipe."""

from collections.abc import Mapping, Sequence
from typing import Any

from merge_engine.report.card import repeat, use_section


def merge_card(sources: Sequence[str], front: Mapping[str, Any], recipe: Any, use: Sequence[str], repeats: str) -> str:
    """The README.md of such a merge.

    front: the front matter, see `card.front_matter`. use: lines that load the model. repeats: the file beside it, if
    there is one, that repeats the merge.
    """
    import yaml

    lines = ["---", yaml.safe_dump(dict(front), sort_keys=False).strip(), "---", "", "# Merged model", ""]
    lines += ["Made by merge-engine from:", "", *(f"- {source}" for source in sources), ""]
    lines += ["## Recipe", "", "```yaml", yaml.safe_dump(recipe, sort_keys=False).strip(), "```", ""]
    if repeats:
        lines += repeat(repeats)
    return "\n".join([*lines, *use_section(use), ""])
