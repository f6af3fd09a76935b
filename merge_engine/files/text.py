"""Text files: YAML and JSON that give no key twice, and files that appear whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from merge_engine.errors import MergeError, RecipeError, writing
from merge_engine.files.working import flush


def read_yaml(file: Path) -> Any:
    """What a YAML file of one document holds, as plain data. Errors as of `read_documents`."""
    documents = read_documents(file)
    if len(documents) > 1:
        raise RecipeError(f"{file}: wanted one document, got {len(documents)}")
    return documents[0] if documents else None


def read_documents(file: Path) -> list[Any]:
    """What a YAML file holds, as plain data, one value a document; empty documents are left out.

    Raises RecipeError where it cannot be read, gives a key twice, or holds more than a recipe does: see `plain_yaml`.
    """
    import yaml

    from merge_engine.files.plain_yaml import BYTES, TooMuchError, load_documents

    try:
        if file.exists() and not file.is_file():
            raise RecipeError(f"{file}: cannot be read: wanted a file")
        with open(file, encoding="utf-8") as opened:
            text = opened.read(BYTES + 1)
        return [each for each in load_documents(text) if each is not None]
    except TooMuchError as error:
        raise RecipeError(f"{file}: {error}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{file}: cannot be read: {' '.join(str(error).split())}") from error


class TwiceError(ValueError):
    """A key that a JSON object holds twice."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An ``object_pairs_hook`` of `json.loads` that raises TwiceError for a key that comes twice."""
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        raise TwiceError(next(key for key in table if keys.count(key) > 1))
    return table


def read_object(file: Path, owner: str, error: type[MergeError]) -> dict[str, Any]:
    """The object in a JSON file, in UTF-8. Raises `error`, which names the owner, where there is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as failure:
        raise error(f"{owner}: {file.name} cannot be read: {failure}") from failure
    if not isinstance(value, dict):
        raise error(f"{owner}: {file.name} holds a {type(value).__name__}, wanted an object")
    return value


@contextmanager
def replaced(path: Path, *, fsync: bool = False) -> Iterator[Path]:
    """Yield the path of a new file beside ``path``; when the block ends, that file takes the place of ``path``.

    So a reader finds the old file or the new one, and never half of one; nor does a kill leave half of one at ``path``.
    When the block raises, ``path`` stays as it was and the new file is removed. Missing parent folders are created.

    fsync: flush the new file to the disk before it takes the place of the old one.

    Raises OutputError, which names ``path``, for every OSError: of the block, too.
    """
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            if fsync:
                flush(partial)
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):  # the first error is the one to report
                partial.unlink()
            raise


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all; errors as of `replaced`."""
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")
