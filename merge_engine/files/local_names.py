"""What inputs are called in what others read: a path says where files lie on one machine, and who works there."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_engine.files.locate import hub_ids


def shown_names(sources: Iterable[str]) -> list[str]:
    """Hub ids as they are, and local folders and files by their own names.

    Different ones of the same name have so many of the folders above before it as tell them apart. ``model+adapter``
    are two.
    """
    sources = list(sources)
    parts = {part: _parts(part) for source in sources for part in source.split("+") if not hub_ids([part])}
    named = {part: _name(path, parts.values()) for part, path in parts.items()}
    return ["+".join(named.get(part, part) for part in source.split("+")) for source in sources]


def shown_name(source: str) -> str:
    """`shown_names` of one."""
    return shown_names([source])[0]


def names_of_paths(values: Sequence[Any]) -> dict[str, str]:
    """{path: name} of all absolute local paths among the strings of structures such as JSON has."""
    paths = list(dict.fromkeys(text for value in values for text in _texts(value) if _is_path(text)))
    return dict(zip(paths, shown_names(paths), strict=True))


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    """Such a structure with names in place of paths."""
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, Mapping):
        return {key: renamed(each, names) for key, each in value.items()}
    return [renamed(each, names) for each in value] if isinstance(value, list) else value


def _is_path(text: str) -> bool:
    return os.path.isabs(os.path.expanduser(text)) and "\n" not in text


def _parts(source: str) -> tuple[str, ...]:
    """Without the root."""
    return Path(os.path.abspath(os.path.expanduser(source))).parts[1:]


def _name(path: tuple[str, ...], all_paths: Iterable[tuple[str, ...]]) -> str:
    others, count = [other for other in all_paths if other != path], 1
    while any(other[-count:] == path[-count:] for other in others):
        count += 1
    return "/".join(path[-count:])


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(each)
