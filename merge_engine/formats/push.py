"""An output on the hub: the same files, and texts that load it from there and tell no path of this machine."""

import json
from pathlib import Path
from typing import Any

from merge_engine.errors import OutputError
from merge_engine.files.hub import push
from merge_engine.files.local_names import names_of_paths, renamed
from merge_engine.formats.licence import CARD
from merge_engine.report.card import RECIPE_FILE, moved

_TOLD_PATHS = ("adapter_config.json", "config.json", "merge_report.json", RECIPE_FILE, "mergekit_config.yml")


def push_output(path: Path | None, repo: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Send a merged adapter or model to ``user/repo``; the address. path: its folder or file; None: it has none.

    Raises OutputError: there is nothing on the disk, or the hub does not take it.
    """
    if path is None:
        raise OutputError("push: wanted a merge that was written to a folder, got one that was kept in memory")
    return push(path, repo, _texts(path, repo), private=private, token=token)


def _texts(folder: Path, repo: str) -> dict[str, str]:
    """{name: text} of the files that differ on the hub: local folders have only their own names there."""
    values = {name: _read(folder / name) for name in _TOLD_PATHS if (folder / name).is_file()}
    names = names_of_paths(list(values.values()))
    texts = {}
    for name, value in values.items():
        there = renamed(value, names)
        if there != value:
            texts[name] = _written(name, there)
    if (folder / CARD).is_file():
        card = moved((folder / CARD).read_text(encoding="utf-8"), repo)
        for local in sorted(names, key=len, reverse=True):
            for text in (local, json.dumps(local, ensure_ascii=False)[1:-1]):
                card = card.replace(text, names[local])
        texts[CARD] = card
    return texts


def _read(file: Path) -> Any:
    import yaml

    text = file.read_text(encoding="utf-8")
    return json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)


def _written(name: str, value: Any) -> str:
    import yaml

    if name.endswith(".json"):
        return json.dumps(value, indent=2) + "\n"
    head = f"# merge-engine merge {name} -o OUT\n# Folders that were local have only their own names here.\n"
    return head + yaml.safe_dump(value, sort_keys=False)
