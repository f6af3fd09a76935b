"""Finds an adapter or a model: a local folder or file, or a repository of the hub, whose files are fetched."""

import glob
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from merge_engine.errors import MergeError
from merge_engine.rules.guesses import describe

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
SINGLE = ".safetensors"  # the end of the name of a file that is an adapter by itself


def is_hub_id(source: str) -> bool:
    """Whether it has the form ``user/repo`` of a hub id. The hub may not have it."""
    return _HUB_ID.fullmatch(source) is not None


def hub_ids(sources: Iterable[str | None]) -> list[str]:
    """Those of some sources that are of the hub: ids, without the name of a file, that no local folder has."""
    named = [source.partition(":")[0] for source in sources if source]
    return [source for source in named if is_hub_id(source) and not Path(source).exists()]


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
        raise error(f"wanted a folder with {config_file} or a hub id user/repo, got {describe(source)}")
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return path.resolve().name, path
    if path.exists():
        raise error(f"{source} is a file, wanted a folder with {config_file}")
    if not isinstance(source, str) or not is_hub_id(source):
        raise error(f"{source} does not exist, wanted a folder with {config_file} or a hub id user/repo")
    for pattern in weights:
        path = _fetched(source, source, revision, [*files, pattern], error)
        if any(path.glob(pattern)):
            break
    return source.split("/")[-1], path


def find_file(source: str | Path, revision: str | None, error: type[MergeError]) -> Path | None:
    """The .safetensors file that is asked for: by its path, or as ``user/repo:file`` of the hub, which is fetched.

    None where something else is asked for. Raises `error` where the hub does not give it.
    """
    if not isinstance(source, str | Path) or not str(source).endswith(SINGLE):
        return None
    path = Path(os.path.expanduser(source))
    if path.is_file():
        return path
    repository, colon, name = str(source).partition(":")
    if not colon or not is_hub_id(repository) or ".." in Path(name).parts or Path(name).is_absolute():
        return None
    path = _fetched(str(source), repository, revision, [glob.escape(name)], error) / name
    if not path.is_file():
        raise error(f"{source}: the repository {repository} has no file {name}")
    return path


def only_file(folder: Path, error: type[MergeError]) -> Path | None:
    """The one .safetensors file of a folder; None where it has none. Raises `error` where it has several."""
    files = sorted(folder.glob(f"*{SINGLE}"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4]) + (", ..." if len(files) > 4 else "")
        raise error(f"{folder} has {len(files)} files {names}; wanted one of them, by its name")
    return files[0] if files else None


def _fetched(
    source: str, repository: str, revision: str | None, patterns: Sequence[str], error: type[MergeError]
) -> Path:
    """The local copy of a repository, with the files that match."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except Exception as failure:  # the hub raises its own, httpx's and OS errors
        first = (str(failure).strip() or type(failure).__name__).splitlines()[0]
        raise error(f"{source} is no local folder and could not be fetched from the hub: {first}") from failure
