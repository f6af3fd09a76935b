"""What a user asks for: method, weights, density, space, scope, seed, rank, convention; checked when it is made."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypeGuard

import torch

from merge_engine.errors import RecipeError, some
from merge_engine.rules.choices import BALANCES, RANKS, SAVED, SPACES, WRITTEN_DTYPES
from merge_engine.rules.conventions import CONVENTIONS
from merge_engine.rules.fields import Density, Gain
from merge_engine.rules.guesses import by_name, density_hint, did_you_mean, fields_of, word
from merge_engine.rules.methods import GAMMA, MASK, METHODS, MIN_TASKS, looks_at, methods_with, refuses
from merge_engine.rules.patterns import BlockWeights, block_tables, compiled, first_match, in_blocks
from merge_engine.rules.rule import Rule, make_rule

LARGEST = torch.finfo(torch.float32).max
DEFAULT_DENSITY = 0.2  # the top 20 % of the TIES paper
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in WRITTEN_DTYPES}


@dataclass(frozen=True)
class Recipe:
    """How adapters are merged: ``scale * method(w_1 t_1, ..., w_n t_n)`` in a space, then cut to a rank.

    method: a row of `methods.METHODS`. weights: one an adapter, in order or as a table by names; 1.0 each if None.
    density: the share that a trim or a drop keeps: one number, one an adapter, or a table {module pattern: either},
        where a pattern matches as in PEFT's rank_pattern (see `patterns`), and the first match counts.
        0.2 if None; methods that keep everything do not look at it.
    space: "delta" merges the deltas B @ A; "factors" merges all A and all B apart, as PEFT's types without _svd do,
        by any elementwise method; "knots" merges the deltas' coordinates U^T delta [K, N] in the common column space U
        of all of them, and "core" U^T delta V [K, K'] in both common spaces: small matrices, and a result that is an
        exact adapter.
    scale: lambda, multiplies the result: a number, or "auto": for each module gain * mean norm of the deltas / norm of
        the merged delta before it is cut. gain: 1.0, only with scale="auto"; a number, or a table {module pattern:
        number}, as {"q_proj": 2, ".*": 1}, in which the first match counts.
    election: sign of the sum ("total"), or of the sum of signs ("frequency").
    convention: "peft", "mergekit" or "paper" (see `conventions.Convention`); scope and trim_ties override what it says.
    seed: of the random drops, 0 <= seed < 2**64.
    rank: of the result: "auto" (sum of the ranks, at most min(M, N)), or a number; energy: the smallest rank up to
        that whose kept energy |BA|^2 / |delta|^2 is at least this, or that rank where none is. energy 1 keeps every
        direction that is not rounding alone: the numerical rank of the merged delta.
    ranks: of what is written: "one": all modules have the largest rank of any of them, by rows of zeros in A and
        columns of zeros in B, as servers want it; "own": each has its own, in a rank_pattern.
    dtype: of the written factors: "float32", "float16", "bfloat16", or None for the adapters' own.
    saved: layers that adapters save whole (modules_to_save) and that differ between them: "first" takes that of the
        first adapter that has it, "average" their mean; None refuses them. What is the same in all adapters that have
        it is carried over.
    normalize: whether the mean of methods that elect is divided at all; None: as the convention says.
    gamma: of breadcrumbs: the largest elements, this share of all, are dropped before density keeps the next ones; 0.01
        by default. Fewer are dropped where gamma + density is above 1.
    mask, min_tasks: of consensus: the sum S of all ``w t`` stays where at least min_tasks adapters have
        ``|w t| > mask |S - w t|``, and is 0 elsewhere; 0.4 and 2 by default. min_tasks = 0 is linear.
    ridge: of actmat: how much of the mean eigenvalue is added to the covariances, 1.0 by default.
    balance: "pico": directions that many adapters share are damped before the merge; None: they are not.
    rescale: what random drops are made up for by: "density" (1/density), "l1" (the norm before the drop), or None: as
        the convention says.
    block_weights: {adapter's name: {module pattern: weight}}, in place of that adapter's weight in the modules that
        match, of a block for instance; the first match counts, and patterns match as those of density.
    module_weights, module_densities: tables {module: one number an adapter} by the exact name of every module; these
        weights come on top of `weights`, these densities in place of `density`.

    Raises RecipeError naming the field, what was wanted and what was got.
    """

    method: str = "ties"
    weights: tuple[float, ...] | Mapping[str, float] | None = None
    density: Density | None = None
    space: Literal["delta", "factors", "core", "knots"] = "delta"
    scale: float | Literal["auto"] = 1.0
    gain: Gain = 1.0
    election: str = "total"
    scope: str | None = None
    trim_ties: str | None = None
    convention: str = "peft"
    seed: int = 0
    rank: int | Literal["auto"] = "auto"
    energy: float | None = None
    ranks: Literal["one", "own"] = "one"
    dtype: str | None = None
    saved: Literal["average", "first"] | None = None
    normalize: bool | None = None
    rescale: Literal["density", "l1"] | None = None
    gamma: float = GAMMA
    mask: float = MASK
    min_tasks: int = MIN_TASKS
    ridge: float = 1.0
    balance: Literal["pico"] | None = None
    block_weights: BlockWeights | None = None
    module_weights: Mapping[str, Sequence[float]] | None = None
    module_densities: Mapping[str, Sequence[float]] | None = None

    def __post_init__(self) -> None:
        for name in (
            "weights",
            "density",
            "scale",
            "gain",
            "gamma",
            "mask",
            "min_tasks",
            "ridge",
            "seed",
            "rank",
            "energy",
        ):
            object.__setattr__(self, name, _plain(getattr(self, name)))
        for name in ("method", "dtype"):
            object.__setattr__(self, name, word(name, getattr(self, name)))
        rule = self.rule()
        if self.space not in SPACES:
            raise RecipeError(f"space: wanted one of {', '.join(SPACES)}, got {self.space!r}")
        object.__setattr__(self, "weights", _checked_weights(self.weights))
        self._check_scale()
        self._check_known()
        self._check_combine()
        tables = block_tables(self.block_weights)
        for adapter, table in (tables or {}).items():
            for pattern, weight in table.items():
                table[pattern] = _finite(f"block_weights: {adapter}: {pattern}", weight)
        object.__setattr__(self, "block_weights", tables)
        for module, weights in (self.module_weights or {}).items():
            for weight in _sequence(f"module_weights: {module}", weights):
                _finite(f"module_weights: {module}", weight)
        if self.density is not None and self.module_densities is not None:
            raise RecipeError("density: wanted density or module_densities, got both")
        for density in _numbers(self.density if self.module_densities is None else self.module_densities):
            _check_density(density, self.method, rule)
        if isinstance(self.density, Mapping):
            for pattern in self.density:
                compiled("density", pattern)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**64:
            raise RecipeError(f"seed: wanted a whole number from 0 to 2**64 - 1, got {self.seed!r}")
        if self.rank != "auto" and (not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1):
            raise RecipeError(f"rank: wanted auto or a whole number of at least 1, got {self.rank!r}")
        if self.energy is not None and not (_is_number(self.energy) and 0 < self.energy <= 1):
            raise RecipeError(f"energy: wanted a number above 0 and up to 1, got {self.energy!r}")
        if not isinstance(self.ranks, str) or self.ranks not in RANKS:
            raise RecipeError(f"ranks: wanted one of {', '.join(RANKS)}, got {self.ranks!r}")
        if self.dtype is not None and (not isinstance(self.dtype, str) or self.dtype not in DTYPES):
            raise RecipeError(f"dtype: wanted one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.saved is not None and self.saved not in SAVED:
            raise RecipeError(f"saved: wanted {' or '.join(SAVED)}, got {self.saved!r}")
        if METHODS[self.method].kind == "stacked" and (self.rank != "auto" or self.energy is not None):
            raise RecipeError(
                f"rank: {self.method} stacks the factors, its rank is the sum of theirs; for a smaller one use linear"
            )

    def _check_scale(self) -> None:
        if self.scale != "auto":
            if isinstance(self.scale, str) and "auto" in self.scale.lower():
                raise RecipeError(f"scale: wanted a number or 'auto', got {self.scale!r}")
            object.__setattr__(self, "scale", _finite("scale", self.scale))
        object.__setattr__(self, "ridge", _finite("ridge", self.ridge))
        object.__setattr__(self, "gain", _checked_gain(self.gain))
        if self.gain != 1 and self.scale != "auto":
            raise RecipeError(f"gain: multiplies scale='auto', wanted that with it, got scale {self.scale!r}")
        if self.ridge < 0:
            raise RecipeError(f"ridge: wanted a number of at least 0, got {self.ridge!r}")
        if self.balance is not None and self.balance not in BALANCES:
            raise RecipeError(f"balance: wanted {' or '.join(BALANCES)}, got {self.balance!r}")

    def _check_known(self) -> None:
        """Refuse fields that the method does not know, by name."""
        of_cores = METHODS[self.method].kind == "core"
        for each in fields(self):
            if refuses(self.method, each.name) and getattr(self, each.name) != each.default:
                known = ", ".join(methods_with(each.name))
                raise RecipeError(f"{each.name}: {self.method} does not know it; it belongs to {known}")
        if of_cores and self.space not in ("delta", "core"):
            raise RecipeError(f"space: {self.method} merges the cores of the deltas; wanted delta, got {self.space!r}")
        if self.balance is not None and self.space == "factors":
            raise RecipeError("balance: acts on deltas; wanted a space other than factors")

    def _check_combine(self) -> None:
        for name in ("gamma", "mask"):
            object.__setattr__(self, name, _finite(name, getattr(self, name)))
        if not 0 <= self.gamma < 1:
            raise RecipeError(f"gamma: wanted a number from 0 up to, but not, 1, got {self.gamma!r}")
        if self.mask <= 0:
            raise RecipeError(f"mask: wanted a number above 0, got {self.mask!r}")
        if not isinstance(self.min_tasks, int) or isinstance(self.min_tasks, bool) or self.min_tasks < 0:
            raise RecipeError(f"min_tasks: wanted a whole number of at least 0, got {self.min_tasks!r}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "Recipe":
        """A recipe from keys as in a YAML file; those of PEFT are understood too: see `rules.guesses`.

        Raises RecipeError for an unknown key, listing the known ones.
        """
        known, given = [field.name for field in fields(cls)], fields_of(values)
        for key in given:
            if key not in known:
                hint = did_you_mean(key, [*known, "combination_type"])
                raise RecipeError(f"recipe: wanted one of {', '.join(known)}, got {key!r}{hint}")
        return cls(**given)

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain data, for a model card or a report."""
        plain = asdict(self)
        for key in ("module_weights", "module_densities"):
            if plain[key] is not None:
                plain[key] = {module: list(numbers) for module, numbers in plain[key].items()}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}

    def rule(self) -> Rule:
        """The arithmetic that this recipe names."""
        rule = make_rule(
            self.method,
            election=self.election,
            convention=self.convention,
            scope=self.scope,
            trim_ties=self.trim_ties,
            gamma=self.gamma,
            mask=self.mask,
            min_tasks=self.min_tasks,
        )
        if self.normalize is not None:
            if not isinstance(self.normalize, bool) or not looks_at(self.method, "normalize"):
                known = " or ".join(methods_with("normalize"))
                raise RecipeError(f"normalize: wanted true or false, of {known}, got {self.normalize!r}")
            mean = CONVENTIONS[self.convention].divisor["magnitude"]
            rule = replace(rule, divisor=mean if self.normalize else "one")
        if self.rescale is not None:
            if self.rescale not in ["density", "l1"] or not looks_at(self.method, "rescale"):
                raise RecipeError(f"rescale: wanted density or l1, of random drops, got {self.rescale!r}")
            rule = replace(rule, l1_rescale=self.rescale == "l1")
        return rule

    def weights_for(self, adapters: Sequence[str], module: str | None = None) -> tuple[float, ...]:
        """One weight an adapter, of the whole model or in one module. Raises RecipeError where their number differs."""
        weights = (1.0,) * len(adapters) if self.weights is None else self.weights
        if isinstance(weights, Mapping):
            weights = by_name(weights, adapters)
        if len(weights) != len(adapters):
            raise RecipeError(
                f"weights: wanted {len(adapters)}, one for each of {', '.join(adapters)}, got {len(weights)}"
            )
        if module is not None and self.block_weights is not None:
            weights = in_blocks(self.block_weights, weights, adapters, module)
        if module is None or self.module_weights is None:
            return weights
        own = _of_module("module_weights", self.module_weights, module, adapters)
        products = (weight * factor for weight, factor in zip(weights, own, strict=True))
        return tuple(_finite(f"module_weights: {module}", product) for product in products)

    def densities_for(self, module: str, adapters: Sequence[str]) -> tuple[float, ...]:
        """One density an adapter for this module. Raises RecipeError where the number differs or no pattern matches."""
        if self.module_densities is not None:
            return _of_module("module_densities", self.module_densities, module, adapters)
        density = self.density
        if isinstance(density, Mapping):
            density = first_match("density", density, module)
        if density is None:
            density = DEFAULT_DENSITY
        if isinstance(density, Sequence):
            if len(density) != len(adapters):
                raise RecipeError(f"density: wanted one number or {len(adapters)}, got {len(density)}")
            return tuple(density)
        return (density,) * len(adapters)

    def gain_for(self, module: str) -> float:
        """The gain in this module. Raises RecipeError where no pattern matches."""
        return first_match("gain", self.gain, module) if isinstance(self.gain, Mapping) else self.gain


def _checked_gain(gain: Any) -> Gain:
    if not isinstance(gain, Mapping):
        return _finite("gain", gain)
    if not gain:
        raise RecipeError("gain: wanted a number, or a table of patterns and numbers, got an empty one")
    for pattern in gain:
        compiled("gain", pattern)
    return {pattern: _finite(f"gain: {pattern}", number) for pattern, number in gain.items()}


def _checked_weights(weights: Any) -> Any:
    if isinstance(weights, Mapping):
        return {name: _finite(f"weights: {name}", weight) for name, weight in weights.items()}
    return weights if weights is None else tuple(_finite("weights", w) for w in _sequence("weights", weights))


def _of_module(
    what: str, table: Mapping[str, Sequence[float]], module: str, adapters: Sequence[str]
) -> tuple[float, ...]:
    if module not in table:
        raise RecipeError(f"{what}: wanted an entry for every module, got none for {module}")
    if len(table[module]) != len(adapters):
        raise RecipeError(f"{what}: wanted {some(len(adapters), 'number')} for {module}, got {len(table[module])}")
    return tuple(table[module])


def _check_density(density: Any, method: str, rule: Rule) -> None:
    if not _is_number(density) or not 0 <= density <= 1:
        raise RecipeError(f"density: wanted a number from 0 to 1, got {density!r}{density_hint(density)}")
    if rule.keep == "bernoulli" and round(density * 2**32) == 0:
        raise RecipeError(f"density: {method} divides by it, wanted a number above 0, got {density!r}")


def _numbers(density: Density | None) -> list[Any]:
    """Every number that a density field holds."""
    if density is None:
        return []
    if isinstance(density, Mapping):
        return [number for value in density.values() for number in (_numbers(value) if _is_list(value) else [value])]
    return list(density) if _is_list(density) else [density]


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _plain(value: Any) -> Any:
    """The numbers of an array or a tensor, or of a list or a table of such, as Python's own."""
    if isinstance(value, Mapping):
        return {key: _own(each) for key, each in value.items()}
    return [_own(each) for each in value] if isinstance(value, list) else _own(value)


def _own(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _finite(name: str, value: Any) -> float:
    if not _is_number(value):
        raise RecipeError(f"{name}: wanted a finite number, got {value!r}{_hint(value)}")
    if abs(value) > LARGEST:
        raise RecipeError(f"{name}: wanted a number that float32 holds, got {value!r}")
    return float(value)


def _hint(value: Any) -> str:
    """YAML takes 1e-1 for text."""
    try:
        return f"; write it as {float(value)!r}" if isinstance(value, str) and math.isfinite(float(value)) else ""
    except ValueError:
        return ""


def _sequence(name: str, value: Any) -> Sequence[Any]:
    if not _is_list(value):
        raise RecipeError(f"{name}: wanted a list of numbers, got {value!r}")
    return value
