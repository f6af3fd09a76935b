"""merge-models by the methods of whole tensors: the options, as a recipe of mergekit's."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merge_engine.errors import RecipeError, some
from merge_engine.rules.choices import CHOICES
from merge_engine.rules.methods import METHODS
from merge_engine.rules.whole_methods import WHOLE_CONVENTIONS, WHOLE_METHODS, models_wanted

# Options that merge-models has for all methods, by their names in mergekit's recipes.
_SHARED = {"weight": "weights", "density": "density", "lambda": "scale", "gamma": "gamma"}
_RUN = ("seed", "shard_size", "overwrite", "dry_run", "backend")


def own_options() -> dict[str, list[str]]:
    """{option of a method that no other command has: the methods that know it}."""
    found: dict[str, list[str]] = {}
    for name, row in WHOLE_METHODS.items():
        for option in row.options:
            if option not in _SHARED and option not in ("int8_mask", "scale"):
                found.setdefault(option, []).append(name)
    return found


def whole_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each parameter of the methods of whole tensors."""
    for name, methods in own_options().items():
        option = WHOLE_METHODS[methods[0]].options[name]
        what = f"{', '.join(methods)}: as in mergekit's recipes; default: {_defaults(name, methods)}"
        flag = f"--{name.replace('_', '-')}"
        if option.kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=what)
        else:
            parser.add_argument(flag, type=option.kind, metavar="X", help=what)


def _defaults(name: str, methods: Sequence[str]) -> str:
    """The default of an option, or those that methods have: 0.15 (della, della_linear), 1e-05 (ram, ramplus_tl)."""
    found: dict[str, list[str]] = {}
    for method in methods:
        found.setdefault(str(WHOLE_METHODS[method].options[name].default).lower(), []).append(method)
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(f"{default} ({', '.join(having)})" for default, having in found.items())


def whole_text() -> str:
    """The methods that only whole tensors have, a line each, for the end of a help text."""
    rows = {name: row for name, row in WHOLE_METHODS.items() if not is_elementwise(name)}
    width = max(map(len, rows))
    lines = [f"  {name:{width}}  {row.summary} ({models_wanted(name)})" for name, row in rows.items()]
    return "\n".join(["", "methods of whole tensors, for full models (--base where it says so):", *lines, ""])


def conventions_text() -> str:
    """Which methods have which conventions, for the help text of the option."""
    tables = (CHOICES["convention"], WHOLE_CONVENTIONS)
    engine, whole = (_joined([f"{default} (default)", *others], "or") for default, *others in tables)
    return f"whose arithmetic to follow: {engine}; of methods of whole tensors, and without --base: {whole}"


def check_convention(given: dict[str, Any]) -> None:
    """Raise RecipeError for a convention that the merge asked for does not have."""
    whole, method = is_whole(given), given.get("method", "ties")
    known = WHOLE_CONVENTIONS if whole else CHOICES["convention"]
    if given.get("convention", known[0]) not in known:
        side = f" {'without' if whole else 'with'} --base" if is_elementwise(method) else ""
        raise RecipeError(f"convention: {method}{side} has {_joined(known, 'and')}, got {given['convention']!r}")


def _joined(words: Sequence[str], last: str) -> str:
    """a, b or c."""
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


def is_elementwise(method: str) -> bool:
    """Whether the engine for adapters and full models merges by this method."""
    return method in METHODS and METHODS[method].kind == "elementwise"


def is_whole(given: dict[str, Any]) -> bool:
    """Whether the options ask for a merge of whole tensors: by their method, or since there is no base."""
    method = given.get("method", "ties")
    return method in WHOLE_METHODS and (not is_elementwise(method) or "base" not in given)


def merge_whole(given: dict[str, Any], output: Any) -> Any:
    """Carry out the options as a recipe; the method as published, unless another convention is asked for."""
    from merge_engine.mergekit.recipe import merge_recipe

    run = {key: given.pop(key) for key in _RUN if key in given}
    given.setdefault("method", "ties")
    convention = given.pop("convention", WHOLE_CONVENTIONS[0])
    return merge_recipe(recipe_of(given), output, convention=convention, **run)


def recipe_of(given: dict[str, Any]) -> dict[str, Any]:
    """The recipe that the options say. Raises RecipeError where there is no base, or a method lacks an option."""
    method, models = given.pop("method"), [str(model) for model in given.pop("models")]
    row, base = WHOLE_METHODS[method], given.pop("base", None)
    if base is None and row.base == "needed" and row.most == 2:
        base = models[0]  # one end of what is between two models
    if base is None and row.base == "needed":
        least = max(row.least - 1, 1)
        raise RecipeError(
            f"base: {method} takes changes of a base, and at least {least} of them; wanted --base, got none"
        )
    recipe: dict[str, Any] = {"merge_method": method} | ({"base_model": base} if base is not None else {})
    weights = given.pop("weights", None) if "weight" in row.options else None
    densities = given.pop("density", None) if "density" in row.options else None
    entries: list[dict[str, Any]] = []
    others = [model for model in models if model != base or row.base == "none"]
    if not others:
        raise RecipeError(f"models: {method} takes {models_wanted(method)}, got none besides {base}")
    for number, model in enumerate(others):
        own: dict[str, Any] = {}
        for name, values, default in (("weight", weights, 1.0), ("density", densities, None)):
            if name in row.options and (values is not None or default is not None):
                own[name] = _of(name, values, number, len(others), default)
        entries.append({"model": _named(model, base)} | ({"parameters": own} if own else {}))
    recipe["models"] = entries
    for name, option in row.options.items():
        if option.of == "merge" and option.default is None and name not in given:
            where = f"wanted --{name} X (in a recipe file parameters: {{{name}: X}})"
            raise RecipeError(f"{name}: {method} has no default; {where}, got none")
    for name, key in (("dtype", "out_dtype"), ("vocab", "tokenizer_source")):
        if name in given:
            recipe[key] = given.pop(name)
    if recipe.get("tokenizer_source") == "base":
        del recipe["tokenizer_source"]  # the rows as they are
    parameters = {name: given.pop(key) for name, key in _SHARED.items() if key in given and name in row.options}
    parameters |= {name: given.pop(name) for name in list(given) if name in row.options}
    for name in given:
        known = [other for other, each in WHOLE_METHODS.items() if name in each.options]
        hint = f"; it belongs to {', '.join(known)}" if known else ""
        raise RecipeError(f"{name}: {method} does not know it{hint}")
    return recipe | ({"parameters": parameters} if parameters else {})


def _of(name: str, values: Any, number: int, count: int, default: float | None) -> Any:
    """The value of one model: of a list, or the one for all."""
    if values is None:
        return default
    if not isinstance(values, list):
        return values
    if len(values) == 1:
        return values[0]
    if len(values) != count:
        wanted = f"{'1 or ' * (count > 1)}{some(count, 'number')}, one for each model but the base"
        raise RecipeError(f"{name}: wanted {wanted}, got {len(values)}")
    return values[number]


def _named(model: str, base: str | None) -> str:
    """The model, or the base with an adapter on it."""
    if not os.path.isfile(Path(os.path.expanduser(model)) / "adapter_config.json"):
        return model
    if base is None:
        raise RecipeError(f"base: {model} is an adapter; wanted the model that it is on (--base), got none")
    return f"{base}+{model}"
