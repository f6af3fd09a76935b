"""The cut to a rank: how much it keeps, and where numbers overflow float32."""

import pytest
import torch
from lora_files import save_factors
from peft_adapters import WEIGHTS, deltas_of

import merge_engine
from merge_engine.errors import AdapterError, RecipeError


def test_energy_picks_the_smallest_rank(folders):
    merged = merge_engine.merge(folders, method="linear", energy=0.8, weights=WEIGHTS)
    full = deltas_of(merge_engine.merge(folders, method="linear", weights=WEIGHTS))
    for name, result in merged.modules.items():
        spectrum = torch.linalg.svdvals(full[name].double()).square()
        share = spectrum.cumsum(0) / spectrum.sum()
        assert len(result.A) == int((share < 0.8).sum()) + 1
        assert result.energy == pytest.approx(share[len(result.A) - 1].item(), abs=1e-6)
    kept = sum((r.B.double() @ r.A.double()).square().sum().item() for r in merged.modules.values())
    total = sum(delta.double().square().sum().item() for delta in full.values())
    assert merged.total_energy == pytest.approx(kept / total, abs=1e-6)


@pytest.mark.parametrize("recipe", [{"method": "linear"}, {"method": "ties", "density": 0.4}], ids=str)
def test_energy_picks_the_smallest_rank_among_factors(folders, recipe):
    full = deltas_of(merge_engine.merge(folders, space="factors", **recipe))
    merged = merge_engine.merge(folders, space="factors", energy=0.8, **recipe)
    for name, result in merged.modules.items():
        spectrum = torch.linalg.svdvals(full[name].double()).square()
        share = spectrum.cumsum(0) / spectrum.sum()
        assert len(result.A) == int((share < 0.8).sum()) + 1


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "ties", "weights": [1, 1e38], "election": "frequency"},
        {"method": "linear", "weights": [1e38, 3e38], "scale": 3.0},
        {"method": "cat", "weights": [3e38, 1]},
        {"method": "magnitude_prune", "density": 0.3, "weights": [-3e38, 1]},
    ],
)
def test_what_leaves_float32_is_one_error_that_names_the_module(folders, tmp_path, recipe):
    with pytest.raises(RecipeError, match=r"model\.layers\.0\.mlp\.down_proj"):
        merge_engine.merge(folders[:2], tmp_path / "out", **recipe)
    assert list(tmp_path.iterdir()) == []
    with merge_engine.Session(folders[:2]) as session, pytest.raises(RecipeError, match="down_proj"):
        session.merge(**recipe)
    (failed,) = merge_engine.merge_many(folders[:2], [recipe])
    assert isinstance(failed.error, RecipeError) and "down_proj" in str(failed.error)


@pytest.mark.quick
def test_factors_whose_product_leaves_float32(tmp_path):
    save_factors(tmp_path / "a", {"q": (torch.full((2, 9), 1e30), torch.tensor([[1e30, -1e30]] * 8))})
    for method, density in (("ties", 0.2), ("ties", 1), ("magnitude_prune", 0.5)):
        with pytest.raises(AdapterError, match=r"^a: the delta of q may reach 4\.0e\+60, which overflows float32"):
            merge_engine.merge([tmp_path / "a"] * 2, tmp_path / "out", method=method, density=density, rank=2)
    with pytest.raises(AdapterError, match="the delta of q may reach"):
        merge_engine.Session([tmp_path / "a"])


@pytest.mark.parametrize(("of_A", "of_B"), [(3e38, 1e-3), (1e-3, 3e38)])
def test_either_factor_of_a_merge_may_leave_float32(tmp_path, of_A, of_B):
    save_factors(tmp_path / "b", {"q": (torch.full((2, 9), of_A), torch.full((8, 2), of_B))}, lora_alpha=1)
    with pytest.raises(RecipeError, match=r"^q: its merge overflows float32; wanted smaller weights"):
        merge_engine.merge([tmp_path / "b"] * 2, tmp_path / "out", method="linear", space="factors", weights=[4, 4])
