"""Comparisons: figures against dense float64 deltas and whole-tensor counts."""

import json
import math
import tempfile
from itertools import combinations
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from compared import Q, V, normal, save_lora
from hypothesis import given, settings
from hypothesis import strategies as st

import merge_engine
from merge_engine.cpu import tile_grid as cpu_tile
from merge_engine.errors import AdapterError, RecipeError
from merge_engine.rules import reference


def whole(seed, rank, rows, columns, largest=3):
    """Factors of whole numbers: every product is exact in float32, in any order of summation."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (rank, columns), (rows, rank)
    return tuple(torch.randint(-largest, largest + 1, shape, generator=generator).float() for shape in shapes)


def dense(A, B, scaling=1.0):
    return scaling * (B.double() @ A.double())


def cosine(one, other):
    return float((one * other).sum() / (one.norm() * other.norm()))


def effective_rank(delta):
    values = torch.linalg.svdvals(delta)
    shares = values / values.sum()
    return math.exp(-float(torch.special.xlogy(shares, shares).sum()))


def signs_kept(A, B, density, scaling=1.0):
    """The textbook's trim of the whole float32 delta, as signs."""
    delta = reference.delta(A, B, scaling)
    k = delta.numel() if density >= 1 else int(density * delta.numel())
    return np.sign(reference.trim(delta, k, "exact").numpy()).astype(int)


def counts(one, other):
    """(kept by both, of these with different signs, kept by either)"""
    both = (one != 0) & (other != 0)
    return int(both.sum()), int((one[both] != other[both]).sum()), int(((one != 0) | (other != 0)).sum())


def contest(signs):
    """(elements that two or more keep, of these with both signs)"""
    kept = np.sum([each != 0 for each in signs], axis=0)
    both = np.any([each > 0 for each in signs], axis=0) & np.any([each < 0 for each in signs], axis=0)
    return int((kept >= 2).sum()), int(both.sum())


def defined(count, of):
    return count / of if of else math.nan


def same(value, wanted):
    return value == wanted or (math.isnan(value) and math.isnan(wanted))


@pytest.fixture(scope="module")
def peft_saved(tmp_path_factory):
    """({adapter: {module: delta in float64, by PEFT}}, folders): ranks, alphas and coverage differ."""
    peft = pytest.importorskip("peft")
    kinds = {
        "sql": {"r": 4, "lora_alpha": 8, "target_modules": ["0", "1"]},
        "chat": {"r": 7, "lora_alpha": 3, "use_rslora": True, "target_modules": ["0", "1"], "rank_pattern": {"1": 5}},
        "ads": {"r": 2, "lora_alpha": 2, "target_modules": ["1"]},
    }
    deltas, folders = {}, []
    for seed, (name, options) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(37, 23), torch.nn.Linear(23, 41))
        model = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **options))
        folders.append(tmp_path_factory.mktemp("adapters") / name)
        model.save_pretrained(folders[-1])
        layers = {key: layer for key, layer in model.double().base_model.model.named_children()}
        deltas[name] = {
            key: layer.get_delta_weight("default").detach() for key, layer in layers.items() if hasattr(layer, "r")
        }
    return deltas, folders


def test_factors_alone_say_what_dense_float64_deltas_say(peft_saved):
    deltas, folders = peft_saved
    result = merge_engine.interference(folders)
    assert result.adapters == tuple(deltas) and list(result.modules) == ["0", "1"]
    for module, figures in [*result.modules.items(), (None, result.overall)]:
        here = [{m: d for m, d in each.items() if module in (None, m)} for each in deltas.values()]
        for i, each in enumerate(here):
            norm = math.sqrt(sum(float(delta.square().sum()) for delta in each.values())) if each else math.nan
            rank = sum(map(effective_rank, each.values())) / len(each) if each else math.nan
            assert figures.norms[i] == pytest.approx(norm, rel=1e-12, nan_ok=True)
            assert figures.effective_ranks[i] == pytest.approx(rank, rel=1e-12, nan_ok=True)
        for i, j in combinations(range(3), 2):
            common = sorted(here[i].keys() & here[j].keys())
            flat = [torch.cat([here[k][m].flatten() for m in common]) for k in (i, j)] if common else None
            wanted = cosine(*flat) if flat else math.nan
            assert figures.cosine[i, j] == pytest.approx(wanted, rel=1e-10, nan_ok=True)
            assert figures.cosine[j, i] == pytest.approx(wanted, rel=1e-10, nan_ok=True)


@pytest.mark.parametrize("shape", [(31, 47), (3, 50), (50, 3), (1, 1)])
def test_cosines_of_factors_of_any_shape(tmp_path, shape):
    """Ranks may exceed a side of the delta."""
    factors = [normal(seed, rank, *shape) for seed, rank in enumerate([1, 4, 8, 17])]
    result = merge_engine.interference([save_lora(tmp_path / str(i), {Q: pair}) for i, pair in enumerate(factors)])
    deltas = [dense(*pair) for pair in factors]
    for i, j in combinations(range(4), 2):
        assert result.overall.cosine[i, j] == pytest.approx(cosine(deltas[i], deltas[j]), rel=1e-10)


def test_cosine_where_deltas_are_small_beside_their_factors(tmp_path):
    """|B A| = 1e-4 |B| |A| in both: the trace identity on A and B as they are would lose 8 of its 16 digits."""
    factors, exact = [], []
    (w, _), (_, b) = normal(8, 1, 60, 70), normal(9, 1, 60, 70)
    for seed in (0, 1):
        u, own = normal(seed, 1, 60, 70)
        A, column = torch.cat([u, u + 1e-4 * (w + u.flip(1))]), b + own
        factors.append((A, torch.cat([column, -column], dim=1)))
        exact.append((A[:1].double() - A[1:].double()) * column.double())  # one product: nothing cancels in the sum
    result = merge_engine.interference([save_lora(tmp_path / str(i), {Q: pair}) for i, pair in enumerate(factors)])
    wanted = cosine(*exact)
    assert abs(wanted) > 0.1
    assert result.overall.cosine[0, 1] == pytest.approx(wanted, rel=1e-10)
    assert result.overall.norms.tolist() == pytest.approx([float(each.norm()) for each in exact], rel=1e-10)


@st.composite
def comparisons(draw):
    """({module: shape}, [{module: (A, B)}], densities) of whole numbers, with many equal magnitudes."""
    shapes = {name: (draw(st.integers(1, 24)), draw(st.integers(1, 24))) for name in (Q, V)}
    adapters = []
    for number in range(draw(st.integers(2, 4))):
        having = draw(st.sampled_from([(Q,), (V,), (Q, V)]))
        rank, largest = draw(st.integers(1, 6)), draw(st.integers(0, 3))
        adapters.append({name: whole(10 * number + len(name), rank, *shapes[name], largest) for name in having})
    density = st.sampled_from([0.0, 0.2, 1.0]) | st.floats(0, 1)
    return shapes, adapters, [draw(density) for _ in adapters]


@settings(max_examples=40)
@given(comparisons(), st.sampled_from([32, 1 << 17]))
def test_counts_and_exact_products_of_whole_numbers(comparison, tile):
    shapes, adapters, densities = comparison
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(cpu_tile, "TILE_ELEMENTS", tile):
        folders = [save_lora(Path(folder, str(i)), each) for i, each in enumerate(adapters)]
        result = merge_engine.interference(folders, density=densities)
    sums = {}  # by pair: kept by both, opposed, kept by either
    contests = []
    for module, figures in result.modules.items():
        here = [i for i, each in enumerate(adapters) if module in each]
        signs = {i: signs_kept(*adapters[i][module], densities[i]) for i in here}
        exact = {i: dense(*adapters[i][module]) for i in here}  # whole numbers below 2^53
        contests.append(contest(list(signs.values())))
        assert (figures.contested, figures.conflicting) == contests[-1]
        assert figures.elements == math.prod(shapes[module])
        for i, j in combinations(range(len(adapters)), 2):
            if i in here and j in here:
                both, opposed, either = counts(signs[i], signs[j])
                sums[i, j] = [a + b for a, b in zip(sums.get((i, j), (0, 0, 0)), (both, opposed, either), strict=True)]
                norms = float(exact[i].norm() * exact[j].norm())
                wanted = defined(float((exact[i] * exact[j]).sum()), norms)
            else:
                both, opposed, either, wanted = 0, 0, 0, math.nan
            assert same(figures.conflict[i, j], defined(opposed, both))
            assert same(figures.overlap[j, i], defined(both, either))
            assert (figures.shared[i, j], figures.opposed[j, i]) == (both, opposed)
            assert figures.cosine[i, j] == pytest.approx(wanted, rel=1e-10, abs=1e-14, nan_ok=True)
        for i in here:
            kept = exact[i][torch.from_numpy(signs[i] != 0)].square().sum()
            assert figures.shared[i, i] == np.count_nonzero(signs[i])
            energy = defined(float(kept), float(exact[i].square().sum()))
            assert figures.kept_energy[i] == pytest.approx(energy, rel=1e-12, nan_ok=True)
    assert (result.overall.contested, result.overall.conflicting) == tuple(map(sum, zip(*contests, strict=True)))
    for (i, j), (both, opposed, either) in sums.items():
        assert same(result.overall.conflict[i, j], defined(opposed, both))
        assert same(result.overall.overlap[i, j], defined(both, either))


@pytest.mark.quick
def test_counts_over_several_real_tiles(tmp_path):
    factors = [whole(seed, rank, 301, 907) for seed, rank in enumerate([2, 3, 5])]
    folders = [save_lora(tmp_path / str(i), {Q: pair}) for i, pair in enumerate(factors)]
    figures = merge_engine.interference(folders, density=0.13).modules[Q]
    signs = [signs_kept(*pair, 0.13) for pair in factors]
    assert (figures.contested, figures.conflicting) == contest(signs)
    for i, j in combinations(range(3), 2):
        both, opposed, either = counts(signs[i], signs[j])
        assert 0 < opposed < both < either
        assert (figures.conflict[i, j], figures.overlap[i, j]) == (opposed / both, both / either)


def test_density_by_module_and_scaling(tmp_path):
    alphas = 6, -12
    pairs = [{Q: whole(seed, 2, 9, 11), V: whole(seed + 5, 3, 8, 7)} for seed in (0, 1)]
    folders = [save_lora(tmp_path / str(alpha), pair, alpha) for pair, alpha in zip(pairs, alphas, strict=True)]
    result = merge_engine.interference(folders, density={"q_proj": 0.5, ".*": [0.1, 1]})
    for module, rank, densities in ((Q, 2, (0.5, 0.5)), (V, 3, (0.1, 1))):
        scaled = [(*pair[module], alpha / rank) for pair, alpha in zip(pairs, alphas, strict=True)]
        signs = [signs_kept(A, B, d, s) for (A, B, s), d in zip(scaled, densities, strict=True)]
        both, opposed, _ = counts(*signs)
        assert result.modules[module].conflict[0, 1] == opposed / both
        wanted = cosine(*(dense(*each) for each in scaled))
        assert result.modules[module].cosine[0, 1] == pytest.approx(wanted, rel=1e-10)


@pytest.mark.quick
def test_the_same_adapter_twice(tmp_path):
    one = save_lora(tmp_path / "one", {Q: normal(0, 8, 40, 30)})
    result = merge_engine.interference([one, one], density=0.3)
    assert result.adapters == ("one", "one (2)")
    assert result.overall.cosine[0, 1] == pytest.approx(1, abs=1e-14)
    assert (result.overall.conflict[0, 1], result.overall.overlap[0, 1]) == (0, 1)
    assert (result.overall.conflict_rate, result.overall.shared[0, 1]) == (0, 360)
    assert any("one and one (2) point the same way (cosine 1.000)" in note for note in result.notes())


def test_an_adapter_and_its_opposite(tmp_path):
    A, B = normal(0, 8, 40, 30)
    folders = [save_lora(tmp_path / name, {Q: (A, b)}) for name, b in (("for", B), ("against", -3 * B))]
    result = merge_engine.interference(folders)
    assert result.overall.cosine[0, 1] == pytest.approx(-1, abs=1e-14)
    assert (result.overall.conflict[0, 1], result.overall.conflict_rate) == (1, 1)
    notes = result.notes()
    assert any("against has 3.0 times the norm of that of for" in note for note in notes)
    assert any("for and against point apart (cosine -1.000)" in note for note in notes)


@pytest.mark.parametrize("cancels", [False, True])
def test_a_zero_delta(tmp_path, cancels):
    """B = 0 as before training, or a product that cancels exactly."""
    A, B = whole(0, 1, 40, 30)
    A, B = (torch.cat([A, A]), torch.cat([B, -B], dim=1)) if cancels else (A, torch.zeros_like(B))
    folders = [save_lora(tmp_path / "zero", {Q: (A, B)}), save_lora(tmp_path / "sql", {Q: normal(1, 2, 40, 30)})]
    result = merge_engine.interference(folders)
    overall = result.overall
    assert (overall.norms[0], overall.effective_ranks[0], overall.shared[0, 0]) == (0, 0, 0)
    assert (
        math.isnan(overall.cosine[0, 1]) and math.isnan(overall.conflict[0, 1]) and math.isnan(overall.kept_energy[0])
    )
    assert overall.overlap[0, 1] == 0 and math.isnan(overall.conflict_rate)
    assert result.notes()[0].startswith("The delta of zero is zero")
    assert json.loads(json.dumps(result.as_dict(), allow_nan=False))["overall"]["cosine"][0] == [None, None]


def test_adapters_that_never_meet(tmp_path):
    folders = [save_lora(tmp_path / n, {n: normal(0, 2, 8, 9)}) for n in ("a", "b")]
    result = merge_engine.interference(folders)
    assert result.pairs() == [] and "No two adapters change the same module" in result.table()
    assert math.isnan(result.modules["a"].norms[1]) and result.overall.modules.tolist() == [1, 1]


def test_what_is_refused(tmp_path):
    one = save_lora(tmp_path / "one", {Q: normal(0, 2, 8, 9)})
    with pytest.raises(RecipeError, match="adapters: wanted at least two to compare, got 1"):
        merge_engine.interference([one])
    with pytest.raises(RecipeError, match="density: wanted a number from 0 to 1, got 2"):
        merge_engine.interference([one, one], density=2)
    other = save_lora(tmp_path / "other", {Q: normal(0, 2, 8, 10)})
    with pytest.raises(AdapterError, match=r"other: .*q_proj is linear \[8, 10\], wanted linear \[8, 9\] as in one"):
        merge_engine.interference([one, other])
