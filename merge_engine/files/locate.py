"""Finds an adapter or a model: a local folder or file, or a repository of the hub, whose files are fetched."""

import glob
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from merge_engine.errors import MergeError
from merge_engine.rules.guesses import describe

logger = logging.getLogger(__name__)
T = TypeVar("T")
PATIENCE = 15.0  # seconds in which the hub must say what a repository is
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
SINGLE = ".safetensors"  # the end of the name of a file that is an adapter by itself


def is_hub_id(source: str) -> bool:
    """Whether it has the form ``user/repo`` of a hub id. The hub may not have it."""
    return _HUB_ID.fullmatch(source) is not None


def hub_ids(sources: Iterable[str | None]) -> list[str]:
    """Those of some sources that are of the hub: ids, without the name of a file, that no local folder has."""
    named = [source.partition(":")[0] for source in sources if source]
    return [source for source in named if is_hub_id(source) and not os.path.exists(source)]


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
    if os.path.isdir(path):  # not of `Path`, which raises for a name that is too long
        return path.resolve().name, path
    if os.path.exists(path):
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
    if os.path.isfile(path):
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


class SilenceError(Exception):
    """The hub does not answer."""


def answer(ask: Callable[[], T]) -> T:
    """What a call to the hub returns. Raises what it raises, and SilenceError after `PATIENCE` seconds without an end.

    The hub's client waits for an answer without limit.
    """
    answers: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(ask())
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if failures:
        raise failures[0]
    if not answers:
        raise SilenceError(f"it has not answered in {PATIENCE:g} s")
    return answers[0]


def leads_out(file: Path, folder: Path) -> bool:
    """Whether a file is a link to a place outside of its folder; in the hub's cache, outside of its repository."""
    root = Path(os.path.realpath(folder))
    if root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir():
        root = root.parent.parent
    return root not in Path(os.path.realpath(file)).parents


def _fetched(
    source: str, repository: str, revision: str | None, patterns: Sequence[str], error: type[MergeError]
) -> Path:
    """The local copy of a repository, with the files that match; what is there already where the hub is silent."""
    import huggingface_hub

    wanted: dict[str, Any] = {"revision": revision, "allow_patterns": list(patterns)}
    try:
        try:
            answer(lambda: huggingface_hub.HfApi().repo_info(repository, revision=revision))
        except SilenceError as silence:
            wanted["local_files_only"] = True
            with suppress(Exception):
                return Path(huggingface_hub.snapshot_download(repository, **wanted))
            raise silence
        except Exception as failure:  # is told with more words when the files are asked for
            logger.debug("%s: %s", repository, failure)
        return Path(huggingface_hub.snapshot_download(repository, **wanted))
    except Exception as failure:  # the hub raises its own, httpx's and OS errors
        first = (str(failure).strip() or type(failure).__name__).splitlines()[0]
        raise error(f"{source} is no local folder and could not be fetched from the hub: {first}") from failure
