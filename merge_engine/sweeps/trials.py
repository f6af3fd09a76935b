"""The merges of a sweep or a pool: their recipes, and readable names for their folders.

A sweep is a grid, {field of the recipe: values}. A pool is a list of merges over named adapters. Both become `Trial`s.
"""

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

from merge_engine.errors import RecipeError
from merge_engine.rules.guesses import WORDS, did_you_mean, fields_of, word
from merge_engine.rules.methods import looks_at, refuses
from merge_engine.rules.recipe import Recipe
from merge_engine.rules.rule import make_rule

MOST = 20_000  # combinations of a sweep
LONGEST = 40  # letters of a value in a folder's name; longer values, and tables, are named by their CRC-32


@dataclass(frozen=True)
class Trial:
    """One merge of several.

    name: of its folder. varied: the fields by which it differs from the others, in the order of the table's columns.
    recipe: all fields of its recipe that are given. adapters: numbers of those it merges, in this order.
    """

    name: str
    varied: dict[str, Any]
    recipe: dict[str, Any]
    adapters: tuple[int, ...]


def parse_axes(texts: Sequence[str]) -> dict[str, list[Any]]:
    """density=0.1,0.2 weights=2:1:1,1:1:1 -> {"density": [0.1, 0.2], "weights": [[2, 1, 1], [1, 1, 1]]}.

    Commas separate values. Colons separate the numbers of a value that is a list, with one number for each adapter.
    """
    axes: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        field = name.replace("-", "_")
        if not equals or not all(values.split(",")):
            raise RecipeError(f"sweep: wanted FIELD=VALUE,VALUE as density=0.1,0.2, got {text!r}")
        if field in axes:
            raise RecipeError(f"sweep: wanted each field once, got {field} twice")
        axes[field] = [_parsed(value) for value in values.split(",")]
    return axes


def sweep_trials(axes: Any, fixed: Mapping[str, Any], adapters: int) -> list[Trial]:
    """Every combination of the axes' values, in their order; the last axis changes fastest.

    A swept field that the method of a combination does not use (density, in linear) is left out of it, and so is gain
    where the scale is a number; of combinations that are equal then, only one is merged. In a sweep over methods, a
    field with one value is left out where the method would refuse it.
    Raises RecipeError for unknown fields and wrong values.
    """
    known = [field.name for field in fields(Recipe)]
    if not isinstance(axes, Mapping) or not axes:
        raise RecipeError(f"sweep: wanted a table of fields and their values, got {axes!r}")
    fixed = fields_of(fixed)
    for field, values in axes.items():
        if field not in known:
            raise RecipeError(f"sweep: wanted one of {', '.join(known)}, got {field!r}{did_you_mean(field, known)}")
        if field in fixed:
            raise RecipeError(f"{field}: wanted one value of it, or several in the sweep, got both")
        if not isinstance(values, list) or not values:
            raise RecipeError(f"sweep: {field}: wanted a list of values, got {values!r}")
    axes = {
        field: [word(field, value) for value in values] if field in WORDS else values for field, values in axes.items()
    }
    count = math.prod(len(values) for values in axes.values())
    if count > MOST:
        raise RecipeError(f"sweep: wanted at most {MOST} combinations, got {count}")
    trials: dict[str, Trial] = {}
    for values in product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        method = point.get("method", fixed.get("method", Recipe.method))
        make_rule(str(method))  # raises RecipeError for an unknown method
        automatic = point.get("scale", fixed.get("scale")) == "auto"
        varied = {
            field: value for field, value in point.items() if looks_at(method, field) and (automatic or field != "gain")
        }
        shared = {field: value for field, value in fixed.items() if "method" not in axes or not refuses(method, field)}
        recipe = {**shared, **varied}
        Recipe.from_mapping(recipe)
        trial = Trial(_name(varied) or method, varied, recipe, tuple(range(adapters)))
        if trials.setdefault(trial.name, trial).varied != varied:
            raise RecipeError(f"sweep: {varied} and {trials[trial.name].varied} are both named {trial.name}")
    return list(trials.values())


def pool_trials(
    merges: Any, adapters: Mapping[str, Any] | Sequence[Any], fixed: Mapping[str, Any]
) -> tuple[list[str], list[Trial]]:
    """(the sources of the adapters, a trial for each merge of a list).

    merges: tables with a name, optionally adapters (a list of names; default: all), and fields of the recipe, which
        override those of `fixed`.
    adapters: {name: folder or hub id}, or a list of folders or hub ids, whose last part is the name then.
    Raises RecipeError for names that are missing, unknown or ambiguous, and for mistakes in a recipe.
    """
    if isinstance(adapters, Mapping):
        sources, names = [str(source) for source in adapters.values()], [str(name) for name in adapters]
    else:
        sources = [str(source) for source in adapters]
        names = [Path(source).name for source in sources]
    if not isinstance(merges, list) or not merges:
        raise RecipeError(f"merges: wanted a list of merges, got {merges!r}")
    trials: dict[str, Trial] = {}
    for number, merge in enumerate(merges, 1):
        if not isinstance(merge, Mapping) or not _is_folder_name(merge.get("name")):
            raise RecipeError(f"merges: wanted a table with the name of a folder as entry {number}, got {merge!r}")
        given = {str(key): value for key, value in merge.items() if key not in ("name", "adapters")}
        everyone = tuple(range(len(names)))
        chosen = _chosen(merge["name"], merge["adapters"], names) if "adapters" in merge else everyone
        recipe = {**fixed, **given}
        try:
            Recipe.from_mapping(recipe)
        except RecipeError as error:
            raise RecipeError(f"merges: {merge['name']}: {error}") from error
        if merge["name"] in trials:
            raise RecipeError(f"merges: wanted each name once, got {merge['name']} twice")
        varied = {"adapters": "+".join(names[place] for place in chosen), **given}
        trials[merge["name"]] = Trial(merge["name"], varied, recipe, chosen)
    return sources, list(trials.values())


def text_of(value: Any) -> str:
    """A value as in the sweep's syntax: 0.2, true, none, 2:1:1; a table as JSON."""
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    if isinstance(value, float):
        return repr(float(value)).removesuffix(".0")
    if isinstance(value, list | tuple):
        return ":".join(map(text_of, value))
    return json.dumps(value) if isinstance(value, Mapping) else str(value)


def _parsed(text: str) -> Any:
    if ":" in text:
        return [_parsed(part) for part in text.split(":")]
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return {"true": True, "false": False, "none": None}.get(text, text)


def _name(varied: Mapping[str, Any]) -> str:
    """ties,density=0.1,scale=0.5: the method first, then the fields in the order of the axes."""
    parts = [varied["method"]] if "method" in varied else []
    for field, value in varied.items():
        if field != "method":
            text = text_of(value)
            if isinstance(value, Mapping) or len(text) > LONGEST:
                text = f"{zlib.crc32(text.encode()):08x}"
            parts.append(f"{field}={text.replace(':', '_')}")
    return ",".join(parts)


def _is_folder_name(name: Any) -> bool:
    return isinstance(name, str) and name != "" and Path(name).name == name and not name.startswith(".")


def _chosen(merge: str, wanted: Any, names: Sequence[str]) -> tuple[int, ...]:
    if not isinstance(wanted, list) or not wanted:
        raise RecipeError(f"merges: {merge}: adapters: wanted a list of names, got {wanted!r}")
    places: list[int] = []
    for each in wanted:
        found = [place for place, name in enumerate(names) if name == str(each)]
        if len(found) != 1:
            several = f", the name of {len(found)}" if found else ""
            raise RecipeError(f"merges: {merge}: adapters: wanted one of {', '.join(names)}, got {each!r}{several}")
        places.extend(found)
    return tuple(places)


def number_of(value: Any) -> float | None:
    """The value as a float if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
