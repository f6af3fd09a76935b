"""Reads the parts of mergekit's YAML: tables, names of models, and settings of parameters; errors name file and key."""

import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from merge_engine.errors import RecipeError
from merge_engine.rules.whole_methods import WHOLE_METHODS, Option

logger = logging.getLogger(__name__)
INERT = "int8_mask"  # the dtype of mergekit's masks, which changes no result
PARAMETERS: dict[str, Option] = {
    name: option for row in reversed(WHOLE_METHODS.values()) for name, option in row.options.items()
}
_ALIKE = 0.75  # from this similarity on, an unknown key is taken for a misspelt one


class Clause(NamedTuple):
    """A parameter's value, or gradient over the layers, in the tensors whose name contains the filter."""

    filter: str | None  # None and "*" are for every tensor
    values: tuple[float | bool, ...]

    def at(self, depth: float) -> float | bool | None:
        """The value at a depth from 0 (first layer) to 1 (last): interpolated; for switches the lower neighbour."""
        if not self.values:
            return None
        place = depth * (len(self.values) - 1)
        low = int(place)
        high, share = min(low + 1, len(self.values) - 1), place - low
        if isinstance(self.values[0], bool):
            return self.values[low]
        return (1 - share) * self.values[low] + share * self.values[high]


Parameters = Mapping[str, Sequence[Clause]]


@dataclass(frozen=True)
class Reference:
    """A model by name, as mergekit writes it: ``path`` or ``path@revision``, and ``+lora`` after it for an adapter."""

    path: str
    revision: str | None = None
    lora: "Reference | None" = None

    def __str__(self) -> str:
        name = self.path if self.revision is None else f"{self.path}@{self.revision}"
        return name if self.lora is None else f"{name}+{self.lora}"

    @property
    def full(self) -> "Reference":
        """The model without its adapter."""
        return replace(self, lora=None)

    @property
    def place(self) -> tuple[str, str | None]:
        """The same for all names of one full model."""
        folder = Path(os.path.expanduser(self.path))
        return (str(folder.resolve()) if folder.exists() else self.path), self.revision


def first_value(scopes: Sequence[Parameters], name: str, tensor: str, depth: float, default: Any = None) -> Any:
    """The value in the first scope that has one for the tensor: of its clauses the first whose filter fits."""
    for scope in scopes:
        for clause in scope.get(name, ()):
            if clause.filter is None or clause.filter == "*" or clause.filter in tensor:
                value = clause.at(depth)
                if value is not None:
                    return value
                break
    return default


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """The known word that this one is a misspelling of, if there is one."""
    return get_close_matches(word, list(known), 1, _ALIKE)


def missing(file: str, name: str, owner: str, tensor: str) -> RecipeError:
    """The error for a parameter that no scope has for the tensor. owner: the model, or the part, that lacks it."""
    way = f"set it under parameters, as parameters: {{{name}: X}}, without a filter"
    return RecipeError(f"{file}: wanted a {name} for {owner}, got none for {tensor}; {way}")


class Reader:
    """Parses the parts of a recipe; an error names the place in the file."""

    def __init__(self, file: str) -> None:
        self.file = file

    def error(self, where: str, wanted: str, got: Any) -> RecipeError:
        subject = f"{self.file}: {where}" if where else self.file
        return RecipeError(f"{subject}: wanted {wanted}, got {got!r}")

    def warn(self, subject: str, why: str, verb: str = "has") -> None:
        warnings.warn(f"{self.file}: {subject} {verb} no effect: {why}", stacklevel=2)

    def table(self, where: str, value: Any, keys: Sequence[str]) -> dict[str, Any]:
        """A table; keys that are null are left out.

        A key that mergekit does not know has no effect there, and is left out with a warning; RecipeError where it is
        nearly one of the known keys.
        """
        if not isinstance(value, Mapping):
            raise self.error(where, "a table of keys", value)
        subject = f"{where}." if where else ""
        for key in value:
            if key in keys:
                continue
            alike = nearest(str(key), keys)
            if alike:
                raise RecipeError(f"{self.file}: {subject}{key} is no key of mergekit's; did you mean {alike[0]}?")
            why = f"{key} belongs under parameters" if key in PARAMETERS else f"wanted one of {', '.join(keys)}"
            self.warn(f"{subject}{key}", why)
        return {key: each for key, each in value.items() if key in keys and each is not None}

    def strict(self, where: str, value: Any, keys: Sequence[str]) -> dict[str, Any]:
        """A table that has no other keys than these."""
        if isinstance(value, Mapping):
            for key in value:
                if key not in keys:
                    raise RecipeError(f"{self.file}: {where}: {key} is not supported; wanted one of {', '.join(keys)}")
        return self.table(where, value, keys)

    def items(self, where: str, value: Any, of: str = "") -> Iterator[tuple[str, Any]]:
        """(its place, a member) for each member of a list."""
        if not isinstance(value, list) or not value:
            raise self.error(where, f"a list{of}", value)
        return ((f"{where}[{i}]", each) for i, each in enumerate(value))

    def reference(self, where: str, value: Any) -> Reference:
        """``path``, ``path+lora``, each with ``@revision``, or the table {model: path, lora: path}."""
        if isinstance(value, Mapping):
            found = self.strict(where, value, ("model", "lora"))
            model = self.path(f"{where}.model", found.get("model"))
            return replace(model, lora=self.path(f"{where}.lora", found["lora"]) if "lora" in found else None)
        if not isinstance(value, str) or value.count("+") > 1:
            more = ", another entry for another adapter" if isinstance(value, str) else ""
            raise self.error(where, f"model or model+lora{more}", value)
        full, _, lora = value.partition("+")
        return replace(self.path(where, full), lora=self.path(where, lora) if "+" in value else None)

    def path(self, where: str, value: Any) -> Reference:
        """``path``, ``path@revision``, or the table {path: path, revision: revision}."""
        if isinstance(value, str) and value.count("@") <= 1:
            path, at, revision = value.partition("@")
            value = {"path": path, "revision": revision} if at else {"path": path}
        if not isinstance(value, Mapping):
            raise self.error(where, "a path, or path@revision", value)
        found = self.strict(where, value, ("path", "revision"))
        for text in ("path", *found):
            if not isinstance(found.get(text), str) or not found[text]:
                raise self.error(f"{where}.{text}", "a name", found.get(text))
        return Reference(found["path"].strip(), found.get("revision"))

    def parameters(self, where: str, holder: Mapping[str, Any], method: str, *, of_model: bool = False) -> Parameters:
        """The parameters of a model, a slice or the recipe: {name: clauses, of which the first that fits counts}."""
        found = {}
        options = WHOLE_METHODS[method].options
        settings = holder.get("parameters", {})
        known = self.table(where, settings, tuple(PARAMETERS))
        for name, setting in settings.items():
            if name not in known and setting is not None:
                continue  # warned of
            option = options.get(name, PARAMETERS.get(name))
            if option is None:
                continue
            found[name] = self.setting(f"{where}.{name}", option, setting)
            if name == INERT:
                logger.warning("%s: %s.%s has no effect: masks take no memory here", self.file, where, name)
            elif name not in options or name in WHOLE_METHODS[method].unused:
                self.warn(f"{where}.{name}", f"{method} does not use it")
            elif of_model and options[name].of == "merge":
                self.warn(f"{where}.{name}", "it applies to the whole merge, not to one model")
        return found

    def setting(self, where: str, option: Option, value: Any) -> list[Clause]:
        """A value, a gradient, or a table {filter: text, value: either}, or a list of such tables."""
        if isinstance(value, Mapping):
            value = [value]
        if isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
            clauses = []
            for i, each in enumerate(value):
                if not isinstance(each, Mapping):
                    raise self.error(f"{where}[{i}]", f"a table, as value: {each}", each)
                found = self.strict(f"{where}[{i}]", each, ("filter", "value"))
                if not isinstance(found.get("filter", ""), str):
                    raise self.error(f"{where}[{i}].filter", "a part of tensor names", found["filter"])
                values = self.values(f"{where}[{i}].value", option, found.get("value"))
                clauses.append(Clause(found.get("filter"), values))
            return clauses
        return [Clause(None, self.values(where, option, value))]

    def values(self, where: str, option: Option, value: Any) -> tuple[float | bool, ...]:
        convert = self.switch if option.kind is bool else self.number
        return tuple(convert(where, option, each) for each in (value if isinstance(value, list) else [value]))

    def number(self, where: str, option: Option, value: Any) -> float:
        """A finite number in the option's range; also as text, since YAML reads 1e-3 as text."""
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number) or (option.kind is int and number != int(number)):
            raise self.error(where, "a whole number" if option.kind is int else "a number", value)
        if (option.least is not None and number < option.least) or (option.most is not None and number > option.most):
            upto = f" to {option.most:g}" if option.most is not None else " up"
            raise self.error(where, f"a number from {option.least:g}{upto}", value)
        return number

    def switch(self, where: str, option: Option, value: Any) -> bool:
        text = value.strip().lower() if isinstance(value, str) else None
        if text in ("true", "yes", "on", "false", "no", "off"):
            return text in ("true", "yes", "on")
        if isinstance(value, str | list | dict) or value not in (True, False):
            raise self.error(where, "true or false", value)
        return bool(value)
