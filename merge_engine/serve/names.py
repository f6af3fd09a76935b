"""Names of merges: ``merge:sql*2+chat@ties,density=0.2`` is sql with weight 2 and chat, merged by ties.

A name holds names of adapters, never paths or hub ids, and numbers within limits: it may come from a stranger.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_engine.errors import RecipeError, some
from merge_engine.rules.methods import METHODS
from merge_engine.rules.recipe import Recipe

PREFIX = "merge:"
LONGEST, MOST, LARGEST_WEIGHT = 512, 16, 100.0  # letters of a name, adapters, and a weight
_ADAPTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class Wanted:
    """A merge that was asked for. recipe: the fields of `Recipe` that were given, without weights."""

    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    recipe: tuple[tuple[str, Any], ...]

    def fields(self) -> dict[str, Any]:
        """The fields of the recipe, with weights."""
        return {**dict(self.recipe), "weights": list(self.weights)}

    @property
    def name(self) -> str:
        """The name in one form: equal requests have equal names."""
        parts = [a if w == 1 else f"{a}*{w!r}" for a, w in zip(self.adapters, self.weights, strict=True)]
        options = dict(self.recipe)
        method = options.pop("method", Recipe.method)
        return f"{PREFIX}{'+'.join(parts)}@{','.join([method, *(f'{k}={v}' for k, v in sorted(options.items()))])}"


def parse_name(name: str) -> Wanted:
    """The merge that a name asks for. Raises RecipeError where it is none, or beyond the limits."""
    if not isinstance(name, str) or not name.startswith(PREFIX) or len(name) > LONGEST:
        raise RecipeError(f"name: wanted {PREFIX}A+B@METHOD of up to {LONGEST} letters, got {_shown(name)}")
    adapters, at, options = name[len(PREFIX) :].partition("@")
    names, weights = [], []
    for part in adapters.split("+"):
        adapter, star, weight = part.partition("*")
        names.append(adapter)
        weights.append(_number("weight", weight) if star else 1.0)
    fields: dict[str, Any] = {}
    method, *rest = options.split(",") if at else [""]
    if method:
        fields["method"] = method
    for option in rest:
        field, equals, value = option.partition("=")
        if not equals or field in fields:
            raise RecipeError(f"name: wanted each option once as FIELD=VALUE, got {_shown(option)}")
        fields[field] = value
    return wanted_of(names, weights, fields)


def wanted_of(adapters: Any, weights: Any, fields: Mapping[str, Any]) -> Wanted:
    """A request from its parts, checked. Raises RecipeError for what no name may hold."""
    if not isinstance(adapters, Sequence) or isinstance(adapters, str) or not 1 <= len(adapters) <= MOST:
        raise RecipeError(f"adapters: wanted 1 to {MOST} names, got {_shown(adapters)}")
    for adapter in adapters:
        if not isinstance(adapter, str) or not _ADAPTER.fullmatch(adapter):
            raise RecipeError(f"adapters: wanted a name of letters, digits, dots, - and _, got {_shown(adapter)}")
    if len(set(adapters)) < len(adapters):
        raise RecipeError("adapters: wanted each name once")
    given = [1.0] * len(adapters) if weights is None else weights
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != len(adapters):
        raise RecipeError(f"weights: wanted {some(len(adapters), 'number')}, got {_shown(weights)}")
    numbers = tuple(_number("weight", weight) for weight in given)
    for number in numbers:
        if abs(number) > LARGEST_WEIGHT:
            raise RecipeError(f"weights: wanted numbers up to {LARGEST_WEIGHT:g}, got {number:g}")
    recipe: dict[str, Any] = {}
    for field, value in fields.items():
        if field not in _FIELDS:
            raise RecipeError(f"name: wanted options of {', '.join(_FIELDS)}, got {_shown(field)}")
        recipe[field] = _FIELDS[field](field, value)
    Recipe.from_mapping({**recipe, "weights": list(numbers)})
    return Wanted(tuple(adapters), numbers, tuple(sorted(recipe.items())))


def _number(field: str, value: Any) -> float:
    text = value if isinstance(value, str) else None
    if text is not None and not _NUMBER.fullmatch(text):
        raise RecipeError(f"{field}: wanted a number, got {_shown(value)}")
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not math.isfinite(float(value)):
        raise RecipeError(f"{field}: wanted a finite number, got {_shown(value)}")
    return float(value)


def _bounded(low: float, high: float) -> Callable[[str, Any], float]:
    def parse(field: str, value: Any) -> float:
        number = _number(field, value)
        if not low <= number <= high:
            raise RecipeError(f"{field}: wanted a number from {low:g} to {high:g}, got {number:g}")
        return number

    return parse


def _scale(field: str, value: Any) -> float | str:
    return "auto" if value == "auto" else _bounded(-LARGEST_WEIGHT, LARGEST_WEIGHT)(field, value)


def _whole(field: str, value: Any) -> int:
    number = _bounded(0 if field == "seed" else 1, 2**32 if field == "seed" else 4096)(field, value)
    if number != int(number):
        raise RecipeError(f"{field}: wanted a whole number, got {number:g}")
    return int(number)


def _method(field: str, value: Any) -> str:
    if not isinstance(value, str) or value not in METHODS:
        raise RecipeError(f"method: wanted one of {', '.join(METHODS)}, got {_shown(value)}")
    return value


_FIELDS: dict[str, Callable[[str, Any], Any]] = {
    "method": _method,
    "density": _bounded(0.0, 1.0),
    "scale": _scale,
    "gain": _bounded(-LARGEST_WEIGHT, LARGEST_WEIGHT),
    "ridge": _bounded(0.0, 1e6),
    "rank": _whole,
    "seed": _whole,
}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
