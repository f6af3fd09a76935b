"""The licence of what is merged, where all inputs have the same one: from their model cards."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

CARD = "README.md"
_KEYS = ("license", "license_name", "license_link")  # the hub's own names
_LONGEST = 1 << 20  # bytes of a card that are looked at


def agreed_licence(folders: Sequence[Path]) -> dict[str, Any]:
    """The fields of the licence in a card's front matter, if every folder has a card and all agree; else none."""
    found = [_licence(folder / CARD) for folder in folders]
    return found[0] if found and all(each == found[0] for each in found) else {}


def _licence(card: Path) -> dict[str, Any]:
    """The fields of one card; none where there is no card, or no front matter that can be read."""
    import yaml

    from merge_engine.files.plain_yaml import load_documents

    values: Any = None
    with suppress(OSError, yaml.YAMLError), open(card, encoding="utf-8", errors="replace") as file:
        start, _, rest = file.read(_LONGEST).partition("\n")
        front, end, _ = rest.partition("\n---")
        if start.strip() == "---" and end:
            values = next(iter(load_documents(front)), None)
    if not isinstance(values, dict) or not values.get("license"):
        return {}
    return {key: values[key] for key in _KEYS if values.get(key)}
