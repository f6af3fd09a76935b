"""Finds an adapter or a model: a local folder, or a repository of the hub, whose files are fetched."""

import re
from collections.abc import Sequence
from pathlib import Path

from merge_engine.errors import MergeError

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def is_hub_id(source: str) -> bool:
    """Whether it has the form ``user/repo`` of a hub id. The hub may not have it."""
    return _HUB_ID.fullmatch(source) is not None


def find(
    source: str | Path,
    revision: str | None,
    config_file: str,
    files: Sequence[str],
    weights: Sequence[str],
    error: type[MergeError],
) -> tuple[str, Path]:
    """(name, folder) of a local folder, or of a hub id ``user/repo``, which is fetched; a folder of that name wins.

    revision: branch, tag or commit on the hub. files: patterns of the files to fetch.
    weights: patterns of weight files; the first pattern that matches any file is fetched as well.

    Raises `error`, which says that a folder with `config_file` was wanted, if there is none and the hub gives none.
    """
    if not isinstance(source, str | Path):
        raise error(f"wanted a folder with {config_file} or a hub id user/repo, got {source!r}")
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve().name, path
    if path.exists():
        raise error(f"{source} is a file, wanted a folder with {config_file}")
    if not isinstance(source, str) or not is_hub_id(source):
        raise error(f"{source} does not exist, wanted a folder with {config_file} or a hub id user/repo")
    import huggingface_hub

    try:
        for pattern in weights:
            path = Path(huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=[*files, pattern]))
            if any(path.glob(pattern)):
                break
    except Exception as failure:  # the hub raises its own, httpx's and OS errors
        first = (str(failure).strip() or type(failure).__name__).splitlines()[0]
        raise error(f"{source} is no local folder and could not be fetched from the hub: {first}") from failure
    return source.split("/")[-1], path
