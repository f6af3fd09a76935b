"""The tokenizer of mergekit's recipes: whose tokens the output has, and where a token's row comes from."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from merge_engine.errors import RecipeError
from merge_engine.formats.checkpoint import Checkpoint, open_checkpoint
from merge_engine.mergekit.reader import Reader, Reference, nearest
from merge_engine.models.token_rows import Asked, TokenRows, has_tokenizer, token_rows

_SOURCES = ("union", "base")  # beside the names of models


class TokenSource(NamedTuple):
    """Where a recipe says that a token's row comes from: zeros (model None), or a row of a model."""

    model: Reference | None
    token: str | None = None
    row: int | None = None
    forced: bool = False


@dataclass(frozen=True)
class TokenizerSpec:
    """source: "union", "base", or the model whose tokens are taken. multiple: rows are padded to a multiple of it."""

    source: str | Reference
    tokens: Mapping[str, TokenSource] = field(default_factory=dict)
    multiple: int | None = None


def tokenizer_spec(reader: Reader, found: Mapping[str, Any]) -> TokenizerSpec | None:
    """What `tokenizer` or `tokenizer_source` says; None where a recipe has neither."""
    if "tokenizer" in found and "tokenizer_source" in found:
        raise RecipeError(f"{reader.file}: wanted either tokenizer or tokenizer_source, got both")
    if "tokenizer" not in found:
        source = found.get("tokenizer_source")
        return None if source is None else TokenizerSpec(_source(reader, "tokenizer_source", source))
    if isinstance(found["tokenizer"], str):
        raise reader.error("tokenizer", f"a table with source: {found['tokenizer']}", found["tokenizer"])
    held = reader.table("tokenizer", found["tokenizer"], ("source", "tokens", "pad_to_multiple_of"))
    multiple = held.get("pad_to_multiple_of")
    if multiple is not None and (type(multiple) is not int or multiple < 1):
        raise reader.error("tokenizer.pad_to_multiple_of", "a whole number of at least 1", multiple)
    asked = held.get("tokens", {})
    if not isinstance(asked, Mapping):
        raise reader.error("tokenizer.tokens", "a table of tokens", asked)
    tokens = {str(token): _token(reader, f"tokenizer.tokens.{token}", each) for token, each in asked.items()}
    return TokenizerSpec(_source(reader, "tokenizer.source", held.get("source", "union")), tokens, multiple)


def _source(reader: Reader, where: str, value: Any) -> str | Reference:
    if value in _SOURCES:
        return value
    if isinstance(value, str) and value.startswith("model:"):  # as the first versions of mergekit had it
        raise reader.error(where, f"the name alone, {value.removeprefix('model:')}", value)
    alike = nearest(value.lower(), _SOURCES) if isinstance(value, str) else []
    if alike and not Path(value).exists():
        raise RecipeError(f"{reader.file}: {where}: there is no model {value}; did you mean {alike[0]}?")
    return reader.reference(where, value)


def _token(reader: Reader, where: str, value: Any) -> TokenSource:
    found = reader.strict(where, value, ("source", "force"))
    source, forced = found.get("source"), found.get("force", False)
    if not isinstance(forced, bool):
        raise reader.error(f"{where}.force", "true or false", forced)
    kind = source.get("kind") if isinstance(source, Mapping) else None
    if kind == "zero":
        return TokenSource(None, forced=forced)
    if kind == "model_token":
        held = reader.strict(f"{where}.source", source, ("kind", "model", "token", "token_id"))
        token, row = held.get("token"), held.get("token_id")
        if (token is None) == (row is None) or not isinstance(row, int | None) or not isinstance(token, str | None):
            raise reader.error(f"{where}.source", "either token, a text, or token_id, a whole number", source)
        return TokenSource(reader.reference(f"{where}.source.model", held.get("model")), token, row, forced)
    if kind is not None:
        raise reader.error(f"{where}.source.kind", "zero or model_token", kind)
    if source is None:
        raise reader.error(f"{where}.source", "a model, or a table with kind: zero or kind: model_token", None)
    return TokenSource(reader.reference(f"{where}.source", source), forced=forced)


def rows_of_tokens(
    file: str, spec: TokenizerSpec, references: Sequence[Reference], models: Sequence[Checkpoint], base: int
) -> TokenRows | None:
    """The rows of every model's tokens in the output. base: the number of the base, or of the first model.

    None where the base's tokens are asked for and no model has a tokenizer.json that could say other tokens.
    """
    if spec == TokenizerSpec("base") and not any(map(has_tokenizer, models)):
        warnings.warn(f"{file}: no model has a tokenizer.json; their rows are taken as they are", stacklevel=2)
        return None

    def number(reference: Reference, where: str) -> int:
        if reference not in references:
            names = ", ".join(map(str, references))
            raise RecipeError(f"{file}: {where}: wanted one of the models, {names}, got {reference}")
        return references.index(reference)

    asked = {}
    for token, each in spec.tokens.items():
        model = None if each.model is None else number(each.model, f"tokenizer.tokens.{token}")
        asked[token] = Asked(model, each.token, each.row, each.forced, zero=each.model is None)
    source: int | None = None if spec.source == "union" else base
    models = list(models)
    if isinstance(spec.source, Reference):
        if spec.source in references:
            source = references.index(spec.source)
        else:  # a model of which only the tokenizer is taken
            source = len(models)
            models.append(open_checkpoint(spec.source.path, revision=spec.source.revision))
    return token_rows(models, source, base, asked, spec.multiple)
