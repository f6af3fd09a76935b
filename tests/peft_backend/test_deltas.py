"""The svd types: as near to the merged delta as stock PEFT, on every kind of layer, and nearer where PEFT cannot."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from peft.utils import merge_utils
from peft_zoo import (
    HAS_STOCK_SVD,
    KINDS,
    LAYERS,
    Spec,
    both,
    build,
    factors,
    has_doubled_svd_scaling,
    layers,
    product,
)

from merge_engine.errors import AdapterError
from merge_engine.peft_backend import layers as peft_backend_layers
from merge_engine.peft_backend.drop_in import add_weighted_adapter
from merge_engine.peft_backend.layers import _describe

SVD_TYPES = ["svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"]
pytestmark = pytest.mark.filterwarnings("ignore:The density:UserWarning")


@st.composite
def specs(draw, kinds=HAS_STOCK_SVD):
    combination = draw(st.sampled_from(SVD_TYPES))
    count = draw(st.integers(2, 4))
    configs = tuple(
        {
            "r": draw(st.integers(1, 5)),
            "lora_alpha": draw(st.integers(1, 9)),
            "alpha_pattern": draw(st.sampled_from([{}, {"one|two|three": 7}])),
            "use_rslora": draw(st.booleans()),
            "target_modules": draw(st.lists(st.sampled_from(LAYERS), min_size=1, max_size=3, unique=True)),
        }
        for _ in range(count)
    )
    density = draw(st.one_of(st.sampled_from([0.0, 0.5, 1, 1.5]), st.floats(0.05, 0.95)))
    return Spec(
        kind=draw(st.sampled_from(kinds)),
        configs=configs,
        weights=tuple(
            draw(st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(-2, 2, width=32))) for _ in range(count)
        ),
        scales=tuple(draw(st.sampled_from([1.0, 0.5, -2.0])) for _ in range(count)),
        call={
            "combination_type": combination,
            "density": 0.5 if "dare" in combination and not density else density,
            "majority_sign_method": draw(st.sampled_from(["total", "frequency"])),
            "svd_rank": draw(st.sampled_from([1, 2, 4])),  # PEFT fails above min(M, N)
        },
    )


def merged_deltas(model, spec):
    """{layer: the merged delta [M, N] before its cut}, by PEFT's own functions, each scaling once."""
    combination, density = spec.call["combination_type"], spec.call.get("density")
    elects = {"majority_sign_method": spec.call.get("majority_sign_method", "total")}
    found = {}
    for name, layer in layers(model).items():
        have = [i for i, adapter in enumerate(spec.names) if adapter in layer.scaling]
        if not have:
            continue
        deltas = [layer.get_delta_weight(spec.names[i]).detach() for i in have]
        weights = torch.tensor([float(spec.weights[i]) for i in have])
        full = {
            "svd": lambda d=deltas, w=weights: merge_utils.task_arithmetic(d, w),
            "ties_svd": lambda d=deltas, w=weights: merge_utils.ties(d, w, density, **elects),
            "dare_linear_svd": lambda d=deltas, w=weights: merge_utils.dare_linear(d, w, density),
            "dare_ties_svd": lambda d=deltas, w=weights: merge_utils.dare_ties(d, w, density, **elects),
            "magnitude_prune_svd": lambda d=deltas, w=weights: merge_utils.magnitude_prune(d, w, density),
        }[combination]().flatten(1)
        transposed = spec.kind == "embedding" or getattr(layer, "fan_in_fan_out", False)
        found[name] = (full.T if transposed else full).double()
    return found


def errors(deltas, model, adapter):
    merged = factors(model, adapter)
    return {name: (product(*merged[name]) - delta).norm().item() for name, delta in deltas.items()}


def check(spec, exact=False, stock=True):
    """Ours is the best cut of the merged delta, and so is stock's, where it is asked."""
    model = build(spec)
    if stock:
        both(spec, model, svd="exact" if exact else "subspace")
    else:
        add_weighted_adapter(model, spec.names, list(spec.weights), "ours", **spec.call)
    drops = "dare" in spec.call["combination_type"]
    if drops and has_doubled_svd_scaling():
        return  # what stock has drawn cannot be told from what it has scaled
    wanted = drawn_deltas(spec) if drops else merged_deltas(model, spec)
    rivals = ["ours", "theirs"] if stock and not has_doubled_svd_scaling() else ["ours"]
    for rival in rivals:
        found = errors(wanted, model, rival)
        for name, delta in wanted.items():
            best = torch.linalg.svdvals(delta)[spec.call["svd_rank"] :].norm().item()
            assert found[name] <= best * (1 + 1e-4) + 1e-5 * delta.norm().item() + 1e-9, f"{rival}: {name}"


def drawn_deltas(spec):
    """The dropped and merged deltas, caught between PEFT's drop and its SVD: all draws are PEFT's."""
    from peft.tuners.lora import model as lora_model

    model, caught = build(spec), []
    with pytest.MonkeyPatch.context() as patch:
        for function in ("dare_linear", "dare_ties"):
            right = getattr(lora_model, function)

            def catch(*arguments, right=right):
                caught.append(right(*arguments))
                return caught[-1]

            patch.setattr(lora_model, function, catch)
        torch.manual_seed(3)
        model.base_model.add_weighted_adapter(spec.names, list(spec.weights), "drawn", **spec.call)
    found = {}
    for (name, layer), delta in zip(
        (at for at in layers(model).items() if "drawn" in at[1].scaling), caught, strict=True
    ):
        transposed = spec.kind == "embedding" or getattr(layer, "fan_in_fan_out", False)
        flat = delta.flatten(1)
        found[name] = (flat.T if transposed else flat).double()
    return found


@settings(deadline=None, derandomize=True, max_examples=40)
@given(specs(), st.booleans())
def test_any_configuration_is_as_near_to_the_merged_delta_as_stock(spec, exact):
    check(spec, exact)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in HAS_STOCK_SVD])
@pytest.mark.parametrize("combination", ["svd", "ties_svd", "magnitude_prune_svd"])
def test_kinds_that_stock_cannot_cut(kind, combination):
    call = {"combination_type": combination, "svd_rank": 3, "density": 0.4}
    spec = Spec(kind=kind, call=call)
    with pytest.raises(RuntimeError):
        build(spec).base_model.add_weighted_adapter(spec.names, list(spec.weights), "theirs", **call)
    model = build(spec)
    add_weighted_adapter(model, spec.names, spec.weights, "ours", **call)
    for name, layer in layers(model).items():
        deltas = [product(*factors(model, adapter)[name]).float() * layer.scaling[adapter] for adapter in spec.names]
        merge = {"svd": merge_utils.task_arithmetic, "ties_svd": merge_utils.ties}
        density = () if combination == "svd" else (0.4,)
        full = merge.get(combination, merge_utils.magnitude_prune)(deltas, torch.tensor(spec.weights), *density)
        best = torch.linalg.svdvals(full.double())[3:].norm().item()
        error = (product(*factors(model, "ours")[name]) - full).norm().item()
        assert error <= best * (1 + 1e-4) + 1e-5 * full.norm().item()


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["linear", "wide", "conv1d_transposed"])
def test_a_rank_above_the_smaller_side_is_filled_up_with_zeros(kind):
    """Stock fails, or leaves factors of two ranks."""
    spec = Spec(kind=kind, configs=({}, {}), weights=(1.0, 0.5), call={"combination_type": "ties_svd"})
    model = build(spec)
    call = {**spec.call, "svd_rank": 8, "density": 0.5}
    add_weighted_adapter(model, spec.names, spec.weights, "ours", **call)
    spec.call = call
    for name, delta in merged_deltas(model, spec).items():
        A, B = factors(model, "ours")[name]
        assert A.shape[0] == B.shape[1] == 8
        torch.testing.assert_close(product(A, B), delta, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("combination", SVD_TYPES)
def test_half_precision_keeps_its_dtype(dtype, combination):
    """Merged in float32 and rounded once; stock rounds the deltas and overflows float32 factors."""
    spec = Spec(dtype=dtype, call={"combination_type": combination, "svd_rank": 5, "density": 0.6})
    model = build(spec)
    add_weighted_adapter(model, spec.names, spec.weights, "ours", **spec.call, seed=1, rng="philox")
    wide = build(spec)
    for parameter in wide.parameters():
        parameter.data = parameter.data.float()
    add_weighted_adapter(wide, spec.names, spec.weights, "ours", **spec.call, seed=1, rng="philox")
    for name, (A, B) in factors(model, "ours").items():
        want = product(*factors(wide, "ours")[name])
        assert A.dtype == B.dtype == dtype
        assert (product(A, B) - want).norm() <= 4 * torch.finfo(dtype).eps * want.norm()


@pytest.mark.parametrize("combination", ["svd", "ties_svd", "magnitude_prune_svd", "dare_linear_svd"])
@pytest.mark.parametrize("kind", ["linear", "wide", "conv1d_transposed", "embedding", "conv2d", "attention"])
def test_a_clamp_is_stocks(kind, combination):
    """Its limit is a quantile of signed values, so the singular vectors must have the signs of stock's."""
    call = {"combination_type": combination, "svd_rank": 3, "density": 0.5, "svd_clamp": 0.8}
    model = both(Spec(kind=kind, call=call))
    theirs, ours = factors(model, "theirs"), factors(model, "ours")
    for name, pair in theirs.items():
        for their, our in zip(pair, ours[name], strict=True):
            torch.testing.assert_close(our, their, rtol=1e-3, atol=1e-4)


def test_a_clamp_cuts_both_factors_at_the_quantile():
    spec = Spec(call={"combination_type": "ties_svd", "svd_rank": 3, "density": 0.5})
    model = build(spec)
    add_weighted_adapter(model, spec.names, spec.weights, "free", **spec.call, svd="exact")
    add_weighted_adapter(model, spec.names, spec.weights, "clamped", **spec.call, svd_clamp=0.9)
    for name, (A, B) in factors(model, "free").items():
        top = torch.cat([A.flatten(), B.flatten()]).quantile(0.9).item()
        clamped = factors(model, "clamped")[name]
        for free, cut in zip((A, B), clamped, strict=True):
            torch.testing.assert_close(cut, free.clamp(-top, top))


def test_a_doubled_scaling_is_noticed(monkeypatch):
    right = _describe

    def doubled(layer, part):
        return right(layer, part._replace(scaling=part.scaling**2))

    spec = Spec(call={"combination_type": "ties_svd", "svd_rank": 2, "density": 0.5})
    check(spec, stock=False)
    monkeypatch.setattr(peft_backend_layers, "_describe", doubled)
    with pytest.raises(AssertionError):
        check(spec, stock=False)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
def test_convolutions_in_groups_merge_factors_and_nothing_else(monkeypatch):
    monkeypatch.setitem(KINDS, "grouped", lambda: torch.nn.Conv2d(4, 6, 3, groups=2))
    spec = Spec(kind="grouped", configs=({"r": 4}, {"r": 4}), weights=(1.0, 0.5), call={"combination_type": "linear"})
    both(spec)
    model = build(spec)
    before = set(model.state_dict())
    for combination in ("cat", "svd", "ties_svd"):
        with pytest.raises(AdapterError, match="grouped convolution"):
            add_weighted_adapter(model, spec.names, spec.weights, "ours", combination_type=combination, density=0.5)
    assert set(model.state_dict()) == before


@pytest.mark.parametrize("combination", ["ties_svd", "dare_ties_svd", "svd"])
def test_both_backends_merge_the_same_deltas(combination):
    spec = Spec(kind="conv2d", call={"combination_type": combination, "density": 0.5, "svd_rank": 2})
    model = build(spec)
    for backend in ("torch", "triton"):
        add_weighted_adapter(model, spec.names, spec.weights, backend, **spec.call, seed=1, backend=backend)
    for name, pair in factors(model, "torch").items():
        other = factors(model, "triton")[name]
        torch.testing.assert_close(product(*other), product(*pair), rtol=1e-3, atol=1e-4)
