"""What a user is told when a merge cannot be done.

A message names the subject (file, adapter, tensor), what was wanted and what was got, in one line:
``sql: lora_B of model.layers.3.self_attn.q_proj is [2048, 8], wanted rank 16 from adapter_config.json``.
"""

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_LONGEST = 2000  # letters of a message that are printed
_values = reprlib.Repr()
_values.maxstring = _values.maxother = 100
_values.maxlevel = 2


class MergeError(ValueError):
    """A merge that cannot be done as asked; nothing was written."""


class AdapterError(MergeError):
    """An adapter that is missing, damaged, or of a kind that cannot be merged."""


class RecipeError(MergeError):
    """A request that contradicts itself, the adapters, or the known methods."""


class OutputError(MergeError):
    """A result that cannot be placed where it was asked for."""


class ModelError(MergeError):
    """A full model that is missing, damaged, or does not fit what is to be merged with it or into it."""


def shown(value: Any, *, quoted: bool = True) -> str:
    """The ``repr`` of a value from a file, of which a large or deep one is shortened. quoted: text, too."""
    return _values.repr(value) if quoted or not isinstance(value, str) else value


def shortened(text: str) -> str:
    """A message, of which a long one is cut in the middle."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 500]} ... {text[-495:]}"


def printable(text: str) -> str:
    """One line for a terminal: what a file calls its tensors may hold any letter, as one that clears the screen."""
    return text if text.isprintable() else "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def some(count: int, what: str) -> str:
    """1 module, 2 modules."""
    return f"{count} {what}{'s' * (count != 1)}"


@contextmanager
def about(subject: str) -> Iterator[None]:
    """Turn a ValueError, such as that of a number that overflows float32, into a RecipeError that names ``subject``."""
    try:
        yield
    except MergeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{subject}: {error}") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError (disk full, no permission, read-only) into an OutputError that names ``path``."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
