"""Drawn configurations, merged by stock PEFT and by the drop-in on equal models.

    python tests/helpers/peft_fuzz.py 1000        # the cases 0 to 999
    python tests/helpers/peft_fuzz.py 1000 5000   # the cases 5000 to 5999

Of each case comes one word: "agree" (bits of factors, of DARE's masks and of torch's stream after the call; for svd
types the error of the cut), "both refuse", or a row of the README's table where stock PEFT fails or drops something.
Anything else, a changed model after a refusal, or other tokens and saved layers than wanted raises an AssertionError.
"""

import random
import re
import sys
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import model as lora_model
from peft_zoo import KINDS, LAYERS, STOCK, distinct, factors, layers, product
from torch import nn
from unchanged import assert_unchanged, snapshot

from merge_engine.peft_backend import add_weighted_adapter

FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
TYPES = (*FACTORS, "cat", "svd", *(f"{name}_svd" for name in FACTORS[1:]))
MERGES = ("task_arithmetic", "ties", "dare_linear", "dare_ties", "magnitude_prune")
UNCUT = ("conv1d", "conv3d")  # kinds that stock cannot cut
LEAK = "stock: excluded modules of the first adapter leak"


class Rich(nn.Module):
    """Three layers to adapt, a head to be saved whole, and an embedding with tokens to be trained."""

    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        for name, kind in zip(LAYERS, kinds, strict=True):
            setattr(self, name, KINDS[kind]())
        self.head, self.words = nn.Linear(4, 3), nn.Embedding(9, 5)


@dataclass
class Case:
    """What a number draws."""

    number: int
    kinds: list[str] = field(default_factory=list)
    configs: list[dict[str, Any]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    widened: torch.dtype | None = None  # the dtype that float32 values are of
    call: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [f"adapter{i}" for i in range(len(self.configs))]

    @property
    def combination(self) -> str:
        return "linear" if len(self.configs) == 1 else self.call["combination_type"]

    @property
    def cuts(self) -> bool:
        return self.combination.endswith("svd")


def draw(number: int) -> Case:
    choose = random.Random(number)
    case = Case(number)
    kinds = [kind for kind in KINDS if kind != "conv1d_transposed"]
    one = choose.choice(list(KINDS))
    case.kinds = [one] * 3 if choose.random() < 0.7 else choose.choices(kinds, k=3)
    count = choose.choice([1, 2, 2, 3, 3, 4, 5])
    rank, starts = choose.randint(1, 5), choose.choice([True, False, "gaussian"])
    ranks_differ, has_head = choose.random() < 0.15, choose.choice([None, None, *range(count)])
    for number_of in range(count):
        config: dict[str, Any] = {
            "r": choose.randint(1, 5) if ranks_differ else rank,
            "lora_alpha": choose.randint(1, 9),
            "use_rslora": choose.random() < 0.15,
            "init_lora_weights": starts,
            "target_modules": choose.sample(LAYERS, choose.choice([1, 2, 3, 3, 3])),
            "fan_in_fan_out": "conv1d_transposed" in case.kinds,
        }
        if choose.random() < 0.05:
            config["rank_pattern"] = {choose.choice(LAYERS): choose.randint(1, 6)}
        if choose.random() < 0.15:
            config["alpha_pattern"] = {choose.choice(["one|two", "three"]): 7}
        if choose.random() < 0.05 and len(config["target_modules"]) > 1:
            config["exclude_modules"] = [config["target_modules"][0]]
        if number_of == has_head or choose.random() < 0.03:
            config["modules_to_save"] = ["head"]
        if choose.random() < 0.2:
            config["trainable_token_indices"] = {"words": choose.sample(range(9), choose.randint(1, 4))}
        if choose.random() < 0.03:
            config["lora_dropout"] = 0.5
        if number_of == 0 and choose.random() < 0.02:
            config["target_modules"] = "|".join(config["target_modules"])
        case.configs.append(config)
    case.weights = [choose.choice([0.0, 1.0, 1, -1.0, 0.3, choose.uniform(-2, 2)]) for _ in range(count)]
    if choose.random() < 0.03:
        case.weights = case.weights[:-1]
    case.scales = [choose.choice([1.0, 1.0, 0.5, -2.0]) for _ in range(count)]
    case.dtype = choose.choice([torch.float32] * 5 + [torch.float16, torch.bfloat16])
    case.call = {
        "combination_type": choose.choice(TYPES),
        "density": choose.choice([0.0, 0.5, 1, 1.5, choose.uniform(0.05, 0.95), choose.uniform(0.05, 0.95)]),
        "majority_sign_method": choose.choice(["total", "frequency"]),
        "svd_rank": choose.choice([None, 1, 2, 4, 9]),
    }
    return case


def build(case: Case) -> Any:
    torch.manual_seed(case.number)
    model: Any = None
    for name, config in zip(case.names, case.configs, strict=True):
        if model is None:
            model = get_peft_model(Rich(case.kinds), LoraConfig(**config), name)
        else:
            model.add_adapter(name, LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = distinct(parameter.shape, case.widened or case.dtype).to(case.dtype)
            elif "tokens_delta" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape))
    for name, factor in zip(case.names, case.scales, strict=True):
        for layer in layers(model).values():
            if name in layer.scaling:
                layer.scaling[name] *= factor
    return model


@dataclass
class Outcome:
    model: Any
    error: Exception | None = None
    after: float = 0.0  # the stream's next number
    deltas: list[torch.Tensor] = field(default_factory=list)  # merged, before they are cut


def merged(case: Case, add: Any) -> Outcome:
    outcome = Outcome(build(case))
    before = snapshot(outcome.model)

    def catching(name: str) -> Any:
        right = getattr(lora_model, name)

        def catch(*arguments: Any) -> torch.Tensor:
            outcome.deltas.append(right(*arguments))
            return outcome.deltas[-1]

        return mock.patch.object(lora_model, name, catch)

    patches = [catching(name) for name in MERGES]
    for patch in patches:
        patch.start()
    torch.manual_seed(case.number)
    try:
        add(outcome.model, case.names, case.weights, "merged", **case.call)
    except Exception as error:
        if add is add_weighted_adapter and not isinstance(error, ValueError | TypeError | RuntimeError):
            raise
        outcome.error = error
    finally:
        for patch in patches:
            patch.stop()
    outcome.after = torch.rand(1).item()
    if add is add_weighted_adapter and outcome.error is not None:
        assert_unchanged(outcome.model, before)
    return outcome


def run(number: int) -> str:
    """The word for one case. Raises AssertionError where stock PEFT and the drop-in disagree."""
    case = draw(number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = merged(case, add_weighted_adapter)
        stock = merged(case, lambda model, *rest, **call: STOCK(model.base_model, *rest, **call))
    if ours.error is not None:
        return "both refuse" if stock.error is not None else refused(case, str(ours.error))
    check_beside(case, ours)
    if stock.error is not None:
        return stock_fails(case, str(stock.error))
    leaks = (
        bool(case.configs[0].get("exclude_modules"))
        and factors(stock.model, "merged").keys() != factors(ours.model, "merged").keys()
    )
    if leaks:
        return LEAK
    if case.cuts and any(len(A) != B.shape[1] for A, B in factors(stock.model, "merged").values()):
        return "stock: svd_rank above a layer's smaller side"
    (check_cuts if case.cuts else check_factors)(case, stock, ours)
    return "agree"


def check_factors(case: Case, stock: Outcome, ours: Outcome) -> None:
    theirs, mine = factors(stock.model, "merged"), factors(ours.model, "merged")
    assert theirs.keys() == mine.keys()
    for name in theirs:
        for dim, (their, our) in enumerate(zip(theirs[name], mine[name], strict=True)):
            rank = their.shape[dim]
            assert torch.equal(our.narrow(dim, 0, rank), their.to(our.dtype)), f"{name}: {'AB'[dim]}"
            assert not our.narrow(dim, rank, our.shape[dim] - rank).any()
    if "dare" in case.combination and case.call["density"] < 1 and not has_tokens(case):
        assert stock.after == ours.after, "torch's stream"


def check_cuts(case: Case, stock: Outcome, ours: Outcome) -> None:
    theirs, mine = factors(stock.model, "merged"), factors(ours.model, "merged")
    assert theirs.keys() == mine.keys()
    deltas = stock.deltas
    if case.dtype != torch.float32 and "dare" not in case.combination:
        # Stock trims and elects rounded deltas, of which many are equal: what float32 gives is wanted.
        wide = replace(case, dtype=torch.float32, widened=case.dtype)
        twin = merged(wide, lambda model, *rest, **call: STOCK(model.base_model, *rest, **call))
        if twin.error is not None:  # the rank is above a smaller side
            return
        deltas = twin.deltas
    adapted = [layer for layer in layers(ours.model).items() if "merged" in layer[1].scaling]
    eps = torch.finfo(case.dtype).eps
    for (name, layer), delta in zip(adapted, deltas, strict=True):
        transposed = len(layer.lora_embedding_A) > 0 or getattr(layer, "fan_in_fan_out", False)
        flat = delta.flatten(1).double()
        wanted = flat.T if transposed else flat
        error, their = ((product(*found[name]) - wanted).norm().item() for found in (mine, theirs))
        # Ours merges halves in float32 and rounds once, so it differs from stock's rounded deltas by a few roundings.
        if case.dtype != torch.float32 and ties_at_threshold(case, layer):
            continue
        best = torch.linalg.svdvals(wanted)[len(mine[name][0]) :].norm().item()
        their = max(best, their if deltas is stock.deltas else 0.0)
        assert error <= their * (1 + 1e-4) + 16 * eps * wanted.norm().item() + 1e-6, f"{name}: {error} above {their}"


def ties_at_threshold(case: Case, layer: Any) -> bool:
    """Whether a trim must choose among equal magnitudes, of which PEFT keeps any and the drop-in the first."""
    for name in case.names:
        if name in layer.scaling:
            sizes = layer.get_delta_weight(name).float().abs().flatten().sort().values
            k = int(min(case.call["density"], 1) * len(sizes))
            if 0 < k < len(sizes) and sizes[-k] == sizes[-k - 1]:
                return True
    return False


def has_tokens(case: Case) -> bool:
    return any("trainable_token_indices" in config for config in case.configs)


def check_beside(case: Case, ours: Outcome) -> None:
    """Saved layers are their holder's, and trained tokens those of the sum where the type is a sum."""
    inner = ours.model.base_model.model
    for name, config in zip(case.names, case.configs, strict=True):
        if "modules_to_save" in config:
            assert torch.equal(inner.head.modules_to_save["merged"].weight, inner.head.modules_to_save[name].weight)
    if has_tokens(case):
        layer = inner.words.token_adapter
        rows = dict(zip(layer.token_indices["merged"], layer.trainable_tokens_delta["merged"].double(), strict=True))
        base = inner.words.original_module.weight.double()
        holders = [name for name in case.names if name in layer.token_indices]
        assert rows.keys() == {token for name in holders for token in layer.token_indices[name]}
        if case.combination in ("linear", "cat", "svd"):
            for token, row in rows.items():
                want = base[token].clone()
                for name, weight in zip(case.names, case.weights, strict=True):
                    if token in layer.token_indices.get(name, ()):
                        trained = layer.trainable_tokens_delta[name][layer.token_indices[name].index(token)]
                        want += weight * (trained.double() - base[token])
                torch.testing.assert_close(row, want, rtol=1e-5, atol=1e-5)


def refused(case: Case, text: str) -> str:
    """Why the drop-in alone refuses: a row of the README's table."""
    rows = {
        "weights: wanted": "stock: fewer weights than adapters",
        "divides by it": "stock: density 0 of DARE is NaN",
        "overflows": "stock: overflows the dtype",
    }
    for part, row in rows.items():
        if part in text:
            return row
    if "different ranks" in text and case.configs[0].get("exclude_modules"):
        return LEAK
    raise AssertionError(f"only the drop-in refuses: {text}")


def stock_fails(case: Case, text: str) -> str:
    """Why stock alone fails: a row of the README's table."""
    if case.cuts and set(case.kinds) & set(UNCUT):
        return "stock: svd types fail on Conv1d and Conv3d"
    if any("exclude_modules" in config for config in case.configs) and ("No matching" in text or "range" in text):
        return "stock: targets together reach layers that no adapter has"
    if case.cuts and re.search("svd.* not implemented for '(Half|BFloat16)'", text):
        return "stock: svd types fail in half precision on a CPU"
    if case.cuts and ("shape" in text or "size" in text):
        return "stock: svd_rank above a layer's smaller side"
    raise AssertionError(f"only stock fails: {text}")


def main(count: int, first: int = 0) -> int:
    words, failures = Counter(), 0
    for number in range(first, first + count):
        try:
            words[run(number)] += 1
        except Exception:
            failures += 1
            print(f"case {number}: {draw(number)}\n{traceback.format_exc(limit=-3)}", flush=True)
    for word, times in words.most_common():
        print(f"{times:6} {word}")
    print(f"{failures:6} differ")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
