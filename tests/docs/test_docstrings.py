"""Docstrings as mkdocstrings gets them."""

import pytest

pytest.importorskip("griffe")
from docs_scripts import script

as_markdown = script("docstrings").as_markdown


def test_entries_become_a_list():
    text = "Merge.\n\nadapters: folders, or\n    hub ids.\nrank, energy: of the result.\nNo base model is loaded."
    assert as_markdown(text).splitlines() == [
        "Merge.",
        "",
        "- **adapters**: folders, or",
        "    hub ids.",
        "- **rank, energy**: of the result.",
        "",
        "No base model is loaded.",
    ]


def test_other_text_stays():
    text = "scale * x: a formula.\n\nA sentence, with: a colon.\n"
    assert as_markdown(text) == text.rstrip("\n")
