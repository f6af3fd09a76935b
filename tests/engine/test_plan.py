"""Which adapters can be merged, and by which recipe."""

import pytest
import torch
from lora_files import save_factors
from peft_adapters import rewrite
from plain_adapters import factors_of, save_plain, save_three

import merge_engine
from merge_engine.engine.plan import ModulePlan
from merge_engine.errors import MergeError, RecipeError


@pytest.fixture
def three(tmp_path):
    return save_three(tmp_path)


def test_no_adapters(tmp_path):
    with pytest.raises(RecipeError, match=r"^adapters: wanted at least one, got none$"):
        merge_engine.merge([], tmp_path / "out")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "recipe", "message"),
    [
        ({"columns": 41}, {}, "^odd: layers.0.q_proj is linear \\[24, 41\\], wanted linear \\[24, 40\\] as in sql$"),
        ({"rank": 5}, {"space": "factors"}, "^odd: layers.0.q_proj has rank 5, wanted 4 as in sql: factors of diff"),
        ({"use_dora": True}, {}, "^odd: use_dora is set in adapter_config.json; "),
        ({"r": 3}, {}, "^odd: .*rank"),
    ],
)
def test_mistakes_in_the_adapters(three, tmp_path, change, recipe, message):
    odd = save_plain(tmp_path / "odd", 9, **change)
    with pytest.raises(MergeError, match=message):
        merge_engine.merge([*three, odd], tmp_path / "out", **recipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ads", "chat", "odd", "sql"]


def test_one_adapter_is_no_list_of_letters(three, tmp_path):
    for merge in (merge_engine.merge, lambda source, out: merge_engine.merge_into(source, source, out)):
        with pytest.raises(
            MergeError, match=r"^adapters: wanted a list of folders or hub ids, got '.*sql'$|wanted a full"
        ):
            merge(str(three[0]), tmp_path / "out")
    with pytest.raises(MergeError, match="wanted a list of folders"):
        merge_engine.Session(str(three[0]))


@pytest.mark.quick
def test_8_bit_adapters_are_written_as_what_holds_them(tmp_path):
    eight, full = torch.float8_e4m3fn, torch.float32
    folders = []
    for name, dtype in (("a", eight), ("b", eight), ("c", full)):
        A, B = torch.arange(60.0).reshape(3, 20) / 8, torch.arange(21.0).reshape(7, 3) / 4 - 2
        folders.append(save_factors(tmp_path / name, {"q": (A.to(dtype), B.to(dtype))}))
    A, B = (factors_of(folders[0])[f"base_model.model.q.lora_{side}.weight"].double() for side in "AB")
    for inputs, method, written in ((folders[:2], "linear", torch.bfloat16), (folders[1:], "cat", torch.float32)):
        merge_engine.merge(inputs, tmp_path / method, method=method)
        assert {tensor.dtype for tensor in factors_of(tmp_path / method).values()} == {written}
    got = merge_engine.merge(folders[:2], method="linear").modules["q"]
    torch.testing.assert_close(got.B.double() @ got.A.double(), 4 * B @ A, rtol=1e-5, atol=1e-3)


def test_different_bases_are_warned_of(folders, tmp_path):
    other = rewrite(folders[0], tmp_path / "other", lambda A, B: (A, B), base_model_name_or_path="another/base")
    with pytest.warns(UserWarning, match=r"^other was trained on another/base, chat on tiny: "):
        merge_engine.merge([folders[1], other], method="cat")


@pytest.mark.quick
def test_a_rank_is_the_sum_of_ranks_up_to_the_smaller_side(tmp_path):
    sizes = {"q": (20, 7), "v": (5, 20), "up": (20, 20)}
    for name in ("a", "b", "c"):
        factors = {module: (torch.ones(3, columns), torch.ones(rows, 3)) for module, (columns, rows) in sizes.items()}
        save_factors(tmp_path / name, factors)
    merged = merge_engine.merge([tmp_path / name for name in ("a", "b", "c")], method="ties")
    assert {module.name: module.rank for module in merged.plan.modules} == {"q": 7, "v": 5, "up": 9} == merged.ranks


@pytest.mark.quick
def test_weights_of_factors_are_square_roots_and_0_stays_0():
    module = ModulePlan("q", 4, 5, (0, 1, 2), (0.0, -8.0, 2.0), (0.5, 0.5, 2.0), (1.0, 1.0, 1.0), 3)
    assert module.weights_of("delta") == [0.0, -8.0, 2.0]
    assert module.weights_of("A") == [0.0, -2.0, 2.0] and module.weights_of("B") == [0.0, 2.0, 2.0]
