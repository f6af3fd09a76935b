"""Pico's balance and the automatic scale, against dense deltas and by hand."""

import math

import pytest
import spectral_textbook as textbook
import torch
from hypothesis import given, settings
from small_adapters import Adapters, adapters, drawn, generator, orthonormal

from merge_engine.lowrank.auto_scale import auto_scale
from merge_engine.lowrank.balance import balanced, pico, pico_strengths
from merge_engine.lowrank.core_methods import CORE_METHODS
from merge_engine.lowrank.cores import Cores
from merge_engine.lowrank.stack import Stack

U32 = 2.0**-24
TRIPLE = drawn(1, 25, 35, [3, 6, 2], [0.9, -0.4, 1.3])


def opened(given: Adapters) -> tuple[Stack, Cores]:
    stack = Stack(given.As, given.Bs)
    return stack, Cores(stack, given.scalings)


def close(found: torch.Tensor, wanted: torch.Tensor, lost: float) -> None:
    assert float((found - wanted).norm()) <= lost


@pytest.mark.quick
def test_pico_makes_new_factors():
    wide = TRIPLE._replace(Bs=[B.double() for B in TRIPLE.Bs])
    Bs = pico(*opened(wide), wide.Bs)
    for t, wanted in enumerate(textbook.pico(wide.deltas)):
        assert Bs[t].dtype == torch.float64 and Bs[t].shape == wide.Bs[t].shape
        close(wide._replace(Bs=Bs).deltas[t], wanted, 1e-12 * float(wanted.norm()))


@settings(max_examples=60)
@given(given=adapters())
def test_any_adapters(given):
    stack, cores = opened(given)
    Bs = pico(stack, cores, given.Bs)
    after = balanced(cores)
    eye = torch.eye(cores.shape[1], dtype=torch.float64)
    for t, wanted in enumerate(textbook.pico(given.deltas)):
        size = abs(given.scalings[t]) * float(given.As[t].double().norm() * given.Bs[t].double().norm())
        assert Bs[t].dtype == (torch.float64 if given.Bs[t].dtype == torch.float64 else torch.float32)
        close(given._replace(Bs=Bs).deltas[t], wanted, (2 * U32 + 1e-12) * size)
        left, right = after.factors(t)
        close(stack.columns(left) @ (stack.rows(eye).T @ right).T, wanted, 1e-12 * size)
    assert torch.equal(cores.left, opened(given)[1].left)  # those of before are as they were


def test_the_strengths_of_known_spectra():
    """Two adapters of one direction each: a shared one carries all energy, and gets 1 / T; orthogonal ones share it."""
    u, v = orthonormal(2, 10, 2), orthonormal(3, 8, 2)
    alike = Adapters([v[:, :1].T, v[:, 1:].T], [u[:, :1], u[:, :1]], [1.0, 2.0], [1.0, 1.0])
    assert pico_strengths(opened(alike)[1]).tolist() == pytest.approx([1 / 2], abs=1e-14)
    apart = alike._replace(Bs=[u[:, :1], u[:, 1:]])
    # Energies 4/5 and 1/5.
    assert pico_strengths(opened(apart)[1]).tolist() == pytest.approx([1 / 1.8, 1 / 1.2], abs=1e-14)


def test_one_adapter_stays_as_it_is():
    one = drawn(4, 20, 30, [5])
    (B,) = pico(*opened(one), one.Bs)
    assert torch.equal(B, one.Bs[0])


def test_zero_adapters_stay_zero_and_are_counted():
    zero = TRIPLE._replace(Bs=[0 * B for B in TRIPLE.Bs])
    assert not any(B.any() for B in pico(*opened(zero), zero.Bs))
    one = drawn(5, 20, 30, [1])
    pair = Adapters(one.As * 2, [one.Bs[0], 0 * one.Bs[0]], [1.0, 1.0], [1.0, 1.0])
    changed = pico(*opened(pair), pair.Bs)
    close(changed[0].double(), one.Bs[0].double() / 2, 2 * U32 * float(one.Bs[0].norm()))


def test_how_deltas_are_split_does_not_matter():
    wide = drawn(6, 25, 35, [3, 6], dtype=torch.float64)
    G = torch.randn(6, 6, generator=generator(7), dtype=torch.float64)
    other = wide._replace(As=[wide.As[0], torch.linalg.solve(G, wide.As[1])], Bs=[wide.Bs[0], wide.Bs[1] @ G])
    one, two = (given._replace(Bs=pico(*opened(given), given.Bs)).deltas for given in (wide, other))
    for first, second in zip(one, two, strict=True):
        close(first, second, 1e-11 * float(first.norm()))


@pytest.mark.parametrize("method", sorted(CORE_METHODS))
def test_methods_on_balanced_cores_merge_what_pico_makes(method):
    wide = TRIPLE._replace(Bs=[B.double() for B in TRIPLE.Bs])
    stack, cores = opened(wide)
    core = CORE_METHODS[method](balanced(cores), wide.weights).core
    found = stack.columns(core) @ stack.rows(torch.eye(cores.shape[1], dtype=torch.float64))
    wanted = textbook.METHODS[method](textbook.pico(wide.deltas), wide.weights)
    close(found, wanted, 1e-11 * float(wanted.norm()))


def test_factors_that_do_not_fit():
    with pytest.raises(ValueError, match=r"B of ranks \[3, 6\], wanted \[3, 6, 2\]"):
        pico(*opened(TRIPLE), TRIPLE.Bs[:2])


# --- the automatic scale


def test_the_merge_gets_the_mean_norm():
    stack, cores = opened(TRIPLE)
    norms = cores.norms.tolist()
    for method in sorted(CORE_METHODS):
        merged = CORE_METHODS[method](cores, TRIPLE.weights)
        scale = auto_scale(norms, merged.norm, 1.4)
        result = stack.unfold(scale * merged.core, 11, noise=scale * merged.noise)
        norm = float((result.B.double() @ result.A.double()).norm())
        assert norm == pytest.approx(1.4 * sum(float(delta.norm()) for delta in TRIPLE.deltas) / 3, rel=4 * U32)


def test_scales_by_hand():
    assert auto_scale([3.0, 5.0], 2.0) == 2.0
    assert auto_scale([3.0, 5.0], 2.0, gain=0.25) == 0.5
    assert auto_scale([4.0], 4.0) == 1.0
    assert auto_scale([0.0, 0.0], 0.0) == 1.0
    assert auto_scale([1.0], 0.0, gain=7.0) == 1.0
    assert auto_scale([0.0, 3.0], 3.0) == 0.5


def test_scales_that_are_none():
    with pytest.raises(ValueError, match="no norms"):
        auto_scale([], 1.0)
    for norms, merged in (([1.0, math.nan], 1.0), ([1.0], math.inf), ([-1.0], 1.0), ([1.0], -1.0)):
        with pytest.raises(ValueError, match="wanted finite ones"):
            auto_scale(norms, merged)
    with pytest.raises(ValueError, match="gain"):
        auto_scale([1.0], 1.0, math.nan)
    with pytest.raises(ValueError, match="no finite scale"):
        auto_scale([1e300], 1e-300)
