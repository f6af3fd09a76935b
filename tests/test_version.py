"""One version everywhere."""

import re
from pathlib import Path

import yaml

import merge_engine

ROOT = Path(__file__).parents[1]


def test_citation_and_changelog_have_the_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == merge_engine.__version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == merge_engine.__version__


def test_changes_are_sorted_by_kind():
    kinds = re.findall(r"^### (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert kinds == ["Fixed", "Changed", "Added"]
