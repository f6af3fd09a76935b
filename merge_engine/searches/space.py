"""What a search varies: fields of a recipe, one weight for each adapter, and how trials become recipes."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from merge_engine.errors import RecipeError
from merge_engine.rules.methods import METHODS, looks_at, refuses
from merge_engine.rules.recipe import Recipe

Span = tuple[float, float]  # the lowest and the highest value of a number
Values = dict[str, Any]  # of the parameters of a trial: "method", "gain", "weight of sql" and so on

WIDE = 4.0  # a span is searched by ratio where its end is so many times its start
DEFAULT: dict[str, Any] = {
    "method": ["linear", "tsv", "actmat"],
    "weights": (0.5, 2.0),
    "gain": (0.7, 2.0),
    "ridge": (0.1, 10.0),
    "density": (0.1, 0.9),
}
KINDS = "kinds"  # groups of this name: the modules of each kind
OF_KINDS: dict[str, Any] = {"method": ["tsv"], "gain": (0.5, 4.0)}  # what is varied with them
MOST_KINDS = 32
SOBER = ("linear", "tsv", "actmat")  # the first trials: these with scale="auto" and every weight 1
_PLAIN = {"weights": 1.0, "gain": 1.0, "scale": 1.0, "ridge": 1.0, "density": 0.2}
_LAYER = re.compile(r"\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Space:
    """The parameters of a search over some adapters.

    varied: {field of a recipe: a list of values, or (lowest, highest)}. fixed: fields that all trials have.
    adapters: their names. groups: {name of a group of layers: its modules}; with none, weights count everywhere.
    kinds: of modules, by the ends of their names, that have a gain of their own; with none, one gain counts everywhere.
    """

    varied: Mapping[str, Any]
    fixed: Mapping[str, Any]
    adapters: tuple[str, ...]
    groups: Mapping[str, Sequence[str]]
    kinds: tuple[str, ...] = ()

    def suggest(self, span: Callable[[str, float, float, bool], float], one_of: Callable[..., Any]) -> Values:
        """The values of one trial; span(name, low, high, by ratio) and one_of(name, choices) draw them."""
        values: Values = {}

        def draw(name: str, over: Any) -> None:
            if isinstance(over, tuple):
                values[name] = span(name, over[0], over[1], 0 < over[0] and over[1] >= WIDE * over[0])
            else:
                values[name] = one_of(name, over)

        if "method" in self.varied:
            draw("method", self.varied["method"])
        method = self._method(values)
        for field, over in self.varied.items():
            if field == "weights":
                for name in self._weights():
                    draw(name, over)
            elif field == "gain" and self.kinds and self._counts(method, field):
                for kind in self.kinds:
                    draw(_gain(kind), over)
            elif field != "method" and self._counts(method, field):
                draw(field, over)
        return values

    def recipe(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of the recipe that a trial's values stand for."""
        method = self._method(values)
        recipe = {name: value for name, value in self.fixed.items() if not refuses(method, name)}
        recipe["method"] = method
        if self.automatic:
            recipe["scale"] = "auto"
        recipe |= {name: value for name, value in values.items() if name in self.varied}
        if "gain" in self.varied and self.kinds and self._counts(method, "gain"):
            recipe["gain"] = {re.escape(kind): values[_gain(kind)] for kind in self.kinds}
        if "weights" not in self.varied:
            return recipe
        if not self.groups:
            return recipe | {"weights": [values[name] for name in self._weights()]}
        tables: dict[str, list[float]] = {}
        for group, modules in self.groups.items():
            weights = [values[_weight(adapter, group)] for adapter in self.adapters]
            tables |= {module: weights for module in modules}
        return recipe | {"module_weights": tables}

    def sober(self) -> list[Values]:
        """The values of the first trials: the defaults that the README names, as far as they are in this space.

        With gains of kinds, one trial more has the middle of every span: the same gain for all.
        """
        methods = self.varied.get("method", [self.fixed.get("method", Recipe.method)])
        first = [method for method in SOBER if method in methods] or list(methods[:1])
        trials = [self.suggest(self._plain, self._first(method)) for method in first]
        return [*trials, self.suggest(_middle, self._first(first[-1]))] if self.kinds else trials

    @property
    def automatic(self) -> bool:
        """Whether the scale is "auto": unless it is varied or given."""
        return "scale" not in self.varied and "scale" not in self.fixed

    def describe(self) -> dict[str, Any]:
        """Plain data that tells two spaces apart."""
        varied = {
            name: list(over) if isinstance(over, tuple) else {"of": list(over)} for name, over in self.varied.items()
        }
        return {
            "varied": varied,
            "fixed": dict(self.fixed),
            "groups": {name: len(m) for name, m in self.groups.items()},
        } | ({"kinds": list(self.kinds)} if self.kinds else {})

    def _method(self, values: Mapping[str, Any]) -> str:
        return str(values.get("method", self.fixed.get("method", Recipe.method)))

    def _counts(self, method: str, field: str) -> bool:
        """Whether a field has an effect; the gain has one with an automatic scale only."""
        automatic = self.automatic or self.fixed.get("scale") == "auto"
        return looks_at(method, field) and (automatic or field != "gain")

    def _weights(self) -> list[str]:
        groups: list[str | None] = [*self.groups] or [None]
        return [_weight(adapter, group) for group in groups for adapter in self.adapters]

    def _plain(self, name: str, low: float, high: float, _: bool) -> float:
        field = next((field for field in ("weights", "gain") if name.startswith(f"{field.rstrip('s')} of ")), name)
        return min(max(_PLAIN.get(field, low), low), high)

    @staticmethod
    def _first(method: str) -> Callable[..., Any]:
        return lambda name, choices: method if name == "method" else choices[0]


def make_space(
    varied: Mapping[str, Any] | None,
    fixed: Mapping[str, Any],
    adapters: Sequence[str],
    modules: Sequence[str],
    groups: int | str = 1,
) -> Space:
    """The space of a search. varied: None for `DEFAULT`, without what is fixed and what no method looks at.

    groups: how many groups of successive layers have weights of their own; or "kinds": each kind of module has a gain
        of its own, and `OF_KINDS` is the default.
    Raises RecipeError for unknown fields, spans that are none, and values that no recipe takes.
    """
    if groups != KINDS and (isinstance(groups, bool) or not isinstance(groups, int) or groups < 1):
        raise RecipeError(f"groups: wanted {KINDS!r}, or a whole number of at least 1, got {groups!r}")
    default = OF_KINDS if groups == KINDS else DEFAULT
    over = dict(varied) if varied is not None else {name: each for name, each in default.items() if name not in fixed}
    if varied is None and "scale" in fixed and fixed["scale"] != "auto":
        over.pop("gain", None)
    known = [field.name for field in fields(Recipe) if field.name not in ("module_weights", "module_densities")]
    for name in over:
        if name not in known:
            raise RecipeError(f"space: wanted one of {', '.join(known)}, got {name!r}")
        if name in fixed:
            raise RecipeError(f"{name}: wanted one value of it, or several in the space, got both")
        over[name] = _checked(name, over[name])
    if not over:
        raise RecipeError("space: wanted a field to vary, got none")
    methods = over.get("method", [fixed.get("method", Recipe.method)])
    for method in methods:
        if method not in METHODS:
            raise RecipeError(f"method: wanted one of {', '.join(METHODS)}, got {method!r}")
    over = {name: each for name, each in over.items() if any(looks_at(method, name) for method in methods)}
    kinds = _kinds(modules, over) if groups == KINDS else ()
    parts = _groups(modules, groups) if isinstance(groups, int) and "weights" in over else {}
    space = Space(over, dict(fixed), _unique(adapters), parts, kinds)
    for values in space.sober():
        Recipe.from_mapping(space.recipe(values))
    for end in (0, -1):  # a span's ends, too, must be values that a recipe takes
        Recipe.from_mapping(space.recipe(space.suggest(partial(_end_of_span, end), partial(_end_of_choices, end))))
    return space


def parse_space(texts: Sequence[str]) -> dict[str, Any]:
    """["method=tsv,linear", "gain=0.5..2"] -> {"method": ["tsv", "linear"], "gain": (0.5, 2.0)}."""
    from merge_engine.sweeps.trials import parse_axes

    found: dict[str, Any] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        low, dots, high = values.partition("..")
        field = name.replace("-", "_")
        if field in found:
            raise RecipeError(f"vary: wanted each field once, got {field} twice")
        if not equals or not values:
            raise RecipeError(f"vary: wanted FIELD=LOW..HIGH or FIELD=VALUE,VALUE, got {text!r}")
        if dots:
            try:
                found[field] = (float(low), float(high))
            except ValueError:
                raise RecipeError(f"vary: wanted FIELD=LOW..HIGH with two numbers, got {text!r}") from None
        else:
            found |= parse_axes([text])
    return found


def _middle(name: str, low: float, high: float, by_ratio: bool) -> float:
    return math.sqrt(low * high) if by_ratio else (low + high) / 2


def _end_of_span(end: int, name: str, low: float, high: float, by_ratio: bool) -> float:
    return (low, high)[end]


def _end_of_choices(end: int, name: str, choices: Sequence[Any]) -> Any:
    return choices[end]


def _checked(name: str, over: Any) -> Any:
    if isinstance(over, tuple):
        numbers = [isinstance(end, int | float) and not isinstance(end, bool) and math.isfinite(end) for end in over]
        if len(over) != 2 or not all(numbers) or over[0] >= over[1]:
            raise RecipeError(f"space: {name}: wanted (lowest, highest), got {over!r}")
        return float(over[0]), float(over[1])
    if not isinstance(over, list) or not over:
        raise RecipeError(f"space: {name}: wanted a list of values or (lowest, highest), got {over!r}")
    if not all(value is None or isinstance(value, str | int | float | bool) for value in over):
        raise RecipeError(f"space: {name}: wanted plain values, got {over!r}")
    return over


def _kinds(modules: Sequence[str], over: Mapping[str, Any]) -> tuple[str, ...]:
    """The ends of the modules' names, from the last part that is no number: q_proj, to_out.0."""
    if "gain" not in over:
        raise RecipeError(f"groups: {KINDS} have gains of their own, wanted a span of gain, got none")
    kinds = sorted(set(map(_kind, modules)))
    if len(kinds) > MOST_KINDS:
        raise RecipeError(f"groups: wanted modules of up to {MOST_KINDS} kinds, got {len(kinds)}, as {kinds[0]}")
    return tuple(kinds)


def _groups(modules: Sequence[str], count: int) -> dict[str, list[str]]:
    """Modules by successive layers, in `count` groups of nearly equal numbers of layers; those without one alone."""
    if count == 1:
        return {}
    layers: dict[int, list[str]] = {}
    others: list[str] = []
    for module in modules:
        found = _LAYER.search(module)
        (layers.setdefault(int(found[1]), []) if found else others).append(module)
    if len(layers) < count:
        raise RecipeError(f"groups: wanted at most {len(layers)}, as many as there are layers, got {count}")
    order = sorted(layers)
    groups: dict[str, list[str]] = {}
    for number in range(count):
        part = order[number * len(order) // count : (number + 1) * len(order) // count]
        groups[f"layers {part[0]}-{part[-1]}"] = [module for layer in part for module in layers[layer]]
    return groups | ({"other modules": others} if others else {})


def _weight(adapter: str, group: str | None) -> str:
    return f"weight of {adapter}" + (f" in {group}" if group else "")


def _kind(module: str) -> str:
    parts = module.split(".")
    last = max((place for place, part in enumerate(parts) if not part.isdecimal()), default=0)
    return ".".join(parts[last:])


def _gain(kind: str) -> str:
    return f"gain of {kind}"


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    """The names; of several with one name, with their numbers."""
    return tuple(name if names.count(name) == 1 else f"{name} #{number}" for number, name in enumerate(names, 1))
