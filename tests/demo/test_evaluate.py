"""The score of a merge, by a folder or in memory."""

import pytest

import merge_engine
from merge_engine.demo import adapter_paths, evaluate, measure
from merge_engine.errors import MergeError


def test_a_merge_in_memory_is_scored_as_its_folder_is(tmp_path, monkeypatch):
    """And as PEFT measures it; what was measured before does not matter."""
    monkeypatch.setattr(measure, "COUNT", dict.fromkeys(measure.COUNT, 24))
    adapters = list(adapter_paths().values())[:2]
    one = merge_engine.merge(adapters, method="linear", scale="auto")
    part = merge_engine.merge(adapters, tmp_path / "part", method="ties", density=0.3, rank=8, dtype="bfloat16")
    score = evaluate.scorer()
    one.save(tmp_path / "one")
    for merged, folder in ((one, tmp_path / "one"), (part, tmp_path / "part"), (one, tmp_path / "one")):
        with measure.quiet():
            wanted = evaluate.score(folder)
        for got in (score(merged), score(folder)):
            assert got["score"] == pytest.approx(wanted["mean"], abs=0.5)
            assert {task: got[task] for task in adapter_paths()} == pytest.approx(
                {task: wanted[task] for task in adapter_paths()}, abs=1.5
            )
    del one.modules["model.layers.0.mlp.up_proj"]
    assert score(one)["score"] != pytest.approx(wanted["mean"], abs=1e-3)
    one.modules["model.layers.9.mlp.up_proj"] = one.modules["model.layers.1.mlp.up_proj"]
    with pytest.raises(MergeError, match=r"^demo: wanted modules of its base, got model.layers.9.mlp.up_proj$"):
        score(one)
