"""What users naturally write, understood: PEFT's names, other spellings, adapters with their weights; or a hint.

Imports no torch.
"""

import os
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Literal

from merge_engine.errors import AdapterError, RecipeError, some
from merge_engine.rules.methods import METHODS

# PEFT's combination types: {its name: (method, space)}. What ends in svd is cut to svd_rank there, and to rank here.
COMBINATION_TYPES: dict[str, tuple[str, Literal["factors", "delta"]]] = {
    "linear": ("linear", "factors"),
    "cat": ("cat", "factors"),
    "ties": ("ties", "factors"),
    "dare_linear": ("dare_linear", "factors"),
    "dare_ties": ("dare_ties", "factors"),
    "magnitude_prune": ("magnitude_prune", "factors"),
    "svd": ("linear", "delta"),
    "ties_svd": ("ties", "delta"),
    "dare_linear_svd": ("dare_linear", "delta"),
    "dare_ties_svd": ("dare_ties", "delta"),
    "magnitude_prune_svd": ("magnitude_prune", "delta"),
}
# Fields of a recipe by the names that PEFT has for them, and words by other names. Case, "-" and " " do not matter.
FIELDS = {"majority_sign_method": "election", "svd_rank": "rank"}
WORDS: dict[str, dict[str, str]] = {
    "method": {
        "task_arithmetic": "linear",
        **{name: method for name, (method, space) in COMBINATION_TYPES.items() if space == "delta"},
    },
    "dtype": {
        **{"fp32": "float32", "f32": "float32", "float": "float32", "fp16": "float16", "f16": "float16"},
        **{"half": "float16", "bf16": "bfloat16"},
    },
}
# What is not a field here, and what to write for it.
_ELSEWHERE = {
    "lambda": "scale",
    "lambda_": "scale",
    "lam": "scale",
    "merge_method": "method",
    "combination": "combination_type",
    "densities": "density",
    "weight": "weights",
    "output_rank": "rank",
    "r": "rank",
    "torch_dtype": "dtype",
}


def word(field: str, value: Any) -> Any:
    """A word of a field as the table spells it: "TIES" -> "ties", torch.float16 -> "float16"; others as they are."""
    if field == "dtype" and str(value).startswith("torch."):
        value = str(value).removeprefix("torch.")
    if not isinstance(value, str):
        return value
    plain = value.strip().lower().replace("-", "_").replace(" ", "_")
    known = WORDS[field]
    if field == "method" and plain in METHODS:
        return plain
    return known.get(plain, plain if field == "dtype" else value)


def fields_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe, by its own names. combination_type, as in PEFT, says method and space.

    Raises RecipeError where two say the same, and for an unknown combination_type.
    """
    found = dict(values)
    if "combination_type" in found:
        name = found.pop("combination_type")
        plain = name.lower() if isinstance(name, str) else name
        if plain not in COMBINATION_TYPES:
            known, hint = ", ".join(COMBINATION_TYPES), did_you_mean(name, COMBINATION_TYPES)
            raise RecipeError(f"combination_type: wanted one of {known}, got {name!r}{hint}")
        for field, value in zip(("method", "space"), COMBINATION_TYPES[plain], strict=True):
            if field in found:
                raise RecipeError(f"{field}: combination_type={name!r} says it; wanted one of the two, got both")
            found[field] = value
        if found["method"] == "cat":
            del found["space"]  # it has no other
    for name, field in FIELDS.items():
        if name in found:
            if field in found:
                raise RecipeError(f"{name}: is {field} here; wanted one of the two, got both")
            value = found.pop(name)
            if value is not None:
                found[field] = value
    return found


def did_you_mean(wrong: Any, known: Iterable[str]) -> str:
    """ "; did you mean 'density'?" for a word that is near to one of the known, else nothing."""
    if not isinstance(wrong, str):
        return ""
    import difflib  # takes a tenth of the time of --help

    plain, names = wrong.lower().replace("-", "_"), list(known)
    near = [_ELSEWHERE[plain]] if plain in _ELSEWHERE else difflib.get_close_matches(plain, names, 1, 0.6)
    near = near or [name for name in names if name.startswith(plain) and len(plain) > 2][:1]
    return f"; did you mean {near[0]!r}?" if near else ""


def density_hint(value: Any) -> str:
    """ "; wanted 0.2?" for 20, which is meant as percent."""
    percent = isinstance(value, int | float) and not isinstance(value, bool) and 5 <= value <= 100
    return f"; wanted {value / 100:g}?" if percent else ""


def split_weights(adapters: Any, recipe: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(adapters, recipe), the weights of a mapping {adapter: weight} moved to the recipe.

    Raises AdapterError for what has no order (sets) or is no list, RecipeError where weights are given twice.
    """
    sources, weights = listed(adapters)
    if weights is None:
        return sources, dict(recipe)
    if recipe.get("weights") is not None:
        given = recipe["weights"]
        raise RecipeError(f"weights: the mapping of adapters has some; wanted one of the two, got {given!r} too")
    return sources, {**recipe, "weights": weights}


def listed(adapters: Any) -> tuple[list[Any], list[float] | None]:
    """(adapters in order, their weights where it is a mapping {adapter: weight})."""
    if isinstance(adapters, str) or not isinstance(adapters, Iterable) or hasattr(adapters, "state_dict"):
        raise AdapterError(f"adapters: wanted a list of folders or hub ids, got {describe(adapters)}")
    if isinstance(adapters, Set):
        raise AdapterError("adapters: wanted a list, since the order decides whose a weight is; got a set")
    if not isinstance(adapters, Mapping):
        return list(adapters), None
    if _is_state_dict(adapters):
        raise AdapterError(f"adapters: wanted a list of folders or hub ids, got {describe(adapters)}")
    for source, weight in adapters.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            wanted = "a list of folders or hub ids, or a mapping of them to weights"
            raise AdapterError(f"adapters: wanted {wanted}, got {describe(weight)} for {source!r}")
    return list(adapters), list(adapters.values())


def by_name(weights: Mapping[str, float], adapters: Sequence[str]) -> tuple[float, ...]:
    """The weights of adapters by their names, or by folders that end in them. Raises RecipeError for other names."""
    found = {str(key).rstrip("/").split("/")[-1]: weight for key, weight in weights.items()}
    names = ", ".join(adapters)
    for name in found:
        if name not in adapters:
            raise RecipeError(f"weights: wanted names of {names}, got {name!r}{did_you_mean(name, adapters)}")
    for name in adapters:
        if name not in found:
            raise RecipeError(f"weights: wanted one for each of {names}, got none for {name}")
        if adapters.count(name) > 1:
            raise RecipeError(f"weights: {adapters.count(name)} adapters are named {name}; wanted a list of weights")
    return tuple(found[name] for name in adapters)


def describe(source: Any) -> str:
    """A wrong input in a few words, and what to do with models and tensors, which are never printed."""
    if source is None or isinstance(source, str | int | float | os.PathLike):
        return repr(str(source) if isinstance(source, os.PathLike) else source)
    kind = type(source).__name__
    if _is_state_dict(source):
        tensors = some(len(source), "tensor")
        return f"a state dict of {tensors}; save the model with save_pretrained(folder) and give the folder"
    if hasattr(source, "state_dict"):
        inside = ", or use merge_engine.peft_backend.add_weighted_adapter" if _has_adapters(source) else ""
        return f"a {kind}; save it with save_pretrained(folder) and give the folder{inside}"
    return f"a {kind}"


def _is_state_dict(source: Any) -> bool:
    return isinstance(source, Mapping) and any(hasattr(value, "dtype") for value in source.values())


def _has_adapters(model: Any) -> bool:
    return isinstance(getattr(model, "peft_config", None), dict)
