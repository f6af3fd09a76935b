"""What is recommended, of adapters whose relations are known."""

import json
import re
import shlex

import pytest
import torch
from lora_files import save_factors

import merge_engine
from merge_engine.cli.main import main

SHAPE, RANK = (160, 120), 3


def save(folder, a, b):
    return save_factors(folder, {"layers.0.q_proj": [a, b]}, lora_alpha=RANK)


@pytest.fixture
def factors():
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(RANK, SHAPE[1], generator=generator), torch.randn(SHAPE[0], RANK, generator=generator))
        for _ in range(3)
    ]


def texts(found):
    return "\n".join(found.findings), [each.recipe["method"] for each in found.suggestions]


@pytest.mark.quick
def test_unrelated_adapters(factors, tmp_path):
    found = merge_engine.recommend([save(tmp_path / name, *f) for name, f in zip("abc", factors, strict=True)])
    findings, methods = texts(found)
    assert methods == ["linear", "tsv", "actmat"] and all(each.recipe["scale"] == "auto" for each in found.suggestions)
    for word in ("nearly the same", "pull apart", "times the norm"):
        assert word not in findings
    assert "Cosines of the 3 pairs" in findings and "a merge of all needs up to 9" in findings


def test_twins_opposites_and_giants_are_named_with_their_figures(factors, tmp_path):
    (a, b), (c, d), (e, f) = factors
    folders = [save(tmp_path / "one", a, b), save(tmp_path / "twin", a, b * 1.5), save(tmp_path / "foe", a, -b)]
    findings, _ = texts(merge_engine.recommend([*folders, save(tmp_path / "big", c, d * 10)]))
    assert "one and twin are nearly the same (cosine 1.000)" in findings
    assert "one and foe pull apart (cosine -1.000, 100.0 % of what both keep has opposite signs)" in findings
    assert "big has " in findings and " times the norm of " in findings
    found = merge_engine.recommend([save(tmp_path / "x", a, b), save(tmp_path / "y", a / a.norm() * 40, b)])
    assert re.match(r"The cosine of the pair is [0-9.-]+ \(0: unrelated\); ", found.findings[-2])
    assert [each.recipe["method"] for each in found.suggestions] == ["linear", "linear"]
    assert "they agree" in found.suggestions[1].why
    norms = [float((second @ first).norm()) for first, second in ((c, d), (e, f * 4))]
    found = merge_engine.recommend([save(tmp_path / "p", c, d), save(tmp_path / "q", e, f * 4)])
    weights = found.suggestions[2].recipe["weights"]
    assert [weight * norm for weight, norm in zip(weights, norms, strict=True)] == pytest.approx(
        [max(norms)] * 2, rel=5e-3
    )
    zero = merge_engine.recommend([folders[0], save(tmp_path / "nothing", a, b * 0)])
    assert zero.findings[0] == "nothing changes nothing: its delta is zero. Leave it out."


def test_the_commands_run_and_json_says_the_same(factors, tmp_path, capsys, monkeypatch):
    folders = [str(save(tmp_path / f"an adapter {name}", *f)) for name, f in zip("abc", factors, strict=True)]
    assert main(["recommend", *folders, "--json", str(tmp_path / "r.json")]) == 0
    printed, told = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    monkeypatch.chdir(tmp_path)
    for each in told["suggestions"]:
        assert each["command"] in printed and each["why"] in printed
        program, *words = shlex.split(each["command"])
        assert program == "merge-engine" and main([*words, "--overwrite"]) == 0
        assert (
            json.loads((tmp_path / "merged" / "merge_report.json").read_text())["recipe"]["method"]
            == each["recipe"]["method"]
        )
    assert main(["recommend", *folders, "--json", str(tmp_path / "r.json")]) == 2
    assert "already exists; pass --overwrite" in capsys.readouterr().err
