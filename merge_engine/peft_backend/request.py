"""The arguments of add_weighted_adapter, checked before the model is changed, with PEFT's errors where it has some."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_engine.errors import AdapterError, RecipeError
from merge_engine.formats.peft_config import CHANGES_BASE
from merge_engine.peft_backend.layers import SHARED
from merge_engine.rules.guesses import COMBINATION_TYPES
from merge_engine.rules.recipe import Recipe

RNGS, SVDS = ("philox", "torch"), ("subspace", "exact")
DRIVERS = (None, "gesvd", "gesvdj", "gesvda")  # of torch.linalg.svd on a GPU
# Fields of a configuration that change an adapter's effect, or that would be lost when factors are merged.
_REFUSED = {
    "use_dora": "DoRA rescales the base weight",
    "lora_bias": "its bias is not part of the delta",
    "bias": "biases of the base model were trained",
    "use_qalora": "QA-LoRA pools the input",
    "use_bdlora": "BD-LoRA factors are block-diagonal",
    "arrow_config": "Arrow routes between adapters",
    "kasa_config": "KaSA changes the base weights",
    "monteclora_config": "MonteCLoRA samples its weights",
    "megatron_config": "Megatron's parallel layers are not supported",
}


@dataclass(frozen=True)
class MergeRequest:
    """A checked call.

    recipe: method, weights, density, election, space and seed. rank: of the result in every layer.
    clamp, driver: PEFT's svd_clamp and svd_driver. exact: whether merged deltas are cut by a dense SVD.
    """

    adapters: tuple[str, ...]
    recipe: Recipe
    rank: int
    clamp: float | None
    driver: str | None
    rng: str
    exact: bool
    backend: str | None

    @property
    def weights(self) -> tuple[float, ...]:
        return self.recipe.weights_for(self.adapters)

    @property
    def density(self) -> float:
        return self.recipe.density if isinstance(self.recipe.density, float) else 1.0

    @property
    def drops(self) -> bool:
        return self.recipe.rule().keep == "bernoulli" and self.density < 1


def check_request(
    tuner: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    combination_type: str,
    *,
    svd_rank: int | None,
    svd_clamp: float | None,
    svd_driver: str | None,
    density: float | None,
    majority_sign_method: str,
    seed: int,
    rng: str,
    svd: str,
    backend: str | None,
) -> MergeRequest:
    """Check the arguments for this model.

    Raises what PEFT raises, in PEFT's words, where PEFT checks, and else RecipeError or AdapterError, which are both
    ValueErrors. Warns (UserWarning), in PEFT's words, of a density of 1 or more.
    """
    if not isinstance(combination_type, str):
        raise ValueError(f"Invalid combination_type: {combination_type}")
    if svd_rank is not None and (not isinstance(svd_rank, int) or isinstance(svd_rank, bool)):
        raise RecipeError(f"svd_rank: wanted a whole number, got {svd_rank!r}")
    if not adapters and combination_type.endswith("svd"):
        raise ValueError(f"Found no adapter matching the names in {adapters}")
    if svd_rank is not None and svd_rank < 0:
        raise ValueError(f"`r` should be a positive integer value but the value passed is {svd_rank}")
    chosen, rank, _ = tuner._check_add_weighted_adapter(adapters, combination_type, svd_rank)
    if combination_type not in COMBINATION_TYPES:
        raise ValueError(f"Invalid combination_type: {combination_type}")
    for adapter in adapters:
        _check_config(adapter, tuner.peft_config[adapter])
    _check_shared(adapters, tuner.peft_config)
    _one_of("rng", rng, RNGS)
    _one_of("svd", svd, SVDS)
    _one_of("svd_driver", svd_driver, DRIVERS)
    if svd_clamp is not None and not 0 <= _number("svd_clamp", svd_clamp) <= 1:
        raise RecipeError(f"svd_clamp: wanted a quantile from 0 to 1, got {svd_clamp!r}")
    method, space = COMBINATION_TYPES[chosen]
    recipe = Recipe(
        method=method,
        weights=tuple(_number("weights", weight) for weight in weights),
        space=space,
        seed=seed,
        rank="auto" if space == "factors" else rank,
    )
    recipe.weights_for(adapters)
    rule = recipe.rule()
    if rule.elect != "none" and majority_sign_method not in ("total", "frequency"):
        raise RuntimeError(f'Unimplemented mask method "{majority_sign_method}"')
    election = "frequency" if majority_sign_method == "frequency" else "total"
    share = None if rule.keep == "all" else _density(chosen, density)
    recipe = Recipe(method, recipe.weights, share, space=space, election=election, seed=recipe.seed, rank=recipe.rank)
    exact = svd == "exact" or svd_clamp is not None  # a clamp's limit depends on the signs that a dense SVD gives
    return MergeRequest(tuple(adapters), recipe, rank, svd_clamp, svd_driver, rng, exact, backend)


def _check_config(adapter: str, config: Any) -> None:
    for key, reason in _REFUSED.items():
        if getattr(config, key, None) not in (None, False, "none", [], {}):
            raise AdapterError(f"{adapter}: {key} is set in its configuration; {reason}")
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        warnings.warn(
            f"{adapter}: init_lora_weights={start} changed the base weights when the adapter was created: the merged "
            "adapter fits the base model as it is now, not the original one",
            stacklevel=4,
        )


def _check_shared(adapters: Sequence[str], configs: Mapping[str, Any]) -> None:
    for key, optional in SHARED.items():
        values = {adapter: getattr(configs[adapter], key, None) for adapter in adapters}
        if optional:
            values = {adapter: value for adapter, value in values.items() if value is not None}
        for adapter, value in values.items():
            first = next(iter(values))
            if value != values[first]:
                raise AdapterError(f"{adapter}: {key} is {value}, wanted {values[first]} as in {first}")


def _density(combination_type: str, density: Any) -> float:
    if density is None:
        raise RecipeError(f"density: {combination_type} needs a number from 0 to 1, got None")
    share = _number("density", density)
    if share < 0:
        raise ValueError(f"Density should be >= 0, got {density}")
    if share >= 1:
        warnings.warn(
            f"The density {density} is greater than or equal to 1, no pruning will be performed.", stacklevel=4
        )
    return min(share, 1.0)


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{name}: wanted a number, got {value!r}") from error
    if not math.isfinite(number):
        raise RecipeError(f"{name}: wanted a finite number, got {number}")
    return number


def _one_of(name: str, value: Any, known: Sequence[Any]) -> None:
    if value not in known:
        raise RecipeError(f"{name}: wanted one of {', '.join(map(str, known))}, got {value!r}")
