"""What a merge writes, and what it says of it."""

import json

import pytest
import torch
from lora_files import save_factors
from peft_adapters import WEIGHTS, deltas_of, in_peft, peft_deltas, relative

import merge_engine
from merge_engine.engine.output import output_bytes


@pytest.mark.parametrize("rank", ["auto", 3, 40])
@pytest.mark.parametrize(("dtype", "ranks"), [(None, "one"), ("bfloat16", "one"), (None, "own")])
def test_what_is_written_is_what_peft_loads(uneven, tmp_path, rank, dtype, ranks):
    recipe = {"method": "ties", "density": 0.5, "weights": WEIGHTS, "rank": rank, "ranks": ranks}
    want = deltas_of(merge_engine.merge(uneven, **recipe))
    result = merge_engine.merge(uneven, tmp_path / "out", dtype=dtype, **recipe)
    assert result.path == tmp_path / "out" and not result.modules
    loaded = peft_deltas(in_peft([tmp_path / "out"]), "0")
    assert loaded.keys() == want.keys()
    for name in want:
        assert relative(loaded[name], want[name]) < (1e-6 if dtype is None else 2 * 2**-8), name
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["energy"] == result.total_energy
    assert {name: module["energy"] for name, module in report["modules"].items()} == result.energy
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_one_rank_holds_the_same_deltas_as_own_ranks(uneven, tmp_path):
    """Zeros beside the same numbers, so the same configuration but for the ranks, and no rank but the largest."""
    written = {}
    for ranks in ("one", "own"):
        for result in merge_engine.merge_many(uneven, [{"method": "linear", "ranks": ranks}], tmp_path / ranks):
            written[ranks] = merge_engine.open_adapter(result.path)
    one, own = written["one"], written["own"]
    largest = max(module.rank for module in own.modules.values())
    assert len({module.rank for module in own.modules.values()}) > 1 and own.config["rank_pattern"]
    assert {module.rank for module in one.modules.values()} == {largest} == {one.config["r"], one.config["lora_alpha"]}
    assert one.config["rank_pattern"] == one.config["alpha_pattern"] == {}
    alike = set(one.config) - {"r", "lora_alpha", "rank_pattern", "alpha_pattern"}
    assert all(one.config[key] == own.config[key] for key in alike)
    for name, module in own.modules.items():
        (a, b), (wide_a, wide_b) = own.factors(name), one.factors(name)
        assert one.modules[name].scaling == module.scaling == 1
        assert (wide_a[: len(a)] == a).all() and (wide_b[:, : len(a)] == b).all()
        assert not wide_a[len(a) :].any() and not wide_b[:, len(a) :].any()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("recipe", "elements"),
    [
        ({"ranks": "own"}, 7 * 27 + 5 * 25 + 9 * 40),
        ({"ranks": "one"}, 7 * 27 + 5 * 25 + 9 * 40 + 9 * (27 + 25 + 40)),  # own ranks, and beside them the padded ones
        ({"ranks": "one", "rank": 5}, 5 * (27 + 25 + 40)),
        ({"ranks": "one", "rank": 5, "energy": 0.9}, 2 * 5 * (27 + 25 + 40)),  # which may choose smaller ranks
    ],
)
def test_the_disk_that_is_asked_for(tmp_path, recipe, elements):
    sizes = {"q": (20, 7), "v": (5, 20), "up": (20, 20)}
    for name in ("a", "b", "c"):
        factors = {module: (torch.ones(3, columns), torch.ones(rows, 3)) for module, (columns, rows) in sizes.items()}
        save_factors(tmp_path / name, factors)
    merged = merge_engine.merge([tmp_path / name for name in ("a", "b", "c")], method="ties", **recipe)
    assert output_bytes(merged.plan) == 4 * elements
