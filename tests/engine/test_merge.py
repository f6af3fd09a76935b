"""Whole merges of adapters that PEFT saved: against PEFT itself, against the textbook, and against algebra."""

import logging
import math
import warnings
from collections import deque

import pytest
import torch
from peft_adapters import WEIGHTS, deltas_of, in_peft, lora_layers, peft_deltas, relative, rewrite
from safetensors.torch import load_file

import merge_engine
from merge_engine.cpu.mask import keep_mask
from merge_engine.formats.open import open_adapter
from merge_engine.rules import reference
from merge_engine.rules.philox import stream_id
from merge_engine.rules.rule import make_rule

SEED = 11


def inject_masks(monkeypatch, model, density, sides):
    """PEFT draws its masks layer by layer, side by side, adapter by adapter: hand it ours in that order."""
    masks = deque()
    for name, layer in lora_layers(model).items():
        for side in sides:
            for number in range(3):
                A, B = layer.lora_A[str(number)].weight, layer.lora_B[str(number)].weight
                shape = {"A": A.shape, "B": B.shape, "delta": (B.shape[0], A.shape[1])}[side]
                place = {"seed": SEED, "stream": stream_id(name, side), "adapter": number}
                masks.append(keep_mask(density, rows=range(shape[0]), columns=range(shape[1]), **place).float())
    monkeypatch.setattr(torch, "bernoulli", lambda like, *_, **__: masks.popleft().reshape(like.shape))
    return masks


DENSITY = {"ties": 0.3, "dare_linear": 0.6, "dare_ties": 0.6, "magnitude_prune": 0.3, "linear": None}


@pytest.mark.parametrize("election", ["total", "frequency"])
@pytest.mark.parametrize("method", DENSITY)
def test_pefts_factor_types(folders, method, election, monkeypatch):
    model, density = in_peft(folders), DENSITY[method]
    if "dare" in method:
        waiting = inject_masks(monkeypatch, model, density, ["A", "B"])
    asked = {"combination_type": method, "density": density, "majority_sign_method": election}
    model.add_weighted_adapter(["0", "1", "2"], WEIGHTS, "merged", **asked)
    if "dare" in method:
        assert not waiting
    want = peft_deltas(model, "merged")
    ours = {"method": method, "density": density, "election": election, "seed": SEED, "space": "factors"}
    got = deltas_of(merge_engine.merge(folders, weights=WEIGHTS, **ours))
    assert got.keys() == want.keys()
    for name in want:
        assert relative(got[name], want[name]) < 1e-6, name


def test_pefts_cat(folders):
    model = in_peft(folders)
    model.add_weighted_adapter(["0", "1", "2"], WEIGHTS, "merged", combination_type="cat")
    want = peft_deltas(model, "merged")
    merged = merge_engine.merge(folders, method="cat", weights=WEIGHTS)
    assert all(relative(delta, want[name]) < 1e-6 for name, delta in deltas_of(merged).items())
    assert {result.A.shape[0] for result in merged.modules.values()} == {12}


@pytest.mark.parametrize("method", DENSITY)
def test_pefts_svd_types(folders, method, monkeypatch):
    """Both are cuts of the same merged delta, which PEFT's own functions make: ours is as close to it as any can be."""
    from peft.utils import merge_utils

    model, density, rank = in_peft(folders), DENSITY[method], 3
    if "dare" in method:
        inject_masks(monkeypatch, model, density, ["delta"])
    combine = {"linear": "svd"}.get(method, f"{method}_svd")
    model.add_weighted_adapter(
        ["0", "1", "2"], WEIGHTS, "merged", combination_type=combine, svd_rank=rank, density=density
    )
    theirs = peft_deltas(model, "merged")
    merged = merge_engine.merge(folders, method=method, weights=WEIGHTS, density=density, rank=rank, seed=SEED)
    if "dare" in method:
        inject_masks(monkeypatch, model, density, ["delta"])
    per_adapter = [peft_deltas(model, str(number)) for number in range(3)]
    ours = deltas_of(merged)
    for name in theirs:
        got = ours[name]
        deltas, weights = [deltas[name] for deltas in per_adapter], torch.tensor(WEIGHTS)
        full = {
            "linear": lambda d=deltas, w=weights: merge_utils.task_arithmetic(d, w),
            "ties": lambda d=deltas, w=weights: merge_utils.ties(d, w, density),
            "dare_linear": lambda d=deltas, w=weights: merge_utils.dare_linear(d, w, density),
            "dare_ties": lambda d=deltas, w=weights: merge_utils.dare_ties(d, w, density),
            "magnitude_prune": lambda d=deltas, w=weights: merge_utils.magnitude_prune(d, w, density),
        }[method]().double()
        spectrum = torch.linalg.svdvals(full)
        optimum = spectrum[rank:].norm().item()
        error = (got.double() - full).norm().item()
        assert error <= optimum * (1 + 1e-4) + 1e-5 * spectrum.norm().item(), name
        assert (theirs[name].double() - full).norm().item() >= error * (1 - 1e-4), name
        kept = (spectrum[:rank].square().sum() / spectrum.square().sum()).item()
        assert merged.energy[name] == pytest.approx(kept, abs=1e-4)


@pytest.mark.parametrize("method", ["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"])
@pytest.mark.parametrize("convention", ["peft", "mergekit", "paper"])
@pytest.mark.parametrize("space", ["delta", "factors"])
@pytest.mark.parametrize("scope", [None, "model"])
def test_whole_merges_equal_the_textbook(folders, method, convention, space, scope):
    """Every module at full rank, thresholds and majority over the whole model where the convention says so."""
    recipe = {"method": method, "convention": convention, "space": space, "scope": scope, "density": 0.4}
    got = merge_engine.merge(folders, weights=WEIGHTS, scale=0.7, seed=SEED, rank=32, **recipe).modules
    rule = make_rule(method, convention=convention, scope=scope)
    adapters = [open_adapter(folder) for folder in folders]
    names = list(adapters[0].modules)
    scaling = adapters[0].modules[names[0]].scaling

    def merged(side, tensor, weights, scale):
        tasks = {n: {i: tensor(*adapter.factors(n)) for i, adapter in enumerate(adapters)} for n in names}
        masks = {
            n: {
                i: keep_mask(
                    0.4,
                    seed=SEED,
                    stream=stream_id(n, side),
                    adapter=i,
                    rows=range(len(t)),
                    columns=range(t.shape[1]),
                )
                for i, t in tensors.items()
            }
            for n, tensors in tasks.items()
        }
        return reference.merge_model(tasks, weights, {n: [0.4] * 3 for n in names}, rule, masks=masks, scale=scale)

    if space == "delta":
        want = merged("delta", lambda A, B: reference.delta(A, B, scaling), WEIGHTS, 0.7)
    else:
        roots = [math.sqrt(abs(w * scaling)) for w in WEIGHTS]
        signed = [math.copysign(root, w) for root, w in zip(roots, WEIGHTS, strict=True)]
        A = merged("A", lambda A, B: A, signed, 1.0)
        B = merged("B", lambda A, B: B, roots, 0.7)
        want = {name: B[name] @ A[name] for name in names}
    for name in names:
        assert relative(got[name].B @ got[name].A, want[name]) < 3e-6, name


def test_cat_is_linear_is_svd_at_full_rank(uneven):
    cat = deltas_of(merge_engine.merge(uneven, method="cat", weights=WEIGHTS, scale=0.5))
    linear = deltas_of(merge_engine.merge(uneven, method="linear", weights=WEIGHTS, scale=0.5))
    full = deltas_of(merge_engine.merge(uneven, method="linear", weights=WEIGHTS, scale=0.5, rank=10**6))
    model = in_peft(uneven)
    singles = [peft_deltas(model, str(number)) for number in range(3)]
    assert cat.keys() == set().union(*singles)
    for name, delta in cat.items():
        want = sum(0.5 * w * d[name].double() for w, d in zip(WEIGHTS, singles, strict=True) if name in d)
        for got in (delta, linear[name], full[name]):
            assert relative(got, want) < 1e-6, name


@pytest.mark.parametrize("method", ["linear", "magnitude_prune", "ties", "cat"])
@pytest.mark.parametrize("space", ["delta", "factors"])
def test_the_order_of_the_adapters_does_not_matter(folders, method, space):
    order = [2, 0, 1]
    recipe = {"method": method, "space": space, "density": 0.4, "rank": "auto" if method == "cat" else 32}
    one = deltas_of(merge_engine.merge(folders, weights=WEIGHTS, **recipe))
    shuffled = [folders[i] for i in order]
    other = deltas_of(merge_engine.merge(shuffled, weights=[WEIGHTS[i] for i in order], **recipe))
    for name in one:
        assert relative(other[name], one[name]) < 3e-6


def test_another_basis_of_the_factors_changes_factor_space_only(folders, tmp_path):
    G = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0] * 2
    turned = [rewrite(folders[0], tmp_path / "turned", lambda A, B: (torch.linalg.inv(G) @ A, B @ G)), *folders[1:]]
    for method in ("linear", "ties", "magnitude_prune"):
        recipe = {"method": method, "density": 0.4, "weights": WEIGHTS}
        one, other = (deltas_of(merge_engine.merge(f, rank=32, **recipe)) for f in (folders, turned))
        assert max(relative(other[name], one[name]) for name in one) < 1e-4
        one, other = (deltas_of(merge_engine.merge(f, space="factors", **recipe)) for f in (folders, turned))
        assert min(relative(other[name], one[name]) for name in one) > 0.05


def test_mixed_ranks_equal_zero_padded_ranks(uneven, tmp_path):
    def pad(A, B):
        return torch.nn.functional.pad(A, (0, 0, 0, 9 - len(A))), torch.nn.functional.pad(B, (0, 9 - len(A)))

    modules = [open_adapter(folder).modules for folder in uneven]
    padded = [
        rewrite(
            folder,
            tmp_path / f"padded-{folder.name}",
            pad,
            r=9,
            rank_pattern={},
            use_rslora=False,
            alpha_pattern={name: 9 * module.scaling for name, module in modules[number].items()},
        )
        for number, folder in enumerate(uneven)
    ]
    for method in ("linear", "ties", "dare_linear"):
        recipe = {"method": method, "density": 0.4, "weights": WEIGHTS, "rank": 32}
        one, other = (deltas_of(merge_engine.merge(f, **recipe)) for f in (uneven, padded))
        assert max(relative(other[name], one[name]) for name in one) < 1e-5


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_threads_change_no_bit(folders, method):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(merge_engine.merge(folders, method=method, density=0.3, rank=3).modules)
    finally:
        torch.set_num_threads(before)
    for name, first in results[0].items():
        for other in results[1:]:
            assert torch.equal(first.A, other[name].A) and torch.equal(first.B, other[name].B)


def test_the_order_of_the_modules_changes_no_bit(folders, tmp_path):
    """Files hold their tensors in any order: each module comes out the same."""
    target = tmp_path / "reversed"
    target.mkdir()
    tensors = load_file(folders[0] / "adapter_model.safetensors")
    torch.save(dict(reversed(tensors.items())), target / "adapter_model.bin")
    (target / "adapter_config.json").write_text((folders[0] / "adapter_config.json").read_text())
    recipe = {"method": "dare_ties", "density": 0.5, "scope": "model", "rank": 4}
    one = merge_engine.merge(folders, **recipe).modules
    other = merge_engine.merge([target, *folders[1:]], **recipe).modules
    for name in one:
        assert torch.equal(one[name].A, other[name].A) and torch.equal(one[name].B, other[name].B)


def test_densities_by_module_and_by_adapter(folders):
    table = {"q_proj": 0.1, ".*": [0.5, 0.2, 0.9]}
    merged = merge_engine.merge(folders, method="magnitude_prune", density=table, weights=[1, 0, 0], rank=32)
    for name, delta in deltas_of(merged).items():
        wanted = int((0.1 if name.endswith("q_proj") else 0.5) * delta.numel())
        assert (delta.abs() > 1e-4).sum().item() <= wanted
        assert (delta.abs() > 1e-5).sum().item() >= 0.95 * wanted


def test_nothing_is_logged_or_shown_without_a_terminal(folders, tmp_path, capfd, caplog):
    caplog.set_level(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_engine.merge(folders, tmp_path / "out", method="ties")
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
