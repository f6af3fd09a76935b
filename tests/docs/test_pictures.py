"""The pictures show what the page says, and are made by the script."""

import re

import pytest
import torch
from docs_scripts import ROOT, script

pictures = script("pictures")


@pytest.fixture(scope="module")
def panels():
    return {name: dict(found) for name, found in pictures.panels().items()}


def test_the_page_shows_every_picture_and_no_other(tmp_path):
    pytest.importorskip("matplotlib")
    shown = re.findall(r"\]\(pictures/(\w+\.png)\)", (ROOT / "docs" / "choose.md").read_text())
    assert [path.name for path in pictures.draw(tmp_path)] == shown
    for name in shown:
        assert (ROOT / "docs" / "pictures" / name).exists()
        assert (tmp_path / name).stat().st_size > 1000


def test_a_trim_keeps_the_largest(panels):
    before, after = panels["trim"].values()
    kept = after != 0
    assert int(kept.sum()) == int(0.3 * 144)
    assert before[kept].abs().min() >= before[~kept].abs().max()


def test_what_is_elected_agrees_with_the_sign(panels):
    *trimmed, sign, mean = panels["elect"].values()
    total = trimmed[0] + trimmed[1]
    assert torch.equal(sign.sign(), total.sign())
    agreeing = [torch.where(each.sign() == total.sign(), each, 0.0) for each in trimmed]
    count = sum((each != 0).int() for each in agreeing).clamp(min=1)
    assert torch.allclose(mean, sum(agreeing) / count, atol=1e-6)


def test_directions_are_orthogonal_after_tsv(panels):
    before, after, _, merged = panels["core"].values()
    assert (before - torch.eye(4)).abs().max() > 0.1
    assert (after - torch.eye(4)).abs().max() < 1e-6
    first, second = pictures.deltas()
    parts = [torch.linalg.svd(each.double()) for each in (first, second)]
    left, right = (torch.cat(sides, 1) for sides in zip(*((u[:, :2], v[:2].T) for u, _, v in parts), strict=True))
    values = torch.cat([s[:2] for _, s, _ in parts])

    def polar(matrix):
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u @ vh

    assert torch.allclose(merged.double(), polar(left) * values @ polar(right).T, atol=1e-5)
