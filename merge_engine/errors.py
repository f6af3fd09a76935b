"""What a user is told when a merge cannot be done.

A message names the subject (file, adapter, tensor), what was wanted and what was got, in one line:
``sql: lora_B of model.layers.3.self_attn.q_proj is [2048, 8], wanted rank 16 from adapter_config.json``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
