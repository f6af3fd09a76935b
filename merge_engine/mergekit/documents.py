"""Files of several recipes: those with a name may be inputs of others, and are merged before them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_engine.errors import RecipeError
from merge_engine.files.text import read_documents, write_text

NAME = "name"


def documents_of(recipe: str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> tuple[list[Any], str]:
    """(the recipes, the name of their file for messages)."""
    if isinstance(recipe, Mapping):
        return [recipe], "recipe"
    if isinstance(recipe, str | Path):
        return read_documents(Path(recipe)), str(recipe)
    return list(recipe), "recipe"


def in_order(documents: Sequence[Any], file: str, output: Path) -> Iterator[tuple[dict[str, Any], Path, bool]]:
    """(a recipe in which names are folders, where its result goes, whether it is a step) in the order to be merged.

    The one without a name, or else the last, goes to the output. Raises RecipeError: two have one name or none, or they
    need each other in a circle.
    """
    for document in documents:
        if not isinstance(document, Mapping):
            raise RecipeError(f"{file}: wanted a table of keys in every document, got {document!r}")
    names = [document.get(NAME) for document in documents]
    for name in names:
        if names.count(name) > 1:
            wanted = f"one document {'without a name' if name is None else f'named {name}'}, got {names.count(name)}"
            raise RecipeError(f"{file}: {NAME}: wanted {wanted}; rename the others")
    final = names.index(None) if None in names else len(names) - 1
    steps = Path(f"{output}.steps")
    places = {name: steps / str(name) if i != final else output for i, name in enumerate(names) if name is not None}
    waiting = dict(enumerate(documents))
    while waiting:
        free = [i for i, document in waiting.items() if not (_needs(document, places) - _made(names, waiting))]
        if not free:
            circle = ", ".join(str(names[i]) for i in waiting)
            raise RecipeError(f"{file}: {circle} need each other's results; wanted an order to merge them in")
        for i in free:
            document = {key: value for key, value in waiting.pop(i).items() if key != NAME}
            yield _placed(document, places), output if i == final else places[names[i]], i != final


def is_made(place: Path, document: Mapping[str, Any]) -> bool:
    """Whether a step is there already; RecipeError where another one is."""
    mark = _mark(place)
    if not (mark.is_file() and place.is_dir()):
        return False
    if json.loads(mark.read_bytes()) != json.loads(json.dumps(document)):
        raise RecipeError(f"{place} holds the result of another recipe; remove it, or name another output")
    return True


def mark_made(place: Path, document: Mapping[str, Any]) -> None:
    """Note beside a step of which recipe it is."""
    write_text(_mark(place), json.dumps(document))


def _mark(place: Path) -> Path:
    return place.with_name(f"{place.name}.recipe.json")


def _made(names: Sequence[Any], waiting: Mapping[int, Any]) -> set[Any]:
    return {name for i, name in enumerate(names) if i not in waiting}


def _needs(value: Any, places: Mapping[Any, Path]) -> set[Any]:
    """The names of steps that a recipe has among its models."""
    if isinstance(value, Mapping):
        return {name for key, each in value.items() if key != NAME for name in _needs(each, places)}
    if isinstance(value, list):
        return {name for each in value for name in _needs(each, places)}
    name = value.split("+")[0] if isinstance(value, str) else None
    return {name} & places.keys()


def _placed(value: Any, places: Mapping[Any, Path]) -> Any:
    """The recipe with the folders of steps in place of their names."""
    if isinstance(value, Mapping):
        return {key: _placed(each, places) for key, each in value.items()}
    if isinstance(value, list):
        return [_placed(each, places) for each in value]
    if isinstance(value, str):
        name, plus, lora = value.partition("+")
        return f"{places[name]}{plus}{lora}" if name in places else value
    return value
