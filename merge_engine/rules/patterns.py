"""Patterns of module names, as in PEFT's rank_pattern; and weights that an adapter has in the modules that match one.

A pattern matches a whole name, its end after a dot, or, of kohya's names, which have no dots, all after the prefix:
``down_blocks.*`` matches "unet.down_blocks.0.attn" and "lora_unet_down_blocks_0_attn".
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

from merge_engine.errors import RecipeError
from merge_engine.rules.matching import Pattern

_BEFORE = r"(.*\.|lora_(prior_)?[a-z]+\d?_+|lycoris_)?"
T = TypeVar("T")
BlockWeights = Mapping[str, Mapping[str, float]]  # {adapter: {pattern: weight}}


def compiled(field: str, pattern: Any) -> Pattern:
    """The pattern; RecipeError, which names the field, where it is none."""
    if not isinstance(pattern, str):
        raise RecipeError(f"{field}: wanted a pattern of module names, got {pattern!r}")
    return _compiled(field, pattern)


@cache
def _compiled(field: str, pattern: str) -> Pattern:
    return Pattern(_BEFORE, pattern, f"{field}: pattern {pattern[:100]!r}", RecipeError)


def first_match(field: str, table: Mapping[str, T], module: str) -> T:
    """The value of the first pattern that matches the module. Raises RecipeError, which names the field, for none."""
    for pattern, value in table.items():
        if compiled(field, pattern).match(module):
            return value
    raise RecipeError(f"{field}: no pattern of {', '.join(table)} matches {module}; '.*' matches the rest")


def block_tables(given: Any) -> dict[str, dict[str, Any]] | None:
    """``block_weights`` as plain tables, their patterns checked; RecipeError where they are none."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise RecipeError(f"block_weights: wanted a table of adapters, got {given!r}")
    tables = {}
    for adapter, table in given.items():
        if not isinstance(table, Mapping) or not table:
            raise RecipeError(f"block_weights: {adapter}: wanted a table of patterns and numbers, got {table!r}")
        for pattern in table:
            compiled(f"block_weights: {adapter}", pattern)
        tables[str(adapter)] = dict(table)
    return tables


def in_blocks(
    tables: BlockWeights, weights: Sequence[float], adapters: Sequence[str], module: str
) -> tuple[float, ...]:
    """The weights in one module: for each adapter that of the first of its patterns that matches, else its own."""
    found = list(weights)
    for adapter, table in tables.items():
        number = _number(adapter, adapters)
        for pattern, weight in table.items():
            if compiled(f"block_weights: {adapter}", pattern).match(module):
                found[number] = weight
                break
    return tuple(found)


def check_blocks(tables: BlockWeights, adapters: Sequence[str], modules: Sequence[Iterable[str]]) -> None:
    """Raise RecipeError for an adapter that is not merged, or a pattern that matches none of its modules."""
    for adapter, table in tables.items():
        own = sorted(modules[_number(adapter, adapters)])
        for pattern in table:
            if not any(compiled(f"block_weights: {adapter}", pattern).match(name) for name in own):
                some = f", as {own[0]}" if own else ""
                raise RecipeError(
                    f"block_weights: {pattern!r} matches no module of {adapter}; wanted one of them{some}"
                )


def _number(adapter: str, adapters: Sequence[str]) -> int:
    """Which of the adapters is meant: by its name, or its number from 0."""
    numbers = [number for number, name in enumerate(adapters) if name == adapter]
    if not numbers and adapter.isdecimal() and int(adapter) < len(adapters):
        return int(adapter)
    if len(numbers) != 1:
        many = f", the name of {len(numbers)}" if numbers else ""
        names = ", ".join(adapters)
        raise RecipeError(
            f"block_weights: wanted one of {names}, or a number below {len(adapters)}, got {adapter!r}{many}"
        )
    return numbers[0]
