"""The model card of a merge of whole models, as the hub reads it: every input listed, and the recipe."""

from collections.abc import Mapping, Sequence
from typing import Any


def merge_card(sources: Sequence[str], hub: Sequence[str], report: Mapping[str, Any]) -> str:
    """The README.md: front matter (the inputs that are on the hub are base models, of a merge), inputs and recipe."""
    import yaml

    front: dict[str, Any] = {"library_name": "transformers", "tags": ["merge", "merge-engine"]}
    if hub:
        front = {"base_model": list(dict.fromkeys(hub)), "base_model_relation": "merge", **front}
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", "# Merged model", ""]
    lines += ["Made by merge-engine from:", "", *(f"- {source}" for source in sources), ""]
    recipe = yaml.safe_dump(report["recipe"], sort_keys=False).strip()
    return "\n".join([*lines, "## Recipe", "", "```yaml", recipe, "```", ""])
