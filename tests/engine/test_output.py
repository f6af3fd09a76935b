"""What a merge writes, and what it says of it."""

import json

import pytest
from peft_adapters import WEIGHTS, deltas_of, in_peft, peft_deltas, relative

import merge_engine


@pytest.mark.parametrize("rank", ["auto", 3, 40])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_what_is_written_is_what_peft_loads(uneven, tmp_path, rank, dtype):
    recipe = {"method": "ties", "density": 0.5, "weights": WEIGHTS, "rank": rank}
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
