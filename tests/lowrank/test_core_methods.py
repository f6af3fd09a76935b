"""Methods on cores against their dense textbook in float64, and the identities that their formulas have."""

import math

import pytest
import spectral_textbook as textbook
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_adapters import Adapters, adapters, drawn, generator, orthonormal

from merge_engine.lowrank.core_methods import CORE_METHODS, MergedCore
from merge_engine.lowrank.cores import TOLERANCE, Cores
from merge_engine.lowrank.stack import Stack

U32 = 2.0**-24
METHODS = sorted(CORE_METHODS)
MEANS = {"actmat", "multislerp", "karcher"}  # which use weights as shares


def on_cores(method: str, given: Adapters, **options) -> tuple[Stack, MergedCore]:
    stack = Stack(given.As, given.Bs)
    return stack, CORE_METHODS[method](Cores(stack, given.scalings), given.weights, **options)


def merged(method: str, given: Adapters, **options) -> torch.Tensor:
    """The merged delta [M, N] in float64: between the Q of an ordinary QR of the stacked factors."""
    core = on_cores(method, given, **options)[1].core
    left = torch.linalg.qr(torch.cat([B.double() for B in given.Bs], dim=1))[0]
    right = torch.linalg.qr(torch.cat([A.double() for A in given.As]).T)[0]
    return left @ core @ right.T


def textbook_of(method: str, given: Adapters, **options) -> torch.Tensor:
    return textbook.METHODS[method](given.deltas, given.weights, **options)


def share_lost(method: str, given: Adapters) -> float:
    """The share that two computations in float64 may differ by: 1e-10 where all that is divided by is above 1e-3.

    SVDs of 40 columns lose 40 * 2**-53 = 5e-15 or so, and a division by c makes that 5e-15 / c; for actmat 5e-15 / c^2,
    since the textbook inverts a Gram matrix. What is seen is a hundredth of it.
    """
    grown = max(1.0, 1e-3 / textbook.condition(method, given.deltas, given.weights))
    return 1e-10 * (grown**2 if method == "actmat" else grown)


def assume_clear(given: Adapters) -> None:
    """No rank hangs on a singular value near the limit, or on a sum that cancels: results jump there, as they must."""
    used = [delta for delta, w in zip(given.deltas, given.weights, strict=True) if w != 0]
    left, _, right = textbook.unit_directions(given.deltas, given.weights)
    total = textbook.linear(given.deltas, given.weights)
    for matrix in [*used, left, right, total, textbook.tsv(given.deltas, given.weights), torch.cat(given.deltas)]:
        if matrix.numel() and matrix.any():
            s = torch.linalg.svdvals(matrix)
            assume(not ((s > s[0] * TOLERANCE / 64) & (s < s[0] * TOLERANCE * 64)).any())
    summands = sum(abs(w) * float(d.norm()) for d, w in zip(given.deltas, given.weights, strict=True))
    assume(float(total.norm()) > 1e-3 * summands or summands == 0)


def close(found: torch.Tensor, wanted: torch.Tensor, share: float) -> None:
    assert float((found - wanted).norm()) <= share * float(wanted.norm())


@pytest.mark.quick
@pytest.mark.parametrize("method", METHODS)
def test_cores_give_what_dense_deltas_give(method):
    given = drawn(0, 23, 31, [3, 5, 4], [0.7, -1.2, 0.4])
    wanted = textbook_of(method, given)
    assert float(wanted.norm()) > 1
    close(merged(method, given), wanted, 1e-12)


@settings(max_examples=120)
@given(method=st.sampled_from(METHODS), given=adapters())
def test_any_adapters(method, given):
    assume_clear(given)
    wanted, lost = textbook_of(method, given), share_lost(method, given)
    close(merged(method, given), wanted, lost)
    stack, found = on_cores(method, given)
    assert abs(found.norm - float(wanted.norm())) <= lost * float(wanted.norm())
    rank = min(len(side) for side in stack.triangles)
    result = stack.unfold(found.core, rank, noise=found.noise)
    K = max(found.rank, 1)
    close(result.B.double() @ result.A.double(), wanted, lost + 2 * U32 * K)


@settings(max_examples=40)
@given(given=adapters(), ridge=st.sampled_from([0.0, 0.01, 0.3, 3.0]))
def test_any_ridge(given, ridge):
    assume_clear(given)
    close(
        merged("actmat", given, ridge=ridge),
        textbook_of("actmat", given, ridge=ridge),
        share_lost("actmat", given),
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("apart", [1e-2, 1e-4])
def test_rows_that_are_nearly_parallel(method, apart):
    """A that was drawn once and trained apart: what is divided by falls to ``apart``, and no further."""
    shared = drawn(1, 30, 30, [4, 4], [1.0, 0.6])
    shared = shared._replace(As=[shared.As[0], shared.As[0] + apart * shared.As[1]])
    condition = textbook.condition(method, shared.deltas, shared.weights)
    if method not in ("karcher", "multislerp"):
        assert 0.01 * apart < condition < apart
    close(merged(method, shared), textbook_of(method, shared), share_lost(method, shared))


# --- identities


PAIR = drawn(2, 19, 26, [3, 5], [0.8, 0.6])
TRIPLE = drawn(3, 33, 28, [2, 7, 4], [0.9, 1.3, -0.6])


@pytest.mark.parametrize("method", METHODS)
def test_order_does_not_matter(method):
    order = [2, 0, 1]
    turned = Adapters(*([side[t] for t in order] for side in TRIPLE))
    close(merged(method, turned), merged(method, TRIPLE), 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_larger_adapters_make_a_larger_merge(method):
    larger = TRIPLE._replace(scalings=[3 * s for s in TRIPLE.scalings])
    close(merged(method, larger), 3 * merged(method, TRIPLE), 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_larger_weights(method):
    times = 1 if method in MEANS else 3  # only ratios matter to these
    larger = TRIPLE._replace(weights=[3 * w for w in TRIPLE.weights])
    close(merged(method, larger), times * merged(method, TRIPLE), 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_all_weights_negated(method):
    times = 1 if method == "multislerp" else -1  # its formula divides one sign by another
    negated = TRIPLE._replace(weights=[-w for w in TRIPLE.weights])
    close(merged(method, negated), times * merged(method, TRIPLE), 1e-12)


@pytest.mark.parametrize("method", sorted({*METHODS} - {"multislerp"}))
def test_a_negative_weight_merges_the_opposite_adapter(method):
    """w tau = (-w) (-tau), for one adapter of three."""
    opposite = TRIPLE._replace(weights=[0.9, 1.3, 0.6], scalings=[*TRIPLE.scalings[:2], -TRIPLE.scalings[2]])
    close(merged(method, opposite), merged(method, TRIPLE), 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_scale_is_that_of_the_unfolded_factors(method):
    stack, found = on_cores(method, TRIPLE)
    plain = stack.unfold(found.core, 13)
    scaled = stack.unfold(-0.3 * found.core, 13)
    close(scaled.B.double() @ scaled.A.double(), -0.3 * (plain.B.double() @ plain.A.double()), 4 * U32)


@pytest.mark.parametrize("method", METHODS)
def test_how_deltas_are_split_does_not_matter(method):
    """(B G, G^-1 A) is the same adapter as (B, A)."""
    wide = drawn(3, 33, 28, [2, 7, 4], [0.9, 1.3, -0.6], dtype=torch.float64)
    As, Bs = [], []
    for t, (A, B) in enumerate(zip(wide.As, wide.Bs, strict=True)):
        G = torch.randn(len(A), len(A), generator=generator(t), dtype=torch.float64)
        As.append(torch.linalg.solve(G, A))
        Bs.append(B @ G)
    # Inverses of these lose less than 1e-12.
    close(merged(method, wide._replace(As=As, Bs=Bs)), merged(method, wide), 1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_rows_without_columns_do_not_matter(method):
    """Ranks that are padded: B with columns of zeros, A with rows of anything."""
    As = [torch.cat([A, torch.randn(3, A.shape[1], generator=generator(9))]) for A in TRIPLE.As]
    Bs = [torch.nn.functional.pad(B, (0, 3)) for B in TRIPLE.Bs]
    close(merged(method, TRIPLE._replace(As=As, Bs=Bs)), merged(method, TRIPLE), 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_rotations_of_both_sides_pass_through(method):
    """f(P tau Q) = P f(tau) Q."""
    P, Q = orthonormal(5, 33, 33), orthonormal(6, 28, 28)
    turned = TRIPLE._replace(As=[A.double() @ Q for A in TRIPLE.As], Bs=[P @ B.double() for B in TRIPLE.Bs])
    close(merged(method, turned), P @ merged(method, TRIPLE) @ Q, 1e-12)


@pytest.mark.parametrize("method", ["iso_c", "karcher", "multislerp", "tsv", "tsv_iso"])
def test_transposed(method):
    """f(tau^T) = f(tau)^T; not so for actmat, which asks for rows."""
    turned = TRIPLE._replace(As=[B.T for B in TRIPLE.Bs], Bs=[A.T for A in TRIPLE.As])
    close(merged(method, turned), merged(method, TRIPLE).T, 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_of_zero_leaves_the_adapter_out(method):
    without = Adapters(*(side[:2] for side in TRIPLE))
    close(merged(method, TRIPLE._replace(weights=[0.9, 1.3, 0.0])), merged(method, without), 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_adapter_changes_nothing(method):
    zero = Adapters([*PAIR.As, PAIR.As[0]], [*PAIR.Bs, 0 * PAIR.Bs[0]], [*PAIR.scalings, 1.0], [*PAIR.weights, 2.0])
    close(merged(method, zero), merged(method, PAIR), 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_to_merge_is_zero(method):
    for nothing in (
        PAIR._replace(weights=[0.0, 0.0]),
        PAIR._replace(scalings=[0.0, 0.0]),
        PAIR._replace(Bs=[0 * B for B in PAIR.Bs]),
    ):
        stack, found = on_cores(method, nothing)
        assert found.rank == 0 and found.norm == 0
        result = stack.unfold(found.core, 4, noise=found.noise)
        assert not result.B.any() and result.energy == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sides", [(12, 20), (4, 6)])
def test_one_adapter(method, sides):
    one = drawn(7, *sides, [5], [0.7])
    delta = one.deltas[0]
    u, s, vh = textbook.svd(delta)
    k = len(s)
    unit = s / s.norm()
    wanted = {
        "iso_c": 0.7 * s.mean() * u @ vh,
        "tsv_iso": 0.7 * s.mean() * u @ vh,
        # mu = ridge / k of the unit delta, and each singular value is damped by its own.
        "actmat": (u * (s * unit**2 / (unit**2 + 1 / k))) @ vh,
        "multislerp": delta,
        "karcher": delta,
    }.get(method, 0.7 * delta)
    close(merged(method, one), wanted, 1e-12)


def orthogonal_adapters() -> Adapters:
    left, right = orthonormal(1, 30, 9), orthonormal(2, 25, 9)
    g = generator(3)
    As = [torch.randn(3, 3, generator=g, dtype=torch.float64) @ right[:, 3 * t : 3 * t + 3].T for t in range(3)]
    Bs = [left[:, 3 * t : 3 * t + 3] for t in range(3)]
    return Adapters(As, Bs, [1.0, 2.0, 0.5], [0.9, -1.4, 0.3])


def test_orthogonal_adapters_are_added_by_tsv():
    given = orthogonal_adapters()
    close(merged("tsv", given), textbook.linear(given.deltas, given.weights), 1e-12)


def test_orthogonal_rows_are_added_by_actmat_without_a_ridge():
    given = orthogonal_adapters()
    wanted = textbook.linear(given.deltas, [1.0, -1.0, 1.0])
    close(merged("actmat", given, ridge=0.0), wanted, 1e-10)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.3, 0.2]])
def test_without_a_ridge_actmat_answers_every_adapter_on_its_own_rows(weights):
    """X A_t^T = tau_t A_t^T for independent rows, whatever the weights."""
    given = PAIR._replace(weights=weights)
    found = merged("actmat", given, ridge=0.0)
    for delta, A in zip(given.deltas, given.As, strict=True):
        close(found @ A.double().T, delta @ A.double().T, 1e-10)


def test_a_large_ridge_leaves_the_numerator():
    """X mu -> sum w tau G: the inverse is 1 / mu to a share of 1 / ridge or so."""
    ridge = 1e9
    mu = ridge * sum(map(abs, PAIR.weights)) / 8
    numerator = sum(
        w * delta @ delta.T @ delta / delta.square().sum() for w, delta in zip(PAIR.weights, PAIR.deltas, strict=True)
    )
    close(mu * merged("actmat", PAIR, ridge=ridge), numerator, 8 / ridge)


@pytest.mark.parametrize("copies", [2, 3])
def test_copies_of_one_adapter_are_that_adapter_to_tsv(copies):
    given = drawn(8, 21, 17, [4], [1.0])
    many = Adapters(given.As * copies, given.Bs * copies, given.scalings * copies, [1.0] * copies)
    _, found = on_cores("tsv", many)
    close(merged("tsv", many), given.deltas[0], 1e-12)
    assert found.rank == 4
    assert found.smallest == pytest.approx(math.sqrt(copies), abs=1e-12)


@pytest.mark.parametrize("method", ["tsv", "tsv_iso", "iso_c"])
def test_copies_that_cancel_are_nothing(method):
    given = drawn(8, 21, 17, [4], [1.0])
    _, found = on_cores(method, Adapters(given.As * 2, given.Bs * 2, [1.0, 1.0], [1.0, -1.0]))
    assert found.rank == 0 and found.norm == 0


@pytest.mark.parametrize("method", METHODS)
def test_null_directions_are_never_used(method):
    """Copies, and an adapter of less than its rank, disturbed by 1e-13: directions that are 0 could turn anywhere."""
    given = drawn(8, 21, 17, [4, 4, 3], [1.0, 0.8, 0.5], dtype=torch.float64)
    As = [given.As[0], given.As[0], given.As[2]]
    Bs = [given.Bs[0], given.Bs[0], given.Bs[2] @ torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))]
    given = given._replace(As=As, Bs=Bs)
    noise = [1e-13 * torch.randn(B.shape, generator=generator(t), dtype=torch.float64) for t, B in enumerate(Bs)]
    disturbed = given._replace(Bs=[B + change for B, change in zip(Bs, noise, strict=True)])
    # Disturbed by 1e-13, and made larger by less than 100 by what does count.
    close(merged(method, disturbed), merged(method, given), 1e-11)


def test_rounding_to_float32_makes_no_new_directions():
    """The same delta split twice and rounded: 4 directions and not 8, all the same strong."""
    given = drawn(11, 60, 50, [4], [1.0], dtype=torch.float64)
    G = torch.randn(4, 4, generator=generator(12), dtype=torch.float64)
    As = [given.As[0].float(), torch.linalg.solve(G, given.As[0]).float()]
    Bs = [given.Bs[0].float(), (given.Bs[0] @ G).float()]
    twice = Adapters(As, Bs, [0.5, 0.5], [1.0, 1.0])
    for method in ("iso_c", "tsv_iso"):
        assert on_cores(method, twice)[1].rank == 4
        u, s, vh = textbook.svd(0.5 * given.deltas[0] / given.scalings[0])
        wanted = (2 if method == "iso_c" else 1) * s.mean() * u @ vh
        close(merged(method, twice), wanted, 100 * U32)


# --- diagnostics and requests


def test_rank_and_smallest_singular_value():
    u, _, vh = textbook.unit_directions(TRIPLE.deltas, TRIPLE.weights)
    smallest = min(float(torch.linalg.svdvals(side)[-1]) for side in (u, vh))
    for method in ("tsv", "tsv_iso"):
        _, found = on_cores(method, TRIPLE)
        assert found.rank == 13 and found.smallest == pytest.approx(smallest, rel=1e-10)
    s = torch.linalg.svdvals(textbook.linear(TRIPLE.deltas, TRIPLE.weights))
    _, found = on_cores("iso_c", TRIPLE)
    assert found.rank == 13 and found.smallest == pytest.approx(float(s[12] / s[0]), rel=1e-10)
    _, found = on_cores("actmat", TRIPLE)
    assert found.rank == 13 and found.smallest == pytest.approx(float(torch.linalg.svdvals(vh)[-1]), rel=1e-10)
    _, found = on_cores("karcher", TRIPLE)
    assert found.rank == 13 and found.smallest is None


@pytest.mark.parametrize("method", ["iso_c", "tsv_iso"])
def test_a_flat_spectrum_loses_what_a_cut_cuts(method):
    stack, found = on_cores(method, TRIPLE)
    assert stack.unfold(found.core, 6).energy == pytest.approx(6 / 13, abs=1e-12)
    assert stack.unfold(found.core, 13).energy == pytest.approx(1, abs=1e-12)


def test_results_do_not_depend_on_what_was_asked_before():
    cores = Cores(Stack(TRIPLE.As, TRIPLE.Bs), TRIPLE.scalings)
    for weights in ([0.9, 1.3, -0.6], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.9, 1.3, -0.6]):
        for method in METHODS:
            fresh = Cores(Stack(TRIPLE.As, TRIPLE.Bs), TRIPLE.scalings)
            assert torch.equal(CORE_METHODS[method](cores, weights).core, CORE_METHODS[method](fresh, weights).core)


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_do_not_fit(method):
    for weights in ([1.0], [1.0, math.nan], [math.inf, 1.0]):
        with pytest.raises(ValueError, match="weight"):
            on_cores(method, PAIR._replace(weights=weights))


def test_options_that_do_not_fit():
    assert {name: dict(method.options) for name, method in CORE_METHODS.items() if method.options} == {
        "actmat": {"ridge": 1.0}
    }
    with pytest.raises(ValueError, match=r"got options \['ridge'\], wanted no others than \[\]"):
        on_cores("tsv", PAIR, ridge=1.0)
    for ridge in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="ridge is"):
            on_cores("actmat", PAIR, ridge=ridge)
